"""The command line: parse, call, print. ``main`` is the only place that catches."""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_gguf import __version__
from lora_gguf.errors import LoraGgufError, UsageError, printable
from lora_gguf.output import remove_live
from lora_gguf.progress import bar

_ClickUsageError = typer.BadParameter.__base__  # typer brings its own click

app = typer.Typer(
    name="lora-gguf",
    help="Convert LoRA adapters to GGUF, and merge them into quantized GGUF models without losing the fine-tune.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=True,
)


class Rounding(str, Enum):
    auto = "auto"
    dither = "dither"
    nearest = "nearest"
    fresh = "fresh"


class Tied(str, Enum):
    separate = "separate"
    shared = "shared"
    refuse = "refuse"


class ExpertLayout(str, Enum):
    rank_major = "rank-major"
    expert_major = "expert-major"


class OutType(str, Enum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lora-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def fetch(
    repo: Annotated[str, typer.Argument(metavar="REPO[@REVISION]", help="The adapter's Hub id, such as user/adapter@main.")],
    subfolder: Annotated[Optional[str], typer.Option(help="The adapter's folder in the repository.")] = None,
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Copy the files here; default: the Hub cache.")] = None,
) -> None:
    """Download a PEFT adapter from the Hugging Face Hub and print where it lies."""
    from lora_gguf.fetch import fetch as fetch_adapter

    print(fetch_adapter(repo, subfolder=subfolder, output=output))


@app.command()
def convert(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter's folder or Hub id.")],
    base: Annotated[Optional[Path], typer.Option("--base", help="The base model's GGUF: the best source of names and shapes.")] = None,
    base_config: Annotated[Optional[Path], typer.Option(help="Without a GGUF: the folder with the base's config.json.")] = None,
    output: Annotated[Optional[Path], typer.Option("-o", "--outfile", help="Default: ADAPTER.gguf in this folder.")] = None,
    outtype: Annotated[OutType, typer.Option(help="The type of the tensors; f32 is exact.")] = OutType.f32,
    rank: Annotated[Optional[int], typer.Option(min=1, help="Approximate DoRA, OFT and the like at this rank.")] = None,
    allow_unused: Annotated[
        Optional[str], typer.Option(metavar="REGEX", help="Leave out adapter tensors that fit nowhere, if their name matches.")
    ] = None,
    expert_b_layout: Annotated[
        Optional[ExpertLayout], typer.Option(help="How lora_B of fused experts is laid out, where the adapter doesn't say.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what became of each adapter tensor as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Turn a PEFT adapter into a GGUF adapter for llama.cpp's --lora.

    lora-gguf convert user/my-adapter --base model-Q4_K_M.gguf -o my-adapter.gguf
    """
    from lora_gguf.convert import convert as convert_adapter
    from lora_gguf.fetch import fetch as fetch_adapter
    from lora_gguf.sources import adapter_name

    out = output or Path(f"{adapter_name(adapter)}.gguf")
    placement = convert_adapter(
        fetch_adapter(adapter),
        out,
        base,
        base_config,
        outtype.value,
        force=force,
        allow_unused=allow_unused,
        expert_b_layout=expert_b_layout and expert_b_layout.value,
        rank=rank,
    )
    _warn(placement.warnings)
    if as_json:
        print(json.dumps([vars(account) for account in placement.accounts], indent=1))
    if not quiet:
        _say(f"wrote {printable(out)} ({os.path.getsize(out) / 1e6:.1f} MB): {placement}")


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(metavar="BASE.gguf", help="The model before.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED.gguf", help="The model after, of the same architecture.")],
    output: Annotated[Path, typer.Option("-o", "--outfile", help="The adapter to write.")],
    rank: Annotated[int, typer.Option(min=1, help="Of each tensor's update.")] = 32,
    outtype: Annotated[OutType, typer.Option(help="The type of the tensors.")] = OutType.f16,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the energy kept of each tensor as JSON.")] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show a bar on a terminal.")] = True,
) -> None:
    """Make the adapter that turns one GGUF into another, as nearly as its rank can (truncated SVD).

    lora-gguf extract base.gguf tuned.gguf --rank 32 -o adapter.gguf
    """
    from lora_gguf import tables
    from lora_gguf.extract import extract as extract_adapter

    with bar("extracting", progress) as advance:
        found = extract_adapter(base, tuned, output, rank, outtype.value, force=force, progress=advance)
    print(json.dumps(found.as_dict(), indent=1) if as_json else tables.extraction_table(found))
    _say(f"wrote {printable(output)} ({os.path.getsize(output) / 1e6:.1f} MB)")


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE.gguf", help="The model; of a split one any shard.")],
    adapter: Annotated[Optional[str], typer.Argument(help="A PEFT adapter's folder, its Hub id, or a GGUF adapter.")] = None,
    lora: Annotated[
        Optional[list[str]], typer.Option("--lora", "--lora-scaled", metavar="ADAPTER[:SCALE]", help="One more adapter; repeat.")
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option("-o", "--outfile", "--output", help="Default: BASE-ADAPTER.gguf in this folder.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the adapter's own scale.")] = 1.0,
    rounding: Annotated[Rounding, typer.Option(help="How weights get back on a grid.")] = Rounding.auto,
    seed: Annotated[int, typer.Option(min=0, help="Of the dither; the same seed gives the same bytes.")] = 0,
    type: Annotated[Optional[str], typer.Option(help="The type of the adapted tensors, such as Q8_0; default: the base's.")] = None,
    quantize: Annotated[
        Optional[str], typer.Option(metavar="MIX", help="Quantize an F16, BF16 or F32 base on the way, as llama-quantize: Q4_K_M.")
    ] = None,
    imatrix: Annotated[Optional[Path], typer.Option(help="llama.cpp's importance matrix, for new grids.")] = None,
    tied: Annotated[Tied, typer.Option(help="An adapted head that the base shares with its embedding.")] = Tied.separate,
    allow_unused: Annotated[
        Optional[str], typer.Option(metavar="REGEX", help="Leave out adapter tensors that fit nowhere, if their name matches.")
    ] = None,
    keep_split: Annotated[bool, typer.Option("--keep-split", help="Write the base's shards; default: one file.")] = False,
    split_max_size: Annotated[Optional[str], typer.Option(metavar="N(M|G)", help="Write shards of at most this size.")] = None,
    shard: Annotated[Optional[str], typer.Option(metavar="N/COUNT", help="Write only this shard, for parallel jobs.")] = None,
    max_growth: Annotated[str, typer.Option(metavar="N%", help="Promote the tensors that gain most to Q8_0, up to this growth.")] = "0%",
    min_retention: Annotated[float, typer.Option(help="Fail, and write nothing, where less of the adapter is kept.")] = 0.0,
    threads: Annotated[Optional[int], typer.Option("-t", "--threads", min=1, help="Default: all cores.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the report and errors only.")] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show a bar on a terminal.")] = True,
) -> None:
    """Add adapters to a quantized model and write one standalone GGUF.

    lora-gguf merge model-Q4_K_M.gguf user/my-adapter -o merged.gguf
    """
    from lora_gguf.base import split_name
    from lora_gguf.fetch import fetch as fetch_adapter
    from lora_gguf.output import check_target
    from lora_gguf.sources import adapter_name

    named = ([(adapter, scale)] if adapter else []) + [_with_scale(text) for text in lora or []]
    if not named:
        raise UsageError("no adapter: name one, or several with --lora")
    split = split_name(base)
    stem = Path(split[0]).name if split else base.stem
    out = output or Path(f"{stem}-{'-'.join(adapter_name(name) for name, _ in named)}.gguf")
    if not dry_run and not (keep_split or split_max_size or shard):
        check_target(out, force=force, inputs=[base])
    adapters = [(fetch_adapter(name), factor) for name, factor in named]
    from lora_gguf.growth import parse_growth
    from lora_gguf.imatrix import read_imatrix
    from lora_gguf.merge import merge as merge_adapters
    from lora_gguf.plan import Policy

    measured = read_imatrix(imatrix) if imatrix else None
    policy = Policy(rounding.value, seed, type and type.upper(), quantize and quantize.upper(), measured)
    with bar("merging", progress and not quiet) as advance:
        report = merge_adapters(
            base,
            adapters,
            None if dry_run else out,
            policy,
            tied=tied.value,
            allow_unused=allow_unused,
            max_growth=parse_growth(max_growth),
            min_retention=min_retention,
            max_bytes=_bytes(split_max_size) if split_max_size else None,
            shards=keep_split,
            shard=shard,
            threads=threads,
            force=force,
            progress=advance,
        )
    _warn(report.plan.warnings)
    _print_report(report, as_json)
    if not quiet:
        for path in report.written:
            _say(f"wrote {printable(path)} ({os.path.getsize(path) / 1e6:.0f} MB)")


@app.command()
def verify(
    merged: Annotated[Path, typer.Argument(metavar="MERGED.gguf", help="The file to judge; of a split one any shard.")],
    base: Annotated[Path, typer.Option("--base", metavar="BASE.gguf", help="The model that it was made of.")],
    lora: Annotated[
        list[str], typer.Option("--lora", "--lora-scaled", metavar="ADAPTER[:SCALE]", help="An adapter that should be in it; repeat.")
    ],
    imatrix: Annotated[Optional[Path], typer.Option(help="The importance matrix that the merge used, if it did.")] = None,
    threads: Annotated[Optional[int], typer.Option("-t", "--threads", min=1, help="Default: all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show a bar on a terminal.")] = True,
) -> None:
    """Check that a merged file holds its base plus the adapters, within rounding; exit code 5 if not, with the cause.

    lora-gguf verify merged.gguf --base model-Q4_K_M.gguf --lora user/my-adapter
    """
    from lora_gguf.fetch import fetch as fetch_adapter

    adapters = [(fetch_adapter(name), factor) for name, factor in map(_with_scale, lora)]
    from lora_gguf import tables
    from lora_gguf.findings import as_error
    from lora_gguf.imatrix import read_imatrix
    from lora_gguf.verify import verify as verify_merge

    with bar("verifying", progress) as advance:
        measured = read_imatrix(imatrix) if imatrix else None
        report = verify_merge(merged, base, adapters, imatrix=measured, threads=threads, progress=advance)
    print(json.dumps(report.as_dict(), indent=1) if as_json else tables.verify_table(report))
    for note in report.notes:
        _say(f"lora-gguf: note: {printable(note, 600)}")
    if not report.ok:
        raise as_error(report.label, report.findings)


def _with_scale(text: str) -> tuple[str, float]:
    """ADAPTER[:SCALE], as llama.cpp's --lora-scaled takes it."""
    name, _, number = text.rpartition(":")
    try:
        return (name, float(number)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0


def _bytes(size: str) -> int:
    """500M or 2G in bytes."""
    number, unit = size[:-1], {"M": 10**6, "G": 10**9}.get(size[-1:].upper())
    if not unit or not number.isdigit() or int(number) == 0:
        raise UsageError(f"--split-max-size {size}: expected a number of megabytes or gigabytes, such as 500M or 2G")
    return int(number) * unit


def _print_report(report, as_json: bool) -> None:
    from lora_gguf import tables

    print(json.dumps(tables.as_dict(report), indent=1) if as_json else tables.retention_table(report))


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        _say(f"lora-gguf: warning: {printable(warning, 600)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


class _Terminated(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived; ``args[0]`` is its number."""


def _terminate(number: int, _frame) -> None:
    raise _Terminated(number)


def main() -> None:
    """The console script: run the command line, turn every refusal into one line on stderr and its exit code."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    try:
        code = _run()
    finally:
        remove_live()
    sys.exit(code)


def _run(arguments: list[str] | None = None) -> int:
    try:
        return app(args=arguments or sys.argv[1:] or ["--help"], standalone_mode=False) or 0
    except LoraGgufError as error:
        _complain(str(error))
        for detail in error.details:
            _say(f"  {printable(detail)}")
        return error.exit_code
    except _ClickUsageError as error:
        command = error.ctx.command_path if error.ctx else "lora-gguf"
        _complain(f"{error.format_message()} See '{command} --help'.")
        return 2
    except typer.Exit as error:
        return error.exit_code
    except _Terminated as error:
        _complain(f"{signal.Signals(error.args[0]).name}: stopped, nothing was written")
        return 128 + error.args[0]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        _complain("out of memory: lower --threads")
        return 7
    except Exception as error:
        if "LORA_GGUF_DEBUG" in os.environ:
            raise
        _complain(f"internal error: {builtins.type(error).__name__}: {error}: please report it with LORA_GGUF_DEBUG=1's traceback")
        return 1


def _complain(line: str) -> None:
    _say(f"lora-gguf: error: {printable(line, 600)}")
