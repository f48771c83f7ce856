"""Write a file so that its path holds the old content or the whole new one, never a part.

The bytes go to a temporary file in the target's folder; ``commit`` syncs it, renames it into place and syncs the
folder. The temporary file is locked while it is written, so a later run on the same target can tell a stale one, which
a killed process left, from one in use.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_gguf.errors import FileError, IntegrityError, printable
from lora_gguf.files import positional
from lora_gguf.files.input_file import open_input
from lora_gguf.files.under_way import UNDO

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so stale files stay
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".lora-gguf-tmp"
_COPY_CHUNK = 8 << 20
_SYNC_BYTES = 32 << 20  # after so many the disk is told to begin, and the end need not wait for all of them


def check_target(path: str | os.PathLike, *, force: bool = False, inputs: Iterable[os.PathLike | str] = ()) -> Path:
    """Return the real path to write to, symbolic links followed; ``FileError`` where writing there would lose
    something.
    """
    target = Path(os.path.realpath(path))
    label = printable(path)
    if os.fspath(path).endswith(("/", os.sep)) and not target.exists():
        raise FileError(f"{label}: the folder does not exist: make it first")
    if os.path.islink(path) and not target.exists():
        raise FileError(f"{label}: a link to nowhere: remove it or name another output")
    if target.exists():
        for source in _files(inputs):
            if os.path.exists(source) and os.path.samefile(source, target):
                raise FileError(f"{label}: the output is also an input ({printable(source)}): name another output")
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise FileError(f"{label}: expected a path for a file, found a directory or device: name a file")
        if not force:
            raise FileError(f"{label}: exists already: name another output, or replace it with --force")
    if not target.parent.is_dir():
        raise FileError(f"{label}: the folder {printable(target.parent)} does not exist: make it first")
    if not os.access(target.parent, os.W_OK):
        raise FileError(f"{label}: the folder {printable(target.parent)} is not writable: name an output elsewhere")
    return target


def _files(inputs: Iterable[os.PathLike | str]) -> Iterable[os.PathLike | str]:
    """The inputs, and what lies in those that are folders."""
    for source in inputs:
        yield source
        if os.path.isdir(source):
            yield from Path(source).iterdir()


def check_space(target: Path, n_bytes: int) -> None:
    """Raise ``FileError`` unless the target's file system has room for ``n_bytes`` more."""
    free = shutil.disk_usage(target.parent).free
    if n_bytes > free:
        raise FileError(
            f"{printable(target)}: needs {n_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free: make "
            "room or write elsewhere"
        )


class OpenOutput:
    """An open file to write to, at any place; ``label`` is what errors call it.

    ``write_at`` and ``copy_at`` may be called from several threads for ranges that do not overlap.
    """

    label: str
    fd = -1

    def write_at(self, position: int, buffer: Any) -> None:
        """Write all of ``buffer`` (contiguous bytes) at ``position`` bytes from the file's start."""
        view, done = memoryview(buffer), 0
        if not view.nbytes:
            return
        view = view.cast("B")
        while done < len(view):
            try:
                n_bytes = positional.write(self.fd, view[done:], position + done)
            except OSError as error:
                raise self.failed("write", error) from error
            if n_bytes == 0:
                raise FileError(f"{self.label}: cannot write: the system took no bytes: write elsewhere")
            done += n_bytes
        self.wrote(done)

    def copy_at(self, position: int, source_fd: int, source_position: int, n_bytes: int) -> None:
        """Copy ``n_bytes`` from another open file, inside the kernel where the system can."""
        done = 0
        while done < n_bytes:
            n = self._copy_some(position + done, source_fd, source_position + done, min(n_bytes - done, _COPY_CHUNK))
            if n == 0:
                raise IntegrityError(
                    f"{self.label}: an input became shorter while it was copied: run again when nothing writes to it"
                )
            done += n

    def _copy_some(self, position: int, source_fd: int, source_position: int, n_bytes: int) -> int:
        if hasattr(os, "copy_file_range"):
            with contextlib.suppress(OSError):
                if n_copied := os.copy_file_range(source_fd, self.fd, n_bytes, source_position, position):
                    self.wrote(n_copied)
                    return n_copied
        chunk = memoryview(bytearray(n_bytes))
        try:
            n_read = positional.read_into(source_fd, chunk, source_position)
        except OSError as error:
            raise self.failed("read an input", error) from error
        self.write_at(position, chunk[:n_read])
        return n_read

    def wrote(self, n_bytes: int) -> None:
        """Note that ``n_bytes`` more are written."""

    def failed(self, verb: str, error: OSError) -> FileError:
        """Return the error of what the system refused."""
        return FileError(f"{self.label}: cannot {verb}: {error.strerror or error}: nothing was written there")


