"""The ``fetch`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_gguf.cli.options import Progress, Quiet
from lora_gguf.cli.terms import say
from lora_gguf.errors import UsageError, printable
from lora_gguf.progress import bar
from lora_gguf.text import json_text, size_text

if TYPE_CHECKING:
    from lora_gguf.hub.base_models import Bases

SHOWN = 3  # repositories in the list of bases


def fetch(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="The adapter's Hub id, such as user/adapter@main; for --base also its folder."
        ),
    ],
    base: Annotated[
        bool, typer.Option("--base", help="List the GGUFs of the model that it was trained on, with their sizes.")
    ] = False,
    quant: Annotated[
        str | None, typer.Option(metavar="QUANT", help="Download this one of the base's GGUFs, such as Q4_K_M.")
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(metavar="DIR", help="The adapter's folder in the repository.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            "--local-dir",
            metavar="PATH",
            help="Copy the files into this folder, a base also to this .gguf; default: the Hub cache.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files there that differ.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --base: print the list as JSON.")] = False,
    quiet: Quiet = False,
    progress: Progress = True,
) -> None:
    """Download an adapter from the Hugging Face Hub, or a GGUF of its base, and print where it lies.

    lora-gguf fetch user/my-adapter

    lora-gguf fetch user/my-adapter --base

    lora-gguf fetch user/my-adapter --quant Q4_K_M -o models
    """
    from lora_gguf import api

    if as_json and not base:
        raise UsageError("--json lists bases: give --base too")
    if base and not quant:
        _list(api.bases(adapter, subfolder=subfolder), as_json)
        return
    with bar("fetching", progress and not quiet) as work:
        if quant:
            found = api.fetch_base(adapter, quant, subfolder=subfolder, output=output, force=force, progress=work)
        else:
            found = api.fetch(adapter, subfolder=subfolder, output=output, force=force, progress=work)
    print(found)


def _list(bases: Bases, as_json: bool) -> None:
    model, names = bases.model, bases.found
    if as_json:
        print(json_text([{"reference": name, **vars(entry)} for name, entry in names.items()]))
        return
    repos = list(dict.fromkeys(entry.repo for entry in names.values()))
    for name, entry in names.items():
        if entry.repo in repos[:SHOWN]:
            print(f"{size_text(entry.n_bytes):>10}  {printable(name)}")
    others = f", and {len(repos) - SHOWN} more repositories, which --json lists" if len(repos) > SHOWN else ""
    found = f"{len(names)} GGUFs{others}" if names else "no GGUF"
    hint = (
        ": name one as BASE, or download it with --quant" if names else ": see its page, or convert it with llama.cpp"
    )
    say(f"{printable(model, 100)}: {found}{hint}")
