"""The ``init-pipeline`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_gguf.cli.terms import say
from lora_gguf.errors import printable


def init_pipeline(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder; made where it does not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a Makefile and pipeline.mk that are there.")] = False,
) -> None:
    """Write a Makefile that merges many adapters into many quantizations: fill in two lines of it, then run make.

    lora-gguf init-pipeline my-models
    """
    from lora_gguf.commands.init_pipeline import init_pipeline as write_pipeline

    for path in write_pipeline(folder, force=force):
        print(path)
    say(f"set ADAPTERS and QUANTS in {printable(folder / 'Makefile')}, then: make -C {printable(folder)} -n")
