"""A real Dask cluster: a scheduler and workers, each a process of its own, perhaps in a network of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.common import ROOT

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    # a client takes a scheduler that is gone for lost after so long
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s",
}


class Cluster:
    """A scheduler and workers of one thread; ``within`` begins their commands, to run them elsewhere."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder, self.host = folder, host
        self.scheduler: subprocess.Popen | None = None
        self.workers: list[subprocess.Popen] = []
        self.address = ""

    def start(self, n_workers: int, within: Sequence[Sequence[str]] = ((), ())) -> None:
        """Start the scheduler and its workers, and wait until they know each other."""
        arguments = ["--host", self.host, "--port", "0", "--no-dashboard", "--dashboard-address", ":0"]
        self.scheduler, log = self._process("scheduler", within[0], *arguments)
        self.address = awaited(log, r"Scheduler at:\s+(tcp://\S+)")
        for _ in range(n_workers):
            self.add_worker(within[1])

    def add_worker(self, within: Sequence[str] = ()) -> None:
        more = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(self.folder)]
        process, log = self._process("worker", within, self.address, *more)
        self.workers.append(process)
        awaited(log, r"(Registered to)")

    def _process(self, what: str, within: Sequence[str], *arguments: str) -> tuple[subprocess.Popen, Path]:
        log = self.folder / f"{what}{len(self.workers)}.log"
        command = [*within, sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=self.folder, env=os.environ | ENVIRONMENT
            )
        return process, log

    def stop(self) -> None:
        for process in [*self.workers, *filter(None, [self.scheduler])]:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait()


def awaited(log: Path, pattern: str, seconds: float = 60) -> str:
    """What ``pattern`` finds in a log, once it is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.05)
    raise TimeoutError(log.read_text(errors="replace")[-2000:])


@contextlib.contextmanager
def cluster(folder: Path, n_workers: int, **options) -> Iterator[Cluster]:
    """A cluster that lives as long as the block."""
    folder.mkdir(exist_ok=True)
    found = Cluster(folder)
    try:
        found.start(n_workers, **options)
        yield found
    finally:
        found.stop()
