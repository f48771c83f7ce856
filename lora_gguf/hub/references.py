"""What a user may name as a model's GGUF: a path, or a file on the Hub.

model-Q4_K_M.gguf                           a path
OWNER/NAME[@REVISION][:QUANT]               as llama.cpp's -hf takes it; without QUANT it is Q4_K_M, or the only one
hf://OWNER/NAME[@REVISION][:QUANT]          the same
hf://OWNER/NAME[@REVISION]/FILE.gguf        one file of a repository; of a split model any shard
https://huggingface.co/OWNER/NAME/blob/…    the address of a file's page
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from lora_gguf.errors import HubError, printable
from lora_gguf.hub.quantizations import REPO_ID, Quantization, choose, fetch_quantization, listed, quantizations
from lora_gguf.hub.repository import Repo, open_repo
from lora_gguf.progress import FileProgress

_FILE = r"(?P<file>[^@:]+\.gguf)"
_REFERENCES = (
    re.compile(rf"hf://{REPO_ID}(?:@(?P<revision>[^/:]+))?/{_FILE}"),
    re.compile(rf"https?://(?:huggingface\.co|hf\.co)/{REPO_ID}/(?:blob|resolve)/(?P<revision>[^/]+)/{_FILE}(?:\?.*)?"),
    re.compile(rf"(?:hf://)?{REPO_ID}(?:@(?P<revision>[^:]+))?(?::(?P<quant>[\w.-]+))?", re.ASCII),
)


def gguf_path(source: str | os.PathLike, *, progress: FileProgress | None = None) -> Path:
    """The local path of the GGUF (of a split one the first shard) that ``source`` names, downloaded if need be.

    A path is returned as it is, whether it exists or not. ``progress`` is called with a file's name, its bytes so far
    and in all. Raises ``HubError``, ``IntegrityError``, ``FileError``, ``UsageError``.
    """
    found = remote_gguf(source)
    return fetch_quantization(*found, progress) if found else Path(source)


def remote_gguf(source: str | os.PathLike) -> tuple[Repo, Quantization] | None:
    """The repository and the files that ``source`` names on the Hub, nothing downloaded; None where it is a path."""
    match = _reference(source)
    if match is None:
        return None
    fields = match.groupdict()
    try:
        repo = open_repo(fields["repo"], fields["revision"])
    except HubError as error:
        if "://" in str(source):
            raise
        raise HubError(f"{error} (nor is there a file {printable(source)} here)") from None
    if not fields.get("file"):
        return repo, choose(quantizations(repo), fields["quant"], repo.id)
    found = next((entry for entry in quantizations(repo, every=True) if fields["file"] in entry.files), None)
    if found is None:
        raise HubError(
            f"{repo.id}: there is no file {printable(fields['file'], 80)}: it has {listed(quantizations(repo))}"
        )
    return repo, found


def names_file(source: str | os.PathLike) -> bool:
    """Whether ``source`` names one GGUF file of a repository."""
    match = _reference(source)
    return bool(match and match.groupdict().get("file"))


def _reference(source: str | os.PathLike) -> re.Match | None:
    """The parts of a reference to the Hub; None for a path, which all else is."""
    text = os.fspath(source)
    if not isinstance(source, str) or (text.endswith(".gguf") and "://" not in text):
        return None
    with contextlib.suppress(OSError, ValueError):
        if os.path.exists(text):
            return None
    return next((match for pattern in _REFERENCES if (match := pattern.fullmatch(text))), None)
