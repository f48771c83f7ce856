"""The ``verify`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_gguf.cli.options import (
    BASE_HELP,
    BaseConfig,
    ExpertB,
    ForcePictures,
    PlotFile,
    Progress,
    Quiet,
    ReportFile,
    Threads,
)
from lora_gguf.cli.terms import adapters_of, draw, pictures, say
from lora_gguf.errors import printable
from lora_gguf.progress import bar, download_bar
from lora_gguf.text import json_text


def verify(
    merged: Annotated[str, typer.Argument(metavar="MERGED.gguf", help="The file to judge; of a split one any shard.")],
    base: Annotated[
        str, typer.Option("--base", "-m", "--model", metavar="BASE.gguf", help=f"What it was made of. {BASE_HELP}")
    ],
    lora: Annotated[
        list[str],
        typer.Option(
            "--lora", "--lora-scaled", metavar="ADAPTER[:SCALE]", help="An adapter that should be in it; repeat."
        ),
    ],
    base_config: BaseConfig = None,
    expert_b_layout: ExpertB = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The importance matrix that the merge used, if it did.")
    ] = None,
    threads: Threads = None,
    report: ReportFile = None,
    plot: PlotFile = None,
    force: ForcePictures = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Quiet = False,
    progress: Progress = True,
) -> None:
    """Check that a merged file holds its base plus the adapters, within rounding; exit code 5 if not, with the cause.

    lora-gguf verify merged.gguf --base model-Q4_K_M.gguf --lora user/my-adapter
    """
    from lora_gguf.hub.inputs import local_adapters, local_model

    with download_bar(progress and not quiet) as files:
        merged_path, base_path = local_model(merged, files), local_model(base, files)
    wanted = pictures(report, plot, force, [merged_path, base_path, *(name for name, _ in adapters_of(lora))])
    wanted.check()
    with download_bar(progress and not quiet) as files:
        adapters = local_adapters(adapters_of(lora), files)
    from lora_gguf.checks.findings import as_error
    from lora_gguf.cli import tables
    from lora_gguf.commands.verify import verify as verify_merge
    from lora_gguf.files.imatrix import read_imatrix
    from lora_gguf.report.content import of_verify

    with bar("verifying", progress and not quiet) as advance:
        measured = read_imatrix(imatrix) if imatrix else None
        found = verify_merge(
            merged_path,
            base_path,
            adapters,
            expert_b_layout=expert_b_layout and expert_b_layout.value,
            base_config=base_config,
            imatrix=measured,
            threads=threads,
            progress=advance,
        )
    print(json_text(found.as_dict()) if as_json else tables.verify_table(found))
    for note in [] if quiet else found.notes:
        say(f"lora-gguf: note: {printable(note, 600)}")
    draw(wanted, lambda: of_verify(found, merged_path, base_path, adapters), quiet)
    if found.ok and not quiet:
        say(f"{found.label} is right: it holds the base and what is expected of the adapters after rounding")
    if not found.ok:
        raise as_error(found.label, found.findings)
