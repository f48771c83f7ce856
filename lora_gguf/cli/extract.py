"""The ``extract`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_gguf.cli.helping import gguf_files
from lora_gguf.cli.options import BASE_HELP, Force, Progress, QuietPath, Threads
from lora_gguf.cli.terms import OutType, say_written, warn
from lora_gguf.progress import bars
from lora_gguf.text import json_text


def extract(
    base: Annotated[
        str, typer.Argument(metavar="BASE.gguf", help=f"The model before. {BASE_HELP}", autocompletion=gguf_files)
    ],
    tuned: Annotated[
        str,
        typer.Argument(
            metavar="TUNED.gguf", help="The model after, of the same architecture.", autocompletion=gguf_files
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--outfile", "--output", metavar="PATH", help="The adapter to write.")],
    rank: Annotated[
        str, typer.Option(metavar="N|auto", help="Of each tensor's update; auto keeps 99% of its energy.")
    ] = "32",
    outtype: Annotated[OutType, typer.Option(help="The type of the tensors.")] = OutType.f16,
    threads: Threads = None,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the energy kept of each tensor as JSON.")] = False,
    quiet: QuietPath = False,
    progress: Progress = True,
) -> None:
    """Make the adapter that turns one GGUF into another, as nearly as its rank can (truncated SVD).

    lora-gguf extract base.gguf tuned.gguf --rank 32 -o adapter.gguf
    """
    from lora_gguf import api

    with bars("extracting", progress and not quiet) as (downloads, work):
        found = api.extract(
            base,
            tuned,
            output,
            int(rank) if rank.isdecimal() else rank,
            outtype=outtype.value,
            force=force,
            threads=threads,
            progress=work,
            downloads=downloads,
        )
    from lora_gguf.cli import tables

    if as_json:
        print(json_text(found.as_dict()))
    else:
        print(output if quiet else tables.extraction_table(found))
    warn(found.warnings)
    if not quiet:
        say_written(output)
