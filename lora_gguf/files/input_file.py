"""Read a file that may be hostile, or change under us: regular files only, by position, never mapped."""

from __future__ import annotations

import os
import stat

from lora_gguf.errors import FileError, IntegrityError, printable

# how a file starts, the ending of the names for which that is right -> what it is otherwise and what to do
IMPOSTORS = (
    (b"version https://git-lfs", None, "a Git LFS pointer instead of the file: run git lfs pull, or download it again"),
    (b"<!doctype", None, "an HTML page instead of the file: download it again, by its direct address"),
    (b"<html", None, "an HTML page instead of the file: download it again, by its direct address"),
    (b"gguf", ".gguf", "a GGUF under a wrong name: rename it to .gguf"),
    (b"pk\x03\x04", ".bin", "a zip archive under a wrong name: a PyTorch file is called .bin"),
)


def impostor(head: bytes, name: str = "") -> str | None:
    """What a file ``name`` that starts with ``head`` is instead of what it should be, and what to do, if known."""
    start = head.lstrip().lower()
    return next(
        (what for magic, end, what in IMPOSTORS if start.startswith(magic) and not (end and name.endswith(end))), None
    )


def open_input(path: str | os.PathLike) -> int:
    """A descriptor of the regular file ``path``, open for reading; ``FileError`` for all else: a fifo would block."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError(f"{printable(path)}: expected a file, found a directory or device: check the path")
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise FileError(f"{printable(path)}: cannot open: {reason}: check the path") from error


def read_into(fd: int, position: int, buffer, label: str) -> None:
    """Fill ``buffer`` (writable, contiguous) with the bytes from ``position`` on, which the file had when opened."""
    view, done = memoryview(buffer).cast("B"), 0
    while done < len(view):
        try:
            n_bytes = os.preadv(fd, [view[done:]], position + done)
        except OSError as error:
            raise FileError(f"{label}: cannot read: {error.strerror}") from error
        if n_bytes == 0:
            raise IntegrityError(
                f"{label}: the file became shorter while it was read: run again when nothing writes to it"
            )
        done += n_bytes


def read_at(fd: int, position: int, n_bytes: int, label: str) -> bytes:
    """``n_bytes`` from ``position`` on; the caller has checked them against the file's size."""
    buffer = bytearray(n_bytes)
    read_into(fd, position, buffer, label)
    return bytes(buffer)
