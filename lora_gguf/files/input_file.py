"""Read a file that may be hostile, or change under us: regular files only, by position, never mapped."""

from __future__ import annotations

import difflib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_gguf.errors import FileError, IntegrityError, printable
from lora_gguf.files import positional

# how a file starts, the ending of the names for which that is right -> what it is otherwise and what to do
IMPOSTORS = (
    (b"version https://git-lfs", None, "a Git LFS pointer instead of the file: run git lfs pull, or download it again"),
    (b"<!doctype", None, "an HTML page instead of the file: download it again, by its direct address"),
    (b"<html", None, "an HTML page instead of the file: download it again, by its direct address"),
    (b"gguf", ".gguf", "a GGUF under a wrong name: rename it to .gguf"),
    (b"pk\x03\x04", ".bin", "a zip archive under a wrong name: a PyTorch file is called .bin"),
)


def impostor(head: bytes, name: str = "") -> str | None:
    """Return what a file ``name`` that starts with ``head`` is instead of what it should be, and what to do, if
    known.
    """
    start = head.lstrip().lower()
    return next(
        (what for magic, end, what in IMPOSTORS if start.startswith(magic) and not (end and name.endswith(end))), None
    )


NO_HINT = "check the path"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.ASCII)


def open_input(path: str | os.PathLike) -> int:
    """Return a descriptor of the regular file ``path``, open for reading; ``FileError`` for all else: a fifo would
    block.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError(f"{printable(path)}: expected a file, found a directory or device: check the path")
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise FileError(f"{printable(path)}: cannot open: {reason}: {path_hint(path)}") from error


def path_hint(path: str | os.PathLike[str]) -> str:
    """Return what to do where ``path`` cannot be opened: the name in the same folder that was meant, if one is much
    like it.
    """
    if shard := _SHARD.search(os.fspath(path)):
        return f"shard {int(shard[1])} of {int(shard[2])} is missing: put it beside the others"
    if os.fspath(path).startswith("~"):
        return f"the shell leaves ~ as it is within quotation marks: write {printable(os.path.expanduser(path))}"
    folder, name = os.path.split(os.fspath(path))
    stem, suffix = os.path.splitext(name)
    try:
        names = (
            [] if os.path.exists(path) else sorted(os.listdir(folder or "."), key=lambda found: found.endswith(suffix))
        )
    except (OSError, ValueError):
        names = []
    by_stem = {os.path.splitext(found)[0]: found for found in names}  # of two the one with the same suffix
    meant = difflib.get_close_matches(stem, by_stem, 1, 0.7)
    return f"did you mean {printable(os.path.join(folder, by_stem[meant[0]]))}?" if meant else NO_HINT


class Source:
    """Bytes that are read by position; use as a context manager. ``label`` is a name that is safe to print.

    ``size`` is in bytes, ``window`` how many it is good to ask for at a time. A subclass brings ``read_into``.
    """

    label: str
    size: int
    window: int

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End reading."""

    def check_unchanged(self) -> None:
        """Raise ``IntegrityError`` if the bytes are no longer those that the source had when it was opened."""

    def read_into(self, position: int, buffer: Any, label: str = "") -> None:
        """Fill ``buffer`` (writable, contiguous) with the bytes from ``position`` on; ``label`` is what they are.

        The caller has checked them against ``size``.
        """
        raise NotImplementedError

    def read(self, position: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` from ``position`` on; the caller has checked them against ``size``."""
        buffer = bytearray(n_bytes)
        self.read_into(position, buffer)
        return bytes(buffer)

    def read_array(self, position: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """Return a numpy array of ``shape`` from ``position`` on; the caller has checked its bytes against ``size``."""
        import numpy as np

        array = np.empty(shape, dtype)
        if array.size:
            self.read_into(position, array.reshape(-1).view(np.uint8))
        return array


@dataclass(frozen=True)
class FileState:
    """A file as it was when it was opened: what must still be so where it is opened again, by any process."""

    path: str
    n_bytes: int
    mtime_ns: int


class InputFile(Source):
    """A regular file, open for reading, until it is closed or nobody has it any more. Raises ``FileError`` where it
    cannot be read.
    """

    window = 1 << 20
    fd = -1

    def __init__(self, path: str | os.PathLike) -> None:
        self.label = printable(Path(path).name)
        self.path, self.fd = os.path.abspath(path), open_input(path)
        status = os.fstat(self.fd)
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        self.close()

    @property
    def state(self) -> FileState:
        """What the file was when it was opened."""
        return FileState(self.path, self.size, self.mtime_ns)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_unchanged(self) -> None:
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise IntegrityError(
                f"{self.label}: the file changed while it was read: run again when nothing writes to it"
            )

    def read_into(self, position: int, buffer: Any, label: str = "") -> None:
        view, done = memoryview(buffer), 0
        if not view.nbytes:
            return
        view = view.cast("B")
        label = f"{self.label}: {label}" if label else self.label
        while done < len(view):
            try:
                n_bytes = positional.read_into(self.fd, view[done:], position + done)
            except OSError as error:
                raise FileError(f"{label}: cannot read: {error.strerror}") from error
            if n_bytes == 0:
                raise IntegrityError(
                    f"{label}: the file became shorter while it was read: run again when nothing writes to it"
                )
            done += n_bytes
