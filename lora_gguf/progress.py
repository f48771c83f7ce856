"""Progress on stderr: how much is done, how fast, how long yet, and at what the program works.

On a terminal it is a bar, elsewhere a line now and then.

What works tells of its progress by ``Progress``: (done since the last call, in all, what is being done), in bytes but
where it says otherwise. Downloads tell by ``FileProgress``: (file, bytes so far, bytes in all).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Display

Progress = Callable[[int, int, str], None]
FileProgress = Callable[[str, int, int], None]
WIDTH = 32  # of the words
WIDE = 110  # columns that a bar with all its figures takes
NARROW = 24  # columns of what stands behind the words where there are fewer
NO_BAR = "\r\x1b[K\x1b[?25h"  # takes a bar off the line, and shows the cursor again
SILENT = 5.0, 30.0  # seconds until the first line where there is no terminal, and between the others


class _Bar:
    """A bar that shows itself with its first call, or when told to, and goes when it is hidden."""

    def __init__(self, verb: str, of_bytes: bool):
        self.verb, self.width, self._display = verb, *_display(of_bytes)
        self._task = self._display.add_task(verb, total=None)

    def show(self) -> None:
        self._display.start()

    def hide(self) -> None:
        self._display.stop()

    def __call__(self, n: int, n_all: int, what: str) -> None:
        self.show()
        words = f"{self.verb} {shortened(what, self.width - len(self.verb) - 1)}"
        if self.width < WIDTH and "…" in words:  # there is no room for both
            words = shortened(what, self.width)
        self._display.update(self._task, advance=n, total=n_all or None, description=words)


class _Lines:
    """A line on stderr where work lasts, then one every half minute: for logs, and terminals that move no cursor."""

    def __init__(self, verb: str):
        self.verb, self._done, self._all, self._what = verb, 0, 0, ""
        self._hidden = threading.Event()
        self._teller: threading.Thread | None = None

    def show(self) -> None:
        if self._teller is None:
            self._teller = threading.Thread(target=self._tell, daemon=True)
            with contextlib.suppress(RuntimeError):  # there are no more threads: then there are no lines
                self._teller.start()

    def hide(self) -> None:
        self._hidden.set()

    def __call__(self, n: int, n_all: int, what: str) -> None:
        self.show()
        self._done, self._all, self._what = self._done + n, n_all, what

    def _tell(self) -> None:
        pause, later = SILENT
        while not self._hidden.wait(pause):
            share = f"{min(1, self._done / self._all):.0%}, {self._what}" if self._all else "…"
            with contextlib.suppress(OSError, ValueError):
                print(f"  {self.verb}: {share}", file=sys.stderr, flush=True)
            pause = later


@contextlib.contextmanager
def bar(verb: str, wanted: bool = True, *, of_bytes: bool = True) -> Iterator[Progress | None]:
    """Yield a ``Progress`` that shows and moves a bar, or None where none is wanted.

    ``NO_COLOR`` is obeyed; where stderr is no terminal, or one that cannot move its cursor (``TERM=dumb``), long work
    tells of itself in lines.
    """
    if not wanted:
        yield None
        return
    shown = _Bar(verb, of_bytes) if is_shown() else _Lines(verb)
    try:
        yield shown
    finally:
        shown.hide()


def is_shown(wanted: bool = True) -> bool:
    """Return whether a bar that is ``wanted`` can be shown."""
    return wanted and sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _display(of_bytes: bool) -> tuple[int, Display]:
    """Return the width of the words, and rich's bar, as the terminal has room for."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Display

    console = Console(stderr=True)
    if console.width >= WIDE:
        amounts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
        width, columns = WIDTH, (BarColumn(), *amounts, TimeRemainingColumn())
    else:
        width = max(8, min(WIDTH, console.width - NARROW))
        columns = (BarColumn(bar_width=8), TaskProgressColumn(), TimeRemainingColumn(compact=True))
    words = TextColumn(f"{{task.description:{width}.{width}}}", markup=False)
    return width, Display(words, *columns, console=console, transient=True)


def shortened(text: str, length: int) -> str:
    """Return a name in ``length`` characters: without its ``.weight``, then without some of its middle."""
    text = text.removesuffix(".weight")
    if len(text) <= length:
        return text
    n_first = (length - 1) // 2
    return f"{text[:n_first]}…{text[n_first + 1 - length :]}"


@contextlib.contextmanager
def bars(verb: str, wanted: bool = True, *, of_bytes: bool = True) -> Iterator[tuple[Progress | None, Progress | None]]:
    """Yield a ``Progress`` of the downloads and one of the work, which is shown at once and gives place to theirs; None
    where no bar is due.
    """
    with bar(verb, wanted, of_bytes=of_bytes) as work, bar("fetching", wanted) as fetching:
        if not (isinstance(work, _Bar | _Lines) and isinstance(fetching, _Bar | _Lines)):
            yield None, None
            return
        work.show()

        def fetched(n: int, n_all: int, what: str) -> None:
            work.hide()
            fetching(n, n_all, what)

        def worked(n: int, n_all: int, what: str) -> None:
            fetching.hide()
            work(n, n_all, what)

        yield fetched, worked


def by_file(progress: Progress | None) -> FileProgress | None:
    """Return a ``FileProgress`` that tells ``progress``, all files so far as one; None for None."""
    if progress is None:
        return None
    files: dict[str, tuple[int, int]] = {}

    def advance(name: str, n_so_far: int, n_all: int) -> None:
        before = files.get(name, (0, 0))[0]
        files[name] = (n_so_far, n_all)
        progress(n_so_far - before, sum(size for _, size in files.values()), name)

    return advance
