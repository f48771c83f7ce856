"""What a user may name: models and adapters, by path or on the Hub. Nothing is asked of the Hub here.

A model's GGUF:

model-Q4_K_M.gguf                           a path
OWNER/NAME[@REVISION][:QUANT]               as llama.cpp's -hf takes it; without QUANT it is Q4_K_M, or the only one
hf://OWNER/NAME[@REVISION][:QUANT]          the same
hf://OWNER/NAME[@REVISION]/FILE.gguf        one file of a repository; of a split model any shard
https://huggingface.co/OWNER/NAME/blob/…    the address of a file's page

An adapter: a folder or file, OWNER/NAME[@REVISION], the address of a repository's page or of a folder in it, or
hf://OWNER/NAME/FILE.gguf. Where several may be named: a name, a pair of one and the factor of its scale, or a sequence
of either.
"""

from __future__ import annotations

import contextlib
import numbers
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeGuard, cast

from lora_gguf.arguments import check_number, check_path
from lora_gguf.errors import FileError, UsageError, printable
from lora_gguf.files.input_file import NO_HINT, path_hint

Name: TypeAlias = str | os.PathLike[str]
Scaled: TypeAlias = tuple[Name, float]
Adapters: TypeAlias = Name | Scaled | Sequence[Name | Scaled]

REPO_ID = r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)"
_FILE = r"(?P<file>[^@:]+\.gguf)"
_MODELS = (
    re.compile(rf"hf://{REPO_ID}(?:@(?P<revision>[^/:]+))?/{_FILE}"),
    re.compile(rf"https?://(?:huggingface\.co|hf\.co)/{REPO_ID}/(?:blob|resolve)/(?P<revision>[^/]+)/{_FILE}(?:\?.*)?"),
    re.compile(rf"(?:hf://)?{REPO_ID}(?:@(?P<revision>[^:]+))?(?::(?P<quant>[\w.-]+))?", re.ASCII),
)
_ADAPTER = re.compile(
    r"(?:hf://|https?://(?:huggingface\.co|hf\.co)/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>.+)|/(?:tree|blob)/(?P<branch>[^/]+)(?:/(?P<folder>.+))?)?/?"
)


class ModelReference(NamedTuple):
    """A model's GGUF on the Hub: ``file`` of a repository, or its quantization ``quant``; None is not said."""

    repo: str
    revision: str | None
    quant: str | None
    file: str | None


def model_reference(source: Name) -> ModelReference | None:
    """Return what ``source`` names on the Hub; None for a path, which all else is."""
    text = os.fspath(source)
    if not isinstance(source, str) or (text.endswith(".gguf") and "://" not in text):
        return None
    with contextlib.suppress(OSError, ValueError):
        if os.path.exists(text):
            return None
    match = next((match for pattern in _MODELS if (match := pattern.fullmatch(text))), None)
    if match is None:
        return None
    parts = match.groupdict()
    return ModelReference(parts["repo"], parts["revision"], parts.get("quant"), parts.get("file"))


def names_file(source: Name) -> bool:
    """Return whether ``source`` names one GGUF file of a repository."""
    reference = model_reference(source)
    return bool(reference and reference.file)


def local_path(source: Name) -> Path | None:
    """Return an adapter's ``source`` as a path where it is one; None where it names a repository.

    Raises ``FileError`` where it can be neither.
    """
    text = os.fspath(source)
    with contextlib.suppress(OSError, ValueError):
        if text and Path(text).exists():
            return Path(text)
    is_name = isinstance(source, str) and not text.startswith((".", "~", "/")) and "\\" not in text
    if is_name and _ADAPTER.fullmatch(text):
        return None
    hint = path_hint(text)
    way = "expected a path or OWNER/NAME[@REVISION]" if hint == NO_HINT else hint
    raise FileError(f"{printable(text)}: no such file or folder, and not a Hub id: {way}")


def adapter_reference(source: str, revision: str | None, subfolder: str | None) -> tuple[str, str | None, str]:
    """Return repository, revision and subfolder ('' for the root) of ``OWNER/NAME[@REVISION]``, ``hf://…`` or an
    address.

    Raises ``UsageError`` where two revisions are named, or the subfolder is none.
    """
    match = _ADAPTER.fullmatch(source)
    if match is None:
        raise UsageError(f"{printable(source)}: expected OWNER/NAME[@REVISION]")
    written = match["revision"] or match["branch"]
    if revision and written and revision != written:
        raise UsageError(
            f"{printable(source)}: it names revision {printable(written)}, "
            f"and {printable(revision)} is asked for: give one"
        )
    folder = (subfolder or match["folder"] or "").strip("/")
    if folder and not all(part.strip(".") and part.isprintable() for part in re.split(r"[/\\]", folder)):
        raise UsageError(f"subfolder '{printable(folder, 60)}': expected a folder within the repository")
    return match["repo"], revision or written, folder


def scaled_names(adapters: Adapters) -> list[Scaled]:
    """Return ``adapters`` as a list of (name, factor of its scale): a name, such a pair, or a sequence of either.

    Raises ``UsageError`` where it is none of these, or empty.
    """
    if isinstance(adapters, (str, os.PathLike)) or _is_scaled(adapters) or not isinstance(adapters, Iterable):
        adapters = [adapters]
    items = cast("Iterable[Name | Scaled]", adapters)
    found = [item if _is_scaled(item) else (cast(Name, item), 1.0) for item in items]
    if not found:
        raise UsageError("no adapter: name at least one")
    for name, scale in found:
        check_path("adapter", name, "a path, a Hub id, or (one of these, scale)")
        check_number("scale", scale)
    return [(name, float(scale)) for name, scale in found]


def _is_scaled(item: object) -> TypeGuard[Scaled]:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], numbers.Real)
