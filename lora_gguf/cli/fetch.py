"""The ``fetch`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def fetch(
    repo: Annotated[str, typer.Argument(metavar="REPO[@REVISION]", help="The adapter's Hub id, such as user/adapter@main.")],
    subfolder: Annotated[Optional[str], typer.Option(help="The adapter's folder in the repository.")] = None,
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Copy the files here; default: the Hub cache.")] = None,
) -> None:
    """Download a PEFT adapter from the Hugging Face Hub and print where it lies."""
    from lora_gguf.commands.fetch import fetch as fetch_adapter

    print(fetch_adapter(repo, subfolder=subfolder, output=output))
