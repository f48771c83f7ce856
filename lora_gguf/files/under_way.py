"""What a process has under way, and how it is undone when a signal ends it.

Whatever makes a file or a folder that must not outlive it says here how to remove it, for as long as it lasts.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

UNDO: dict[object, Callable[[], object]] = {}  # who has something under way -> what removes it


def undo_all() -> None:
    """Remove all that is under way, from wherever the process stands: it must end after that."""
    for undo in list(UNDO.values()):
        with contextlib.suppress(OSError):
            undo()


@contextlib.contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` if a signal ends the process inside."""
    UNDO[undo] = undo
    try:
        yield
    finally:
        del UNDO[undo]


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder, which goes with all that lies in it."""
    with (
        TemporaryDirectory(prefix="lora-gguf-") as folder,
        undone_by(lambda: shutil.rmtree(folder, ignore_errors=True)),
    ):
        yield Path(folder)
