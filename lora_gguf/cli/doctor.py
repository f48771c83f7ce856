"""The ``doctor`` command."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from lora_gguf.cli.options import (
    AdapterArgument,
    Again,
    AllowUnused,
    BaseArgument,
    BaseConfig,
    ExpertA,
    ExpertB,
    ForcePictures,
    LayoutOf,
    Lora,
    Model,
    PlotFile,
    Progress,
    Quiet,
    ReportFile,
    Scale,
    Threads,
    TiedHead,
    Verbose,
)
from lora_gguf.cli.terms import Tied, announce_first_run, base_and_adapter, draw, named_adapters, pictures
from lora_gguf.progress import bars
from lora_gguf.text import json_text

if TYPE_CHECKING:
    from lora_gguf.checks.checkup import DoctorReport, Outlook, TensorOutlook

WAYS, SHORT = ("merge with", "kept", "effect lost", "file", "noise/delta"), 4  # columns
MARKS = {"ok": "ok", "note": "note", "warning": "WARNING"}  # a refusal is the error with which the command ends


def doctor(
    base: BaseArgument = None,
    adapter: AdapterArgument = None,
    lora: Lora = None,
    model: Model = None,
    scale: Scale = 1.0,
    tied: TiedHead = Tied.separate,
    allow_unused: AllowUnused = None,
    again: Again = False,
    base_config: BaseConfig = None,
    expert_b_layout: ExpertB = None,
    expert_a_axis: ExpertA = None,
    layout_of: LayoutOf = None,
    threads: Threads = None,
    report: ReportFile = None,
    plot: PlotFile = None,
    force: ForcePictures = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    progress: Progress = True,
) -> None:
    """Tell whether a merge will work, what it costs and how much of the adapter each way keeps; nothing is written.

    The base may be on the Hub: of it only the header and some rows are transferred. The exit code is that of the merge.

    lora-gguf doctor model-Q4_K_M.gguf user/my-adapter
    """
    from lora_gguf import api

    source, adapter = base_and_adapter(base, adapter, model)
    named = named_adapters(adapter, scale, lora)
    wanted = pictures(report, plot, force, [source, *(name for name, _ in named)])
    wanted.check()
    if not quiet:
        announce_first_run()
    with bars("examining", progress and not quiet, of_bytes=False) as (downloads, work):
        found = api.doctor(
            source,
            named,
            tied=tied.value,
            allow_unused=allow_unused,
            again=again,
            expert_b_layout=expert_b_layout and expert_b_layout.value,
            expert_a_axis=expert_a_axis and expert_a_axis.value,
            layout_of=layout_of,
            base_config=base_config,
            threads=threads,
            progress=work,
            downloads=downloads,
        )
    from lora_gguf.report.content import of_doctor

    text = json_text(found.as_dict()) if as_json else as_text(found, verbose)
    if text:
        print(text)
    draw(wanted, lambda: of_doctor(found, source, named), quiet)
    if found.refusal:
        raise found.refusal


def as_text(report: DoctorReport, verbose: bool = False) -> str:
    """Return the report for a reader: what was looked at, what each way to merge keeps, which tensors change by how
    much; ``verbose`` with all that was measured.
    """
    from lora_gguf.text import aligned, text_table

    remarks = [remark for remark in report.remarks if remark.level in MARKS]
    parts = (
        [aligned([(MARKS[remark.level], remark.topic, remark.text) for remark in remarks], left=3)] if remarks else []
    )
    if report.outlooks:
        n_columns = len(WAYS) if verbose else SHORT
        parts.append(text_table(WAYS[:n_columns], [row(way)[:n_columns] for way in report.outlooks]))
        parts.append(
            text_table(
                ("tensors", "type", "count", "rms(delta)", "delta/step", "kept", "nearest"), by_kind(report), left=2
            )
        )
        parts.append(costs(report))
        parts.append(report.recommendation)
    return "\n\n".join(parts)


def row(way: Outlook) -> tuple[str, ...]:
    """Return one way to merge in the columns ``WAYS``."""
    from lora_gguf.merging.loss import loss_text
    from lora_gguf.text import share_text, size_text

    return way.options, share_text(way.kept), loss_text(way.expected_loss), size_text(way.n_bytes), f"{way.noise:.1f}"


def costs(report: DoctorReport) -> str:
    from lora_gguf.text import size_text

    time = f"about {report.seconds:.0f} s on this machine (some chunks were timed), and " if report.seconds else ""
    return f"A merge takes {time}about {size_text(report.memory_bytes or 0)} of memory."


def by_kind(report: DoctorReport) -> list[tuple]:
    """Return one line for each kind of tensor and type."""
    groups: dict[tuple[str, str], list[TensorOutlook]] = {}
    for tensor in report.tensors:
        groups.setdefault((tensor.kind, tensor.type), []).append(tensor)
    return [(kind, type, len(group), *averages(group)) for (kind, type), group in groups.items()]


def averages(group: list[TensorOutlook]) -> tuple[str, ...]:
    """Return rms(delta), delta/step, and what is kept by default and with nearest rounding, weighed by energy."""
    from lora_gguf.text import share_text

    energy = [tensor.delta_norm**2 for tensor in group]
    whole = sum(energy) or math.nan
    steps = [tensor.step for tensor in group if tensor.step]
    rms = (sum(tensor.delta_rms**2 for tensor in group) / len(group)) ** 0.5
    step = (sum(step**2 for step in steps) / len(steps)) ** 0.5 if steps else 0.0
    kept = [
        sum(e * t.kept.get(way, t.kept["auto"]) for e, t in zip(energy, group, strict=False) if e) / whole
        for way in ("auto", "nearest")
    ]
    return f"{rms:.2e}", f"{rms / step:.4f}" if step else "-", *map(share_text, kept)
