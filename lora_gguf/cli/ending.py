"""What a person is told when a merge ends: whether it is good, how to run the file, how to check it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_gguf.cli.terms import say, written
from lora_gguf.commands.merge import MergeReport
from lora_gguf.commands.next_steps import next_steps


def tell(report: MergeReport, base: str, adapters: Sequence[tuple[str, float]], *, whole: bool = True) -> None:
    """Say on stderr what was kept and written, and where that is a ``whole`` model what to do next."""
    lines = [report.verdict] if report.verdict else []
    lines += [written(path) for path in report.written]
    lines += next_steps(report, base, adapters) if whole else []
    say("\n".join(lines))
