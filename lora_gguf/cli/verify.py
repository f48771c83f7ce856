"""The ``verify`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_gguf.cli.helping import gguf_files
from lora_gguf.cli.options import (
    BASE_HELP,
    AllowUnused,
    BaseConfig,
    ExpertA,
    ExpertB,
    ForcePictures,
    LayoutOf,
    PlotFile,
    Progress,
    Quiet,
    ReportFile,
    Threads,
    Verbose,
)
from lora_gguf.cli.terms import Tied, announce_first_run, draw, named_adapters, pictures, say
from lora_gguf.errors import printable
from lora_gguf.progress import bars
from lora_gguf.text import json_text


def verify(
    merged: Annotated[
        str,
        typer.Argument(
            metavar="MERGED.gguf", help="The file to judge; of a split one any shard.", autocompletion=gguf_files
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            "-m",
            "--model",
            metavar="BASE.gguf",
            help=f"What it was made of. {BASE_HELP}",
            autocompletion=gguf_files,
        ),
    ],
    lora: Annotated[
        list[str],
        typer.Option(
            "--lora", "--lora-scaled", metavar="ADAPTER[:SCALE]", help="An adapter that should be in it; repeat."
        ),
    ],
    tied: Annotated[
        Tied | None,
        typer.Option("--tied", help="What became of an adapted head that the base ties; default: what the file shows."),
    ] = None,
    allow_unused: AllowUnused = None,
    base_config: BaseConfig = None,
    expert_b_layout: ExpertB = None,
    expert_a_axis: ExpertA = None,
    layout_of: LayoutOf = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="The importance matrix that the merge used; default: that in the base's repository."
        ),
    ] = None,
    threads: Threads = None,
    report: ReportFile = None,
    plot: PlotFile = None,
    force: ForcePictures = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    progress: Progress = True,
) -> None:
    """Check that a merged file holds its base plus the adapters, within rounding; exit code 5 if not, with the cause,
    10 if it cannot be proved.

    lora-gguf verify merged.gguf --base model-Q4_K_M.gguf --lora user/my-adapter
    """
    from lora_gguf import api

    named = named_adapters(None, 1.0, lora)
    wanted = pictures(report, plot, force, [merged, base, *(name for name, _ in named)])
    wanted.check()
    if not quiet:
        announce_first_run()
    with bars("verifying", progress and not quiet) as (downloads, work):
        found = api.verify(
            merged,
            base,
            named,
            tied=tied and tied.value,
            allow_unused=allow_unused,
            expert_b_layout=expert_b_layout and expert_b_layout.value,
            expert_a_axis=expert_a_axis and expert_a_axis.value,
            layout_of=layout_of,
            base_config=base_config,
            imatrix=imatrix,
            threads=threads,
            progress=work,
            downloads=downloads,
        )
    from lora_gguf.cli import tables
    from lora_gguf.merging.loss import loss_text
    from lora_gguf.report.content import of_verify

    print(json_text(found.as_dict()) if as_json else tables.verify_table(found, verbose))
    for note in [] if quiet else found.notes:
        say(f"lora-gguf: note: {printable(note, 600)}")
    draw(wanted, lambda: of_verify(found, merged, base, named), quiet)
    if found.ok and not quiet:
        how = "the same merge gives the same bytes" if found.remade else "it is what rounding base + update gives"
        loss = found.expected_loss
        lost = "" if loss is None else f"; {loss_text(loss)} of the fine-tune's effect is lost"
        say(f"{found.label} is right: {how}{lost}")
    if found.error:
        raise found.error
