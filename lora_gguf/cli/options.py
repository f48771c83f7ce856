"""The arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_gguf.cli.helping import gguf_files
from lora_gguf.cli.terms import ExpertAxis, ExpertLayout, Tied

BASE_HELP = (
    "The model: a path (of a split one any shard), or on the Hub OWNER/NAME:Q4_K_M or hf://OWNER/NAME/FILE.gguf."
)

BaseArgument = Annotated[str | None, typer.Argument(metavar="BASE.gguf", help=BASE_HELP, autocompletion=gguf_files)]
AdapterArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ADAPTER", help="A PEFT adapter's folder, its Hub id, or a GGUF adapter.", autocompletion=gguf_files
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        "--base",
        metavar="BASE.gguf",
        help="BASE, as llama.cpp's tools name it.",
        autocompletion=gguf_files,
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        "--lora-scaled",
        metavar="ADAPTER[:SCALE]",
        help="One more adapter; repeat.",
        autocompletion=gguf_files,
    ),
]
Scale = Annotated[
    float, typer.Option("--scale", metavar="X", help="Multiplies ADAPTER's own scale; not those of --lora.")
]
TiedHead = Annotated[Tied, typer.Option("--tied", help="An adapted head that the base shares with its embedding.")]
AllowUnused = Annotated[
    str | None,
    typer.Option(
        "--allow-unused", metavar="REGEX", help="Leave out adapter tensors that fit nowhere, if their name matches."
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Merge an adapter that the base already holds once more.")]
BaseConfig = Annotated[
    Path | None,
    typer.Option(
        "--base-config", metavar="DIR", help="The folder with the base's config.json, for what its GGUF does not say."
    ),
]
ExpertB = Annotated[
    ExpertLayout | None,
    typer.Option("--expert-b-layout", help="How lora_B of fused experts is laid out, where the adapter doesn't say."),
]
ExpertA = Annotated[
    ExpertAxis | None,
    typer.Option("--expert-a-axis", help="What lora_A of square fused experts reads, where nothing else tells."),
]
LayoutOf = Annotated[
    str | None,
    typer.Option("--layout-of", metavar="ARCH", help="Read a base of an unknown architecture as one of this."),
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", metavar="N", min=1, help="Default: all cores.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show bars, where stderr is a terminal.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print all that was measured.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the result, warnings and errors only.")]
QuietPath = Annotated[bool, typer.Option("-q", "--quiet", help="Print the output's path, warnings and errors only.")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Write a page with charts and tables of what happened."),
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the main charts, as PNG or SVG.")
]
ForcePictures = Annotated[bool, typer.Option("--force", help="Replace an existing report or plot.")]
