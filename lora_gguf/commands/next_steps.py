"""What to do with a merged file: run it, and check it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_gguf.commands.merge import MergeReport
from lora_gguf.errors import printable

MODELFILE = ".Modelfile"
TOWER = "clip"  # the architecture of an mmproj


def next_steps(
    report: MergeReport, base: str, adapters: Sequence[tuple[str | os.PathLike[str], float]]
) -> Iterator[str]:
    """Yield how to run what was written, and how to check it where enough is kept for a proof."""
    models = [path for path in report.written if path.suffix != MODELFILE]
    if not models:
        return
    yield f"run it:   {_run(report, models[0])}"
    recipe = next((path for path in report.written if path.suffix == MODELFILE), None)
    if recipe:
        yield f"          ollama create {_quoted(models[0].stem.lower())} -f {_quoted(recipe)}"
    if any(part.is_faint for part in report.retention.values()):
        return  # verify could only say that it cannot be proved
    loras = " ".join(f"--lora {_quoted(name if scale == 1 else f'{name}:{scale:g}')}" for name, scale in adapters)
    yield f"check it: lora-gguf verify {_quoted(models[0])} --base {_quoted(base)} {loras}"


def _run(report: MergeReport, model: Path) -> str:
    if report.architecture == TOWER:
        return f"llama-mtmd-cli -m MODEL.gguf --mmproj {_quoted(model)} --image IMAGE"
    return f"llama-cli -m {_quoted(model)}"


def _quoted(text: str | os.PathLike[str]) -> str:
    """Return a path as a shell takes it, and no program for an option."""
    shown = printable(text)
    return shlex.quote(f"./{shown}" if shown.startswith("-") else shown)
