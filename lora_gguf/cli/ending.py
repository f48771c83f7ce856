"""What a person is told when a merge ends: whether it is good, how to run the file, how to check it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_gguf.cli.terms import say, say_written
from lora_gguf.commands.merge import MergeReport
from lora_gguf.commands.next_steps import next_steps


def tell(report: MergeReport, base: str, adapters: Sequence[tuple[str, float]], *, whole: bool = True) -> None:
    """Say on stderr what was kept and written, and where that is a ``whole`` model what to do next."""
    if report.verdict:
        say(report.verdict)
    for path in report.written:
        say_written(path)
    for line in next_steps(report, base, adapters) if whole else ():
        say(line)
