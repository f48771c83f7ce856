"""Files of a Hub repository: listed, downloaded into huggingface_hub's own cache, and checked against their hashes.

Token, cache, ``HF_ENDPOINT`` and offline mode are those of huggingface_hub, and so are the retries. What it does not do
is done here: the content of every file is hashed and compared (its LFS sha256, or its git blob id), partial files of
killed runs are removed, free space is checked first, and each failure becomes one line that says what to do.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_gguf.errors import HubError, LoraGgufError, printable
from lora_gguf.files.output import check_space
from lora_gguf.files.under_way import undone_by
from lora_gguf.hub.failures import explained, host
from lora_gguf.hub.hashes import check_hashes, hexadecimal
from lora_gguf.progress import FileProgress

try:
    import fcntl
except ImportError:  # Windows removes no file that is open: the next run does
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from httpx import Response
    from huggingface_hub.hf_api import RepoSibling

Result = TypeVar("Result")

RETRY_WAITS = (1, 2, 4)
MAX_RETRY_AFTER = 60
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository: its name from the root, its size in bytes where known, its hash as lower-case hex."""

    name: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def etag(self) -> str | None:
        """The name of its content in the client's cache; None where it is not known."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Repo:
    """A repository at one commit: nothing fetched from it can mix two versions."""

    id: str
    revision: str
    commit: str
    files: dict[str, RepoFile] = field(default_factory=dict)

    @property
    def snapshot(self) -> Path:
        """The folder in the cache where the files of the commit lie."""
        return self.folder / "snapshots" / self.commit

    @property
    def folder(self) -> Path:
        return _cache() / ("models--" + self.id.replace("/", "--"))


def open_repo(repo_id: str, revision: str | None = None) -> Repo:
    """Return ``repo_id`` with its files at ``revision`` (branch, tag or commit); offline, those in the cache."""
    from huggingface_hub import HfApi, constants

    repo = Repo(repo_id, revision or DEFAULT_REVISION, "")
    check_names(repo)
    if constants.HF_HUB_OFFLINE:
        return _cached(repo)
    with client(repo):
        api = HfApi(endpoint=constants.ENDPOINT)
        info = retrying(
            lambda: api.model_info(
                repo_id, revision=repo.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        )
        if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
            raise HubError(f"{printable(repo_id)}: {host()} names no commit: check HF_ENDPOINT")
        files = [_repo_file(sibling) for sibling in info.siblings or ()]
        return Repo(repo_id, repo.revision, str(info.sha), {file.name: file for file in files})


def download(repo: Repo, name: str, progress: FileProgress | None = None) -> Path:
    """Return the path in the cache of file ``name``, downloaded if need be, its hashes checked; a wrong file is
    removed.

    ``progress`` is called with the name, the bytes so far and the bytes in all (0 where unknown).
    """
    from huggingface_hub import constants, hf_hub_download

    file = repo.files[name]
    known = known_hashes(repo, file)
    _remove_stale(repo, file)
    if not (repo.snapshot / name).exists():
        _check_space(file)
    with client(repo, name), undone_by(lambda: _remove_own(repo, file)):
        path = Path(
            hf_hub_download(
                repo.id, name, revision=repo.commit, endpoint=constants.ENDPOINT, **_progress_option(name, progress)
            )
        )
    check_hashes(path, known, f"{repo.id}: {printable(name)}")
    return path


def known_hashes(repo: Repo, file: RepoFile) -> set[str]:
    """Return the hashes that a file must have: those of the listing, or else the one that the Hub answers with.

    Offline there may be none but the name of the cache's blob. Raises ``HubError`` where the Hub tells none.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    listed = {found for found in (file.sha256, file.git_sha1) if found}
    if listed or constants.HF_HUB_OFFLINE:
        return listed
    url = hf_hub_url(repo.id, file.name, revision=repo.commit, endpoint=constants.ENDPOINT)
    with client(repo, file.name):
        etag = retrying(lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)).etag
    found = {digest for length in (64, 40) if (digest := hexadecimal(etag, length))}
    if not found:
        raise HubError(
            f"{repo.id}: {printable(file.name)}: {host()} tells no hash of it, so that a damaged download would go "
            "unseen: check HF_ENDPOINT"
        )
    return found


