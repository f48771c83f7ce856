"""File systems of a test's own: mounted where no other process sees them, and gone with the process that holds them."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


class Mounts:
    """What ``script`` mounts, for the processes that ``command`` starts; a test sees it in ``seen(path)``."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def command(self, *arguments) -> list[str]:
        return [
            "nsenter",
            "-U",
            "-m",
            "--preserve-credentials",
            "-t",
            str(self.process.pid),
            "--",
            *map(str, arguments),
        ]

    def seen(self, path: Path) -> Path:
        return Path(f"/proc/{self.process.pid}/root{path.resolve()}")


@contextmanager
def mounted(script: str, *arguments):
    """The mounts that the shell's ``script`` makes of its arguments; skips the test where a user may make none."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("no unshare, no nsenter")
    command = ["unshare", "-Urm", "sh", "-c", f"set -e; {script}; echo mounted; cat", "sh", *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            if process.stdout.readline() != "mounted\n":
                pytest.skip(f"no mounts here: {process.communicate()[1].strip()}")
            yield Mounts(process)
        finally:
            process.kill()
