"""A progress bar on stderr: bytes, rate, time left, current tensor. Only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(verb: str, wanted: bool = True) -> Iterator[Callable[[int, int, str], None] | None]:
    """Yields a callback for (bytes done since the last call, bytes in all, what is being done), or None where no bar is due."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description:24.24}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(verb, total=None)

        def advance(n_bytes: int, n_total: int, what: str) -> None:
            progress.update(task, advance=n_bytes, total=n_total, description=f"{verb} {what}")

        yield advance
