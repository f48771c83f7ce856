"""The ``convert`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_gguf.cli.helping import gguf_files
from lora_gguf.cli.options import BASE_HELP, AllowUnused, ExpertA, ExpertB, Force, LayoutOf, Progress, QuietPath
from lora_gguf.cli.terms import Form, OutType, say_written, warn
from lora_gguf.progress import bars
from lora_gguf.text import json_text


def convert(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A PEFT adapter's folder or Hub id.", autocompletion=gguf_files)
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            "-m",
            "--model",
            metavar="BASE.gguf",
            help=f"The best source of names and shapes. {BASE_HELP}",
            autocompletion=gguf_files,
        ),
    ] = None,
    to: Annotated[
        Form, typer.Option("--to", help="peft: the way back, from a GGUF adapter to a PEFT folder.")
    ] = Form.gguf,
    base_config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Without a GGUF: the folder with the base's config.json.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--outfile", "--output", metavar="PATH", help="Default: ADAPTER.gguf in this folder."),
    ] = None,
    outtype: Annotated[
        OutType, typer.Option(help="The type of the tensors; auto is the smallest exact one.")
    ] = OutType.auto,
    rank: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Approximate DoRA, OFT and the like at this rank.")
    ] = None,
    allow_unused: AllowUnused = None,
    expert_b_layout: ExpertB = None,
    expert_a_axis: ExpertA = None,
    layout_of: LayoutOf = None,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what became of each adapter tensor as JSON.")] = False,
    quiet: QuietPath = False,
    progress: Progress = True,
) -> None:
    """Turn a PEFT adapter into a GGUF adapter for llama.cpp's --lora.

    lora-gguf convert user/my-adapter --base model-Q4_K_M.gguf -o my-adapter.gguf
    lora-gguf convert my-adapter.gguf --to peft --base model-Q4_K_M.gguf -o my-adapter
    """
    from lora_gguf import api
    from lora_gguf.adapters.adapter import adapter_name

    out = output or Path(f"{adapter_name(adapter)}{'-peft' if to is Form.peft else '.gguf'}")
    with bars("converting", progress and not quiet) as (downloads, work):
        placement = api.convert(
            adapter,
            out,
            base,
            to=to.value,
            base_config=base_config,
            outtype=outtype.value,
            force=force,
            allow_unused=allow_unused,
            expert_b_layout=expert_b_layout and expert_b_layout.value,
            expert_a_axis=expert_a_axis and expert_a_axis.value,
            layout_of=layout_of,
            rank=rank,
            progress=work,
            downloads=downloads,
        )
    warn(placement.warnings)
    if as_json:
        print(json_text(placement.as_dict()))
    else:
        print(out if quiet else "\n".join(placement.summary()))
    if not quiet:
        say_written(out, f": {placement}")
