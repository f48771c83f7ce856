"""The ``merge`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_gguf.cli.cluster import executor_at
from lora_gguf.cli.helping import mixes, types, words
from lora_gguf.cli.options import (
    AdapterArgument,
    Again,
    AllowUnused,
    BaseArgument,
    BaseConfig,
    ExpertA,
    ExpertB,
    Force,
    LayoutOf,
    Lora,
    Model,
    PlotFile,
    Progress,
    QuietPath,
    ReportFile,
    Scale,
    Threads,
    TiedHead,
    Verbose,
)
from lora_gguf.cli.push import say_pushed
from lora_gguf.cli.terms import (
    Rounding,
    Tied,
    announce_first_run,
    base_and_adapter,
    draw,
    mmproj_command,
    n_bytes,
    named_adapters,
    pictures,
    say,
    warn,
)
from lora_gguf.errors import UsageError, printable
from lora_gguf.progress import bars, is_shown
from lora_gguf.text import json_text


def merge(
    base: BaseArgument = None,
    adapter: AdapterArgument = None,
    lora: Lora = None,
    model: Model = None,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--outfile",
            "--output",
            metavar="PATH",
            help="The file to write; in a folder it is called BASE-SIZE-ADAPTER-TYPE.gguf.",
        ),
    ] = ".",
    scale: Scale = 1.0,
    rounding: Annotated[Rounding, typer.Option(help="How weights get back on a grid.")] = Rounding.auto,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**64 - 1, help="Of the dither; the same seed gives the same bytes.")
    ] = 0,
    type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="The type of the adapted tensors, such as Q8_0; default: the base's.",
            autocompletion=words(types),
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="MIX",
            help="Quantize an F16, BF16 or F32 base on the way, as llama-quantize: Q4_K_M.",
            autocompletion=words(mixes),
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="llama.cpp's importance matrix: which columns matter to auto; default: that of the base's repository.",
        ),
    ] = None,
    tied: TiedHead = Tied.separate,
    allow_unused: AllowUnused = None,
    again: Again = False,
    base_config: BaseConfig = None,
    expert_b_layout: ExpertB = None,
    expert_a_axis: ExpertA = None,
    layout_of: LayoutOf = None,
    mmproj: Annotated[
        str | None,
        typer.Option(
            metavar="MMPROJ",
            help="The model's mmproj: the adapter's vision and audio part goes into it, written as mmproj-NAME.gguf.",
        ),
    ] = None,
    keep_split: Annotated[
        bool, typer.Option("--keep-split", help="Write the base's shards; default: one file.")
    ] = False,
    split_max_size: Annotated[
        str | None, typer.Option(metavar="N(M|G)", help="Write shards of at most this size.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="N/COUNT", help="Write only this shard, for parallel jobs.")
    ] = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Write a Modelfile for Ollama beside the merged file.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Then put it on the Hub, as lora-gguf push does: private.")
    ] = None,
    max_growth: Annotated[
        str, typer.Option(metavar="N%", help="Give the tensors that gain most a larger type, up to this growth.")
    ] = "0%",
    min_retention: Annotated[
        float, typer.Option(metavar="SHARE", help="Fail, and write nothing, where less of the adapter is kept.")
    ] = 0.0,
    threads: Threads = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="N(M|G)", help="What rows in work, and the adapter's part of them, may take; default: 40M a thread."
        ),
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT",
            help="The scheduler of a Dask cluster that does the work; its workers see the files under the same paths.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    force: Force = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave an output that the same merge made before.")
    ] = False,
    report: ReportFile = None,
    plot: PlotFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
    quiet: QuietPath = False,
    progress: Progress = True,
) -> None:
    """Add adapters to a quantized model and write one standalone GGUF.

    lora-gguf merge model-Q4_K_M.gguf user/my-adapter -o merged.gguf

    lora-gguf merge mmproj.gguf user/my-adapter -o mmproj-merged.gguf
    """
    from lora_gguf import api
    from lora_gguf.hub.uploads import make_repo

    source, adapter = base_and_adapter(base, adapter, model)
    named = named_adapters(adapter, scale, lora)
    wanted = pictures(report, plot, force, [source, *filter(None, [mmproj]), *(name for name, _ in named)])
    wanted.check([] if dry_run else [output])
    if push and (dry_run or shard):
        raise UsageError(
            f"--push {printable(push)}: {'--dry-run' if dry_run else '--shard'} writes no whole file: leave one out"
        )
    if push:
        make_repo(push)
    if not quiet:
        announce_first_run()
    with executor_at(dask) as executor, bars("merging", progress and not quiet) as (downloads, work):
        merged = api.merge(
            source,
            named,
            None if dry_run else output,
            rounding=rounding.value,
            seed=seed,
            type=type,
            quantize=quantize,
            imatrix=imatrix,
            tied=tied.value,
            allow_unused=allow_unused,
            again=again,
            expert_b_layout=expert_b_layout and expert_b_layout.value,
            expert_a_axis=expert_a_axis and expert_a_axis.value,
            layout_of=layout_of,
            base_config=base_config,
            mmproj=mmproj,
            max_growth=max_growth,
            min_retention=min_retention,
            max_bytes=n_bytes("--split-max-size", split_max_size),
            keep_split=keep_split,
            shard=shard,
            modelfile=modelfile,
            threads=threads,
            memory=n_bytes("--memory", memory),
            executor=executor,
            force=force,
            skip_existing=skip_existing,
            progress=work,
            downloads=downloads,
        )
    from lora_gguf.cli import tables
    from lora_gguf.cli.ending import tell
    from lora_gguf.report.content import of_merge

    warn(merged.warnings)
    if as_json:
        print(json_text(merged.as_dict()))
    elif quiet:
        for path in merged.written:
            print(path)
    else:
        print(tables.retention_table(merged, verbose))
    if merged.waiting and not quiet:
        say(f"for the part that waits for the model's mmproj: {mmproj_command(named)}")
    if dry_run and not quiet:
        tensors = sum(tensor.target.n_bytes for tensor in merged.tensors)
        say(
            f"nothing was written: the tensors would take {tensors / 1e6:.0f} MB; what would be kept of the "
            "adapter, lora-gguf doctor tells"
        )
    elif not quiet:
        tell(merged, source, named, whole=shard is None)
    if push:
        told = (None, None) if merged.skipped else (merged.whole.kept, merged.expected_loss)
        shown = is_shown(progress and not quiet)
        pushed = api.push(merged.written[0], push, kept=told[0], expected_loss=told[1], bars=shown)
        say(f"pushed to {pushed.url}")
        if not quiet:
            say_pushed(push, pushed.own_card)
    draw(wanted, lambda: of_merge(merged, source, named, rounding.value), quiet)
