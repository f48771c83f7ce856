"""The ``push`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_gguf.cli.helping import gguf_files
from lora_gguf.cli.options import Progress, Quiet
from lora_gguf.cli.terms import say
from lora_gguf.text import json_text


def push(
    merged: Annotated[
        str,
        typer.Argument(metavar="MERGED.gguf", help="The file; of a split one any shard.", autocompletion=gguf_files),
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was pushed as JSON.")] = False,
    quiet: Quiet = False,
    progress: Progress = True,
) -> None:
    """Put a merged file on the Hugging Face Hub, with a Modelfile and a model card that says how it was made.

    Run it again after it was stopped: what the Hub has already is not sent twice.

    lora-gguf push merged.gguf user/my-model
    """
    from lora_gguf import api
    from lora_gguf.progress import is_shown

    found = api.push(merged, repo, public=public, bars=is_shown(progress and not quiet))
    print(json_text(found.as_dict()) if as_json else found.url)
    if not quiet:
        say_pushed(found.repo_id, found.own_card)


def say_pushed(repo_id: str, own_card: bool) -> None:
    """Tell how to run what was pushed."""
    if own_card:
        say("the repository's own README.md was left as it is")
    say(f"run it: llama-cli -hf {repo_id}, or ollama run hf.co/{repo_id}")