def search(what: str, tags: list[str], limit: int) -> list[str]:
    """Return the ids of at most ``limit`` repositories with all of ``tags``, the most downloaded first; ``what`` names
    it.
    """
    from huggingface_hub import HfApi, constants

    with client(Repo(what, DEFAULT_REVISION, "")):
        api = HfApi(endpoint=constants.ENDPOINT)
        found = list(
            api.list_models(filter=tags, sort="downloads", limit=limit)
        )  # the client itself tries this call again
        return [model.id for model in sorted(found, key=lambda model: -(model.downloads or 0)) if is_name(model.id)]


def tags_of(repo_id: str) -> list[str]:
    """Return the tags of a repository, such as ``base_model:quantized:OWNER/NAME``."""
    from huggingface_hub import HfApi, constants

    with client(Repo(repo_id, DEFAULT_REVISION, "")):
        api = HfApi(endpoint=constants.ENDPOINT)
        return [
            str(tag)
            for tag in retrying(lambda: api.model_info(repo_id, timeout=constants.HF_HUB_ETAG_TIMEOUT)).tags or ()
        ]


def remember(repo: Repo) -> None:
    """Note in the cache which commit the revision stood for, as huggingface_hub does, so that offline mode finds it."""
    if repo.revision == repo.commit:
        return
    reference = repo.folder / "refs" / repo.revision
    with contextlib.suppress(OSError):  # the cache may be read-only
        if not reference.is_file() or reference.read_text(encoding="utf-8") != repo.commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            temporary = reference.with_name(f"{reference.name}.{os.getpid()}")
            temporary.write_text(repo.commit, encoding="utf-8")
            os.replace(temporary, reference)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_name(repo_id: str) -> bool:
    """Return whether a repository may be called so."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII)) and ".." not in repo_id and len(repo_id) <= 96


def check_names(repo: Repo) -> None:
    """Raise ``HubError`` where the repository's id or revision cannot be one."""
    if not is_name(repo.id):
        raise HubError(f"{printable(repo.id)}: not the name of a repository: expected OWNER/NAME")
    parts = repo.revision.split("/")
    if (
        not repo.revision.isprintable()
        or "\\" in repo.revision
        or len(repo.revision) > 200
        or not all(p.strip(".") for p in parts)
    ):
        raise HubError(
            f"{repo.id}: '{printable(repo.revision, 60)}' cannot be a revision: expected a branch, tag or commit"
        )


def _repo_file(sibling: RepoSibling) -> RepoFile:
    lfs, size = sibling.lfs, sibling.size
    if size is not None and (type(size) is not int or size < 0):
        raise HubError(
            f"{host()} lists {printable(sibling.rfilename, 80)} with {printable(repr(size), 40)} as its size: "
            "check HF_ENDPOINT"
        )
    return RepoFile(
        str(sibling.rfilename),
        size,
        hexadecimal(getattr(lfs, "sha256", None), 64) if lfs else None,
        hexadecimal(sibling.blob_id, 40) if not lfs else None,
    )


def _cached(repo: Repo) -> Repo:
    """Return the repository as it lies in the cache."""
    commit = repo.revision
    with contextlib.suppress(OSError):
        commit = (repo.folder / "refs" / repo.revision).read_text(encoding="utf-8").strip()
    repo = Repo(repo.id, repo.revision, commit)
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or not repo.snapshot.is_dir():
        raise HubError(f"{repo.id}: not in the cache, and offline mode is on: unset HF_HUB_OFFLINE to download it")
    names = [path.relative_to(repo.snapshot).as_posix() for path in repo.snapshot.rglob("*") if path.is_file()]
    return Repo(repo.id, repo.revision, commit, {name: RepoFile(name) for name in names})


def _check_space(file: RepoFile) -> None:
    folder = next(folder for folder in (_cache(), *_cache().parents) if folder.is_dir())
    check_space(folder / Path(file.name).name, file.size or 0)


def _remove_stale(repo: Repo, file: RepoFile) -> None:
    """Remove what killed downloads of this file left in the cache; one under way holds the client's lock."""
    stale = _partial(repo, file)
    if not stale:
        return
    from filelock import FileLock, Timeout

    lock = _lock(repo, file)
    with contextlib.suppress(OSError, Timeout, NotImplementedError):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0, mode=0o664):
            for path in stale:
                path.unlink(missing_ok=True)