class SharedOutput(OpenOutput):
    """The file that another process has under way, its ``temporary``, open to write a part of it; a context manager.

    ``sync`` makes what was written durable when it is left: the other process can do so only on its own machine.
    """

    def __init__(self, temporary: str | os.PathLike, label: str, *, sync: bool) -> None:
        self.temporary, self.label, self.sync = temporary, label, sync

    def __enter__(self) -> SharedOutput:
        flags = os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self.fd = os.open(self.temporary, flags)
        except OSError as error:
            raise FileError(
                f"{self.label}: cannot open what is under way to it: {error.strerror}: its folder must be one that all "
                "workers share"
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        try:
            if kind is None and self.sync:
                os.fsync(self.fd)
        except OSError as error:
            raise self.failed("write", error) from error
        finally:
            self._close(kind is None)

    def _close(self, whole: bool) -> None:
        fd, self.fd = self.fd, -1
        try:
            os.close(fd)
        except OSError as error:
            if whole:  # a network's file system may say here what it did not take
                raise self.failed("write", error) from error


class OutputFile(OpenOutput):
    """A file under way to ``path``. A context manager: left without ``commit``, nothing remains of it."""

    def __init__(
        self, path: str | os.PathLike, *, force: bool = False, inputs: Iterable[os.PathLike | str] = ()
    ) -> None:
        self.path, self.force = Path(path), force
        self.label = printable(path)
        self.target = check_target(path, force=force, inputs=inputs)
        self.synced = False
        # several machines may write in a folder, with equal process numbers
        number = f"{os.getpid()}{secrets.randbits(40):013d}"
        self.temporary = self.target.with_name(f"{_prefix(self.target)}{number}{SUFFIX}")
        self._lock, self._unsynced = threading.Lock(), 0
        # the thread that syncs while more is written, and what it does
        self._disk: ThreadPoolExecutor | None = None
        self._ahead: Future[None] | None = None
        _remove_stale(self.target)

    def __enter__(self) -> OutputFile:
        UNDO[self] = self._remove
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self.fd = os.open(self.temporary, flags, 0o666)
        except OSError as error:
            self._forget()
            raise FileError(
                f"{self.label}: cannot write in its folder: {error.strerror}: name an output elsewhere"
            ) from error
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._disk:
            self._disk.shutdown()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)
        if self in UNDO:
            self._remove()
            self._forget()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            if not fcntl and self.fd >= 0:  # Windows removes no file that is open
                os.close(self.fd)
            os.unlink(self.temporary)

    def _forget(self) -> None:
        UNDO.pop(self, None)

    def resize(self, n_bytes: int) -> None:
        """Make the file ``n_bytes`` long."""
        try:
            os.ftruncate(self.fd, n_bytes)
        except OSError as error:
            raise self.failed("write", error) from error

    def wrote(self, n_bytes: int) -> None:
        """Note that ``n_bytes`` more are written, by whomever: the disk works while the next ones are made."""
        with self._lock:
            self._unsynced += n_bytes
            idle = self._ahead is None or (self._ahead.done() and not self._ahead.exception())
            if self._unsynced >= _SYNC_BYTES and idle:
                from concurrent.futures import ThreadPoolExecutor

                self._disk = self._disk or ThreadPoolExecutor(1)
                self._unsynced, self._ahead = 0, self._disk.submit(os.fsync, self.fd)

    def sync(self) -> None:
        """Make the bytes durable: whatever a disk has to complain of, it says here."""
        try:
            if self._ahead:
                self._ahead.result()
            os.fsync(self.fd)
        except OSError as error:
            raise self.failed("finish", error) from error
        self.synced = True

    def commit(self) -> None:
        """Make the file durable and put it in place."""
        if not self.synced:
            self.sync()
        try:
            fd, self.fd = self.fd, -1
            os.close(fd)
            self._place()
        except FileExistsError as error:
            raise FileError(f"{self.label}: appeared while this ran: left as it is; replace it with --force") from error
        except OSError as error:
            raise self.failed("finish", error) from error
        try:
            _sync_folder(self.target.parent)
        except OSError as error:
            raise FileError(
                f"{self.label}: written whole, but its folder could not be synced: {error.strerror}: check "
                "the disk before a power cut"
            ) from error

    def _place(self) -> None:
        if not self.force and self._linked():
            with contextlib.suppress(OSError):
                os.unlink(self.temporary)
                self._forget()
            return
        os.replace(self.temporary, self.target)
        self._forget()

    def _linked(self) -> bool:
        """Whether the target is now a second name of the file. Unlike a rename, this never replaces what appeared
        meanwhile.
        """
        try:
            os.link(self.temporary, self.target)
            return True
        except FileExistsError:
            raise
        except (AttributeError, OSError):  # a system without hard links
            if os.path.lexists(self.target):
                raise FileExistsError(self.target) from None
            return False


def _prefix(target: Path) -> str:
    """How the temporary files of ``target`` begin; names may have 255 bytes, and shards differ at their ends."""
    return f".{os.fsdecode(os.fsencode(target.name)[-200:])}."


def _remove_stale(target: Path) -> None:
    """Remove the temporary files that killed runs left for this target; those of running processes are locked."""
    if not fcntl:
        return
    prefix = _prefix(target)
    for entry in _entries(target.parent):
        middle = entry.name[len(prefix) : -len(SUFFIX)]
        if (
            entry.name.startswith(prefix)
            and entry.name.endswith(SUFFIX)
            and middle.isdigit()
            and not entry.is_symlink()
        ):
            with contextlib.suppress(OSError), open(entry, "r+b") as stale:  # NFS locks what is open for writing
                fcntl.flock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry.unlink()


def _entries(folder: Path) -> list[Path]:
    """What lies in ``folder``; nothing where it may be written to, but not listed."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_bytes(
    path: str | os.PathLike, content: bytes, *, force: bool = False, inputs: Iterable[os.PathLike | str] = ()
) -> None:
    """Put ``content`` at ``path``, whole or not at all."""
    with OutputFile(path, force=force, inputs=inputs) as output:
        output.write_at(0, content)
        output.commit()


def copy_file(source: str | os.PathLike, path: str | os.PathLike, *, force: bool = False) -> None:
    """Put a copy of the file ``source`` at ``path``, whole or not at all."""
    fd = open_input(source)
    try:
        n_bytes = os.fstat(fd).st_size
        with OutputFile(path, force=force, inputs=[source]) as output:
            check_space(output.target, n_bytes)
            output.copy_at(0, fd, 0, n_bytes)
            output.commit()
    finally:
        os.close(fd)
