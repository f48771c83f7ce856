"""What a person is told when a merge ends: whether it is good, how to run the file, how to check it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lora_gguf.cli.terms import say, written
from lora_gguf.commands.merge import MergeReport
from lora_gguf.commands.next_steps import next_steps
from lora_gguf.errors import printable


def left(path: str | os.PathLike) -> str:
    """Return a line that tells of an output that was there."""
    return f"{printable(path)}: the same merge made it before: left as it is"


def tell(report: MergeReport, base: str, adapters: Sequence[tuple[str, float]], *, whole: bool = True) -> None:
    """Say on stderr what was kept and written, and where that is a ``whole`` model what to do next."""
    lines = [report.verdict] if report.verdict else []
    made = left if report.skipped else written
    lines += [made(path) for path in report.written]
    lines += next_steps(report, base, adapters) if whole else []
    say("\n".join(lines))
