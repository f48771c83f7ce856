"""Files to a repository on the Hub, by huggingface_hub's own client: in one commit, after what is large.

What a run that was stopped has uploaded need not be sent again: the Hub knows it by its hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gguf.errors import HubError, printable
from lora_gguf.hub.repository import DEFAULT_REVISION, Repo, check_names, client, open_repo, retrying

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WRITE = "log in with `hf auth login` and a token that may write, or set HF_TOKEN to one"


def make_repo(repo_id: str, *, public: bool = False) -> Repo:
    """Return the repository ``repo_id`` with its files; where there is none, one is made: private, or ``public``.

    Raises ``HubError`` where the token may not write there.
    """
    from huggingface_hub import constants

    check_names(Repo(repo_id, DEFAULT_REVISION, ""))
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo_id}: nothing can be uploaded in offline mode: unset HF_HUB_OFFLINE")
    with client(Repo(repo_id, DEFAULT_REVISION, "")):
        if _api().token is None and not _has_token():
            raise HubError(f"{repo_id}: no token to upload with: {WRITE}")
        retrying(lambda: _api().create_repo(repo_id, private=not public, exist_ok=True))
    return open_repo(repo_id)


def upload(repo: Repo, files: Mapping[str, Path | bytes], message: str, *, bars: bool = False) -> str:
    """Put ``files``, by their names there, into ``repo`` in one commit; return its page's address.

    A file that is there already, the same, is not sent. ``bars`` shows the client's own. Raises ``HubError``,
    ``FileError``; then the repository is what it was.
    """
    from huggingface_hub import CommitOperationAdd

    for name, content in files.items():
        if isinstance(content, Path):
            with client(repo, name, bars=bars):
                _api().preupload_lfs_files(repo.id, [CommitOperationAdd(name, content)])
    with client(repo, bars=bars):
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        found = _api().create_commit(repo.id, operations, commit_message=message)
    return printable(found.commit_url)


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())
