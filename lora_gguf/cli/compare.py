"""The ``compare`` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_gguf.cli.helping import gguf_files
from lora_gguf.cli.options import ForcePictures, Lora, Progress, Quiet, ReportFile, Scale, Threads
from lora_gguf.cli.terms import draw, named_adapters, pictures, say
from lora_gguf.errors import MismatchError, UsageError
from lora_gguf.progress import bars
from lora_gguf.text import json_text

if TYPE_CHECKING:
    from lora_gguf.checks.compared import CompareReport

LABELS = {"base": "the base", "adapter": "the base with the adapter at run time", "merged": "the merged file"}


def compare(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE.gguf", help="The model before the merge, here or on the Hub.", autocompletion=gguf_files
        ),
    ],
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="A PEFT adapter's folder, its Hub id, or a GGUF adapter.", autocompletion=gguf_files
        ),
    ],
    merged: Annotated[
        str | None,
        typer.Argument(
            metavar="MERGED.gguf", help="The merged file; after --lora the second name.", autocompletion=gguf_files
        ),
    ] = None,
    lora: Lora = None,
    scale: Scale = 1.0,
    prompt: Annotated[
        list[str] | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="What to ask; repeat. Default: five general questions."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="A text file with a prompt on each line.")
    ] = None,
    n_predict: Annotated[
        int, typer.Option("-n", "--n-predict", metavar="N", min=1, help="The most tokens of an answer.")
    ] = 32,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, without the model's chat template.")
    ] = False,
    threads: Threads = None,
    report: ReportFile = None,
    force: ForcePictures = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Quiet = False,
    progress: Progress = True,
) -> None:
    """Ask llama.cpp the same with base, adapter at run time, and merged file; exit code 5 if the merged file differs.

    It needs the package xllamacpp, which is llama.cpp itself. At each word of the adapter's own answers it measures
    how often the merged file holds the same next token likeliest, how much else it says (KL), and how strong the
    adapter's effect on the base is in it (100%: as it should be). No two right computations agree at every token:
    the adapter itself, asked again in another order, shows how near the merged file can come.

    lora-gguf compare model-Q4_K_M.gguf user/my-adapter merged.gguf --prompt 'How do I make tea?'
    """
    if merged is None:
        if not lora:
            raise UsageError("no merged file: name base, adapter and merged file in this order")
        adapter, merged = "", adapter
    named = named_adapters(adapter or None, scale, lora)
    from lora_gguf import api
    from lora_gguf.checks.prompts import read_prompts

    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    wanted = pictures(report, None, force, [base, merged, *(name for name, _ in named)])
    wanted.check()
    with bars("asking", progress and not quiet, of_bytes=False) as (downloads, work):
        found = api.compare(
            base,
            named,
            merged,
            texts,
            n_predict=n_predict,
            raw=raw,
            threads=threads,
            progress=work,
            downloads=downloads,
        )
    from lora_gguf.report.content import of_compare

    print(json_text(found.as_dict()) if as_json else as_text(found))
    draw(wanted, lambda: of_compare(found, base, named, merged), quiet)
    if not found.ok:
        raise MismatchError(
            f"{found.verdict}: see what it holds: lora-gguf verify {merged} --base {base} --lora {named[0][0]}"
        )
    if not quiet:
        say(found.verdict)


def as_text(report: CompareReport) -> str:
    """Return the answers side by side, then how near they are to the adapter's."""
    from lora_gguf.text import text_table

    parts = []
    for said in report.spoken:
        answers = [f"{label}:\n  " + said.answers[name].replace("\n", "\n  ") for name, label in LABELS.items()]
        parts.append("\n".join([f"> {said.prompt}", *answers]))
    rows = [
        (label, f"{part.same:.1%}", f"{part.agreement:.1%}", f"{part.kl:.4f}", f"{part.strength:.0%}")
        for label, part in (
            (LABELS["base"], report.base),
            ("the adapter, asked again", report.again),
            (LABELS["merged"], report.merged),
        )
    ]
    head = (f"of {report.merged.n_tokens} tokens", "same next", "or as likely", "KL from adapter", "its effect")
    parts.append(text_table(head, rows))
    return "\n\n".join(parts)
