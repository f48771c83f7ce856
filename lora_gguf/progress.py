"""Progress bars on stderr: how much is done, how fast, how long yet, and at what the program works. Only on a terminal.

What works tells of its progress by ``Progress``: (done since the last call, in all, what is being done), in bytes but
where it says otherwise. Downloads tell by ``FileProgress``: (file, bytes so far, bytes in all).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[int, int, str], None]
FileProgress = Callable[[str, int, int], None]
WIDTH = 32  # of the words


@contextlib.contextmanager
def bar(verb: str, wanted: bool = True, *, of_bytes: bool = True) -> Iterator[Progress | None]:
    """Yields a ``Progress`` that shows and moves a bar, or None where none is due: it isn't wanted, or stderr is no
    terminal.

    ``NO_COLOR`` is obeyed, and a terminal that cannot move its cursor (``TERM=dumb``) gets none.
    """
    if not is_shown(wanted):
        yield None
        return
    display = _display(of_bytes)
    task = display.add_task(verb, total=None)

    def advance(n: int, n_all: int, what: str) -> None:
        display.start()
        display.update(
            task, advance=n, total=n_all or None, description=f"{verb} {shortened(what, WIDTH - len(verb) - 1)}"
        )

    try:
        yield advance
    finally:
        display.stop()


def is_shown(wanted: bool = True) -> bool:
    """Return whether a bar that is ``wanted`` can be shown."""
    return wanted and sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _display(of_bytes: bool):
    """Rich's bar, which shows itself when it is started and goes when it is stopped."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Display

    amounts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    words = TextColumn(f"{{task.description:{WIDTH}.{WIDTH}}}", markup=False)
    return Display(words, BarColumn(), *amounts, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def shortened(text: str, length: int) -> str:
    """``text`` in ``length`` characters, its end kept: that is where names differ."""
    return text if len(text) <= length else "…" + text[1 - length :]


@contextlib.contextmanager
def bars(verb: str, wanted: bool = True, *, of_bytes: bool = True) -> Iterator[tuple[Progress | None, Progress | None]]:
    """Yield a ``Progress`` of the downloads and one of the work, whose bar takes the place of theirs; None where no bar
    is due.
    """
    with contextlib.ExitStack() as fetching, bar(verb, wanted, of_bytes=of_bytes) as work:
        downloads = fetching.enter_context(bar("fetching", wanted))

        def advance(n: int, n_all: int, what: str) -> None:
            fetching.close()
            if work:
                work(n, n_all, what)

        yield downloads, advance if work else None


def by_file(progress: Progress | None) -> FileProgress | None:
    """A ``FileProgress`` that tells ``progress``, all files so far as one; None for None."""
    if progress is None:
        return None
    files: dict[str, tuple[int, int]] = {}

    def advance(name: str, n_so_far: int, n_all: int) -> None:
        before = files.get(name, (0, 0))[0]
        files[name] = (n_so_far, n_all)
        progress(n_so_far - before, sum(size for _, size in files.values()), name)

    return advance