def _remove_own(repo: Repo, file: RepoFile) -> None:
    """Remove what this process, which a signal ends, has under way of this file in the cache: what lies there is its
    own, or nobody's, if it has the client's lock.
    """
    if not fcntl:
        return
    lock = _lock(repo, file).stat()
    for fd in range(3, 1024):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(fd), lock):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for path in _partial(repo, file):
                    path.unlink(missing_ok=True)


def _lock(repo: Repo, file: RepoFile) -> Path:
    """Return the file by which the client lets one process alone download this file."""
    return _cache() / ".locks" / repo.folder.name / f"{file.etag}.lock"


def _partial(repo: Repo, file: RepoFile) -> list[Path]:
    """Return what lies in the cache of downloads of this file that did not end."""
    return list((repo.folder / "blobs").glob(f"{file.etag}.????????.incomplete")) if file.etag else []


def _progress_option(name: str, progress: FileProgress | None) -> dict[str, Any]:
    """Return the argument that makes the client report to ``progress``; clients before 1.0 cannot."""
    import inspect

    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    if progress is None or "tqdm_class" not in inspect.signature(hf_hub_download).parameters:
        return {}

    tell = progress

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.done, self.all = kwargs.get("initial") or 0, kwargs.get("total") or 0

        def update(self, n: float | None = 1) -> None:
            self.done += n or 0
            tell(name, int(self.done), int(self.all))

    return {"tqdm_class": Reporter}


@contextlib.contextmanager
def client(repo: Repo, file: str = "", *, bars: bool = False) -> Iterator[None]:
    """Let calls of huggingface_hub run: its log kept quiet, its bars off unless wanted, its errors explained in one
    line.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, had_bars = logging.get_verbosity(), not (bars or are_progress_bars_disabled())
    if not os.environ.get("HF_DEBUG"):
        logging.set_verbosity_error()
    if had_bars:
        disable_progress_bars()
    _guard_session()
    try:
        yield
    except LoraGgufError:
        raise
    except Exception as error:
        raise explained(
            error, repo.id, repo.revision, file, str(_cache())
        ) from None  # the cause's request holds the token
    finally:
        logging.set_verbosity(verbosity)
        if had_bars and are_progress_bars_disabled():
            enable_progress_bars()


def _guard_session() -> None:
    from huggingface_hub.utils import get_session

    hooks = getattr(get_session(), "event_hooks", None)
    if hooks is not None and _check_response not in hooks["response"]:
        hooks["response"].append(_check_response)


def _check_response(response: Response) -> None:
    """Refuse what the client would follow blindly: an ETag that leaves the cache's folder, hours to wait."""
    for header in ("etag", "x-linked-etag", "x-repo-commit"):
        if not re.fullmatch(r'(W/)?"?[\w.:+=-]*"?', response.headers.get(header, "")):
            raise HubError(
                f"{host()} sent {header} '{printable(response.headers[header], 60)}': "
                "expected a hash: check HF_ENDPOINT"
            )
    seconds = retry_after(response)
    if response.status_code in RETRY_STATUS and seconds > MAX_RETRY_AFTER:
        raise HubError(f"{host()} asks to wait {seconds} seconds (HTTP {response.status_code}): try again then")


def retry_after(response: Response) -> int:
    """Return the seconds that an answer asks to wait; 0 where it does not say."""
    text = response.headers.get("retry-after", "").strip()
    limit = re.search(r"\br=0\s*;\s*t=(\d+)", response.headers.get("ratelimit", "").replace(" ", ""))
    return int(text) if text.isdigit() else int(limit[1]) if limit else 0


def retrying(call: Callable[[], Result]) -> Result:
    """Return the result of ``call``, tried again after answers and failures that may pass."""
    for wait in RETRY_WAITS:
        try:
            return call()
        except Exception as error:
            response = getattr(error, "response", None)
            names = {base.__name__ for base in type(error).__mro__}
            if response is not None and response.status_code in RETRY_STATUS:
                wait = max(wait, retry_after(response))
            elif not names & {"TimeoutException", "NetworkError", "RemoteProtocolError", "Timeout", "ConnectionError"}:
                raise
        time.sleep(wait)
    return call()
