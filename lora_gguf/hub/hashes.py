"""Compare a file from the Hub with the hashes that are known of it: its LFS sha256, or its git blob id (a sha1)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from lora_gguf.errors import FileError, HubError, IntegrityError, printable
from lora_gguf.files.input_file import impostor

LARGE = 256 << 20


def hexadecimal(value: object, length: int) -> str | None:
    """Return ``value`` as lower-case hex of ``length`` digits; None where it is none."""
    text = str(value).lower()
    return text if re.fullmatch(rf"[0-9a-f]{{{length}}}", text) else None


def check_hashes(path: Path, known: set[str], where: str) -> None:
    """Compare a file of the cache with its ``known`` hashes and with the name of its blob, which is its ETag.

    A file of 256 MiB or more is hashed once, and again when it changed. Raises ``IntegrityError``; the file is removed.
    """
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    expected = known | {name for length in (64, 40) if (name := hexadecimal(blob.name, length))}
    note, text = _note(path, expected)
    large = path.stat().st_size >= LARGE
    if large and _read(note) == text:
        return
    found = digests(path, {len(digest) for digest in expected})
    with open(path, "rb") as file:
        what = impostor(file.read(64), path.name)
    if not expected <= found:
        shown = f"{max(found)}, which is {what}" if what else max(found)
        for stale in (path, blob):
            with contextlib.suppress(OSError):
                stale.unlink()
        raise IntegrityError(
            f"{where}: expected the hash {min(expected - found)}, found {shown}: "
            "removed from the cache, run again; if that does not help, a proxy or the Hub is at fault"
        )
    if what:
        raise HubError(f"{where}: {what}")
    if large:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(text, encoding="utf-8")


def _note(path: Path, expected: set[str]) -> tuple[Path, str]:
    """Return where it is noted that a file had its hashes, and what the note says of the file as it is now."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    status = path.stat()
    text = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    return Path(home) / "lora-gguf" / "hashed" / min(expected, default="none"), text


def _read(note: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return note.read_text(encoding="utf-8")
    return None


def digests(path: Path, lengths: set[int]) -> set[str]:
    """Return of a file the sha256 if ``lengths`` holds 64 (digits), and the git blob id if it holds 40."""
    hashes = [hashlib.sha256()] if 64 in lengths else []
    if 40 in lengths:
        hashes.append(hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                for digest in hashes:
                    digest.update(chunk)
    except OSError as error:
        raise FileError(f"{printable(path)}: cannot read: {error.strerror}") from error
    return {digest.hexdigest() for digest in hashes}
