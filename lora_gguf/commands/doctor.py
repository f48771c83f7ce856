"""Will it work, and how well? Everything that a merge checks, and the merge itself on a sample; nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_gguf.adapters.adapter import adapter_directory, adapter_name
from lora_gguf.checks.checkup import DoctorReport, Outlook, TensorOutlook, recommend
from lora_gguf.checks.earlier import earlier_merges
from lora_gguf.checks.inspection import AdapterInspection
from lora_gguf.checks.keeping import NOTHING, idle, listed, poorly_kept
from lora_gguf.checks.kinship import kinship
from lora_gguf.checks.remarks import NOTE, OK, REFUSAL, WARNING, Remark
from lora_gguf.checks.tokenizer import compare_tokenizer
from lora_gguf.commands.inspect import inspect
from lora_gguf.errors import LoraGgufError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import padded
from lora_gguf.files.input_file import InputFile
from lora_gguf.hub.downloads import find_model, imatrix_of
from lora_gguf.hub.remote import open_model
from lora_gguf.mapping.accounts import Placement
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.sources import placement_of
from lora_gguf.mapping.tower_names import WAITING
from lora_gguf.mapping.towers import CLIP
from lora_gguf.merging.chunks import TENSORS_HELD, held_bytes
from lora_gguf.merging.forecast import STEADY_BYTES, expected, expected_seconds, scales_of, scratch_bytes, thinned
from lora_gguf.merging.importance import weigher
from lora_gguf.merging.loss import harm_of
from lora_gguf.merging.options import Policy
from lora_gguf.merging.plan import Plan, make_plan
from lora_gguf.merging.retention import Retention, kind_of, layer_of, total
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.merging.types import rechosen
from lora_gguf.progress import Progress
from lora_gguf.text import size_text

# name -> (options of merge, what they are to the plan)
OPTIONS: dict[str, tuple[str, dict]] = {
    "auto": ("the defaults", {}),
    "dither": ("--rounding dither", {"rounding": "dither"}),
    "nearest": ("--rounding nearest", {"rounding": "nearest"}),
    "fresh": ("--rounding fresh", {"rounding": "fresh"}),
    "Q8_0": ("--type Q8_0", {"type": "Q8_0"}),
    "BF16": ("--type BF16", {"type": "BF16"}),
}


def doctor(
    base: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float]],
    reading: Reading = Reading(),
    threads: int | None = None,
    progress: Progress | None = None,
) -> DoctorReport:
    """Tell whether ``adapters`` (paths, each with the factor of its scale) can be merged into ``base``, and what will
    be kept.

    ``base`` is a path, or a reference to a GGUF on the Hub, of which only the header and some rows are transferred.
    What keeps them from being merged is the report's ``refusal``; files that cannot be read raise as ever. ``progress``
    is called with (samples done since the last call, samples in all, tensor name).
    """
    found = find_model(base)
    with open_model(*found) if found else Base(base) as model:
        named = [(adapter_name(path), float(factor)) for path, factor in adapters]
        report = DoctorReport(model.label, named, [("base", base), *(("adapter", path) for path, _ in adapters)])
        if found and (matrix := imatrix_of(found[0])):
            report.remarks.append(Remark("base", OK, f"{matrix}: merge uses this importance matrix beside the base"))
        for path, _ in adapters:
            report.remarks += remarks_on(path, model, named=len(adapters) > 1)
        try:
            placements = [(placement_of(path, model, reading), factor) for path, factor in adapters]
            plan = make_plan(model, placements, Policy())
            plan.warnings += earlier_merges(model, adapters, placements, again=reading.again)
            plan.warnings += idle(adapters, placements)
            report.remarks += remarks_on_fit(model, plan, [placement for placement, _ in placements])
            foresee(report, model, plan, threads, progress)
        except LoraGgufError as error:
            report.refusal = error
            report.remarks.append(Remark("fit", REFUSAL, str(error)))
    return report


def is_local(model: Base) -> bool:
    return all(isinstance(reader.source, InputFile) for reader in model.readers)


def remarks_on(path: str | os.PathLike, model: Base, named: bool = False) -> list[Remark]:
    """Return what is said of an adapter before its weights are looked at; ``named`` where it must be told apart."""
    found = inspect(path)
    if not isinstance(found, AdapterInspection):
        return []  # the placement says what it is instead
    ranks = ", ".join(f"rank {group.rank}" for group in found.ranks[:3])
    trained = f", trained on {found.base_model}" if found.base_model else ""
    level = NOTE if found.refusal else OK
    remarks = [
        Remark("adapter", level, f"{adapter_name(path)}: {', '.join(filter(None, (found.method, ranks)))}{trained}")
    ]
    further = kinship(path, model)
    if not Path(path).is_file() and model.architecture != CLIP:
        further += compare_tokenizer(adapter_directory(path), model)
    where = f"{adapter_name(path)}: " if named else ""
    return remarks + [replace(remark, text=where + remark.text) for remark in further]


def remarks_on_fit(model: Base, plan: Plan, placements: Sequence[Placement]) -> list[Remark]:
    """Return what becomes of the adapters' tensors in the base."""
    accounts = [account for placement in placements for account in placement.accounts]
    ignored = [account for account in accounts if account.outcome == "ignored"]
    n_applied = len(accounts) - len(ignored)
    text = (
        f"{n_applied} of {len(accounts)} adapter tensors change {len(plan.merged)} of {len(model.tensors)} in "
        f"{model.label}"
    )
    remarks = [Remark("fit", OK, text)]
    waiting = [account for account in ignored if account.reason == WAITING]
    others = [account for account in ignored if account.reason != WAITING]
    remarks += [Remark("fit", NOTE, f"{account.tensor}: left out: {account.reason}") for account in others[:5]]
    if waiting:
        text = f"{len(waiting)} adapter tensors are of a vision or audio tower: merge them too, with --mmproj"
        remarks.append(Remark("mmproj", NOTE, text))
    if any(placement.untied for placement in placements):
        text = "the merged file gets an output.weight of its own, as the adapter tells head and embedding apart"
        remarks.append(Remark("tied head", NOTE, text))
    n_new = max((len(tensor.new_rows) for tensor in plan.tensors if tensor.new_rows is not None), default=0)
    if n_new:
        remarks.append(Remark("vocabulary", NOTE, f"{n_new} tokens are added"))
    promoted = {(t.source.type.name, t.target.type.name) for t in plan.merged if t.source.type != t.target.type}
    remarks += [Remark("types", NOTE, f"adapted {before} tensors become {after}") for before, after in sorted(promoted)]
    return remarks + [Remark("fit", WARNING, warning) for warning in plan.warnings]


def foresee(report: DoctorReport, model: Base, plan: Plan, threads: int | None, progress: Progress | None) -> None:
    """Add to ``report`` what is kept by each option, and what a merge with the defaults costs."""
    local, merged = is_local(model), plan.merged
    weigh = weigher(model) if local else None  # which samples rows: far ones cost a request each
    sampled = merged if local else thinned(merged)
    options = {name: rechosen(sampled, Policy(**change)) for name, (_, change) in OPTIONS.items()}
    options = {
        name: tensors for name, tensors in options.items() if name == "auto" or is_other(tensors, options["auto"])
    }
    weights = {tensor.target.name: tensor.source.n_elements for tensor in sampled}
    n_samples = len(options) * len(sampled)
    found: dict[str, dict[str, Retention]] = {}

    def done(tensor: TensorPlan) -> None:
        if progress:
            progress(1, n_samples, tensor.target.name)

    scales = {tensor.target.name: scales_of(model, tensor, local) for tensor in sampled}
    for name, tensors in options.items():
        found[name] = expected(model, tensors, weigh if name == "auto" else None, threads, local, done)
        for tensor in tensors:
            step, weight = scales[tensor.target.name]
            found[name][tensor.target.name].measure(step or 0.0, weight, harm_of(tensor))
    for name in options:
        words, change = OPTIONS[name]
        whole = total(found[name].values())
        types = {tensor.target.name: tensor.target for tensor in rechosen(merged, Policy(**change))}
        n_bytes = file_bytes(model, plan, types)
        report.outlooks.append(Outlook(name, words, whole.kept, whole.expected_loss, whole.noise, n_bytes))
    report.tensors = [outlook_of(tensor, scales[tensor.target.name][0], weights, found) for tensor in sampled]
    report.output_bytes = report.outlooks[0].n_bytes
    report.free_bytes = shutil.disk_usage(".").free
    report.memory_bytes = STEADY_BYTES + TENSORS_HELD * max(map(held_bytes, merged)) + scratch_bytes(threads)
    report.seconds = expected_seconds(model, plan.tensors, weigh, threads) if local else None
    whole = total(found["auto"].values())
    report.recommendation = NOTHING if whole.is_nothing else recommend(report.outlooks)
    report.remarks += poor_remarks(sampled, found["auto"])
    report.remarks.append(disk_remark(report))


def poor_remarks(tensors: Sequence[TensorPlan], found: dict[str, Retention]) -> list[Remark]:
    """Return a warning where the defaults keep little of some kind of tensor."""
    kinds: dict[tuple[str, str, str], list[Retention]] = {}
    for tensor in tensors:
        key = (kind_of(tensor.target.name), tensor.source.type.name, tensor.target.type.name)
        kinds.setdefault(key, []).append(found[tensor.target.name])
    poor = poorly_kept(kinds)
    return [Remark("kept", WARNING, f"the defaults keep only {listed(poor)}")] if poor else []


def is_other(tensors: Sequence[TensorPlan], default: Sequence[TensorPlan]) -> bool:
    """Return whether an option differs from the default: a type may be the base's own, and a new or an exact one knows
    no rounding.
    """

    def ways(tensors: Sequence[TensorPlan]) -> list[tuple]:
        recipes = [(one.target.type, one.recipe) for one in tensors]
        return [(type, recipe.rounding if recipe and recipe.keeps_grid else None) for type, recipe in recipes]

    return ways(tensors) != ways(default)


def outlook_of(
    tensor: TensorPlan, step: float | None, weights: dict[str, int], found: dict[str, dict[str, Retention]]
) -> TensorOutlook:
    """Return what is expected of a tensor; ``found`` is by the name of the way to merge, then of the tensor."""
    name = tensor.target.name
    of = {option: parts[name] for option, parts in found.items()}
    rms = of["auto"].delta_rms
    return TensorOutlook(
        name=name,
        kind=kind_of(name),
        layer=layer_of(name),
        type=tensor.source.type.name,
        shape=tensor.source.shape,
        rank=sum(pair.rank for pair in tensor.pairs),
        delta_rms=rms,
        delta_norm=rms * weights[name] ** 0.5,
        step=step,
        kept={option: part.kept for option, part in of.items()},
        noise={option: part.noise for option, part in of.items()},
    )


def file_bytes(model: Base, plan: Plan, targets: dict) -> int:
    """Return the size of the merged file as one; its header is taken to be as long as the base's."""
    chosen_types = (targets.get(tensor.target.name, tensor.target) for tensor in plan.tensors)
    return model.readers[0].data_position + sum(padded(target.n_bytes, model.alignment) for target in chosen_types)


def disk_remark(report: DoctorReport) -> Remark:
    n_needed, n_free = report.output_bytes or 0, report.free_bytes or 0
    needed, free = size_text(n_needed), size_text(n_free)
    if n_needed > n_free:
        return Remark(
            "disk", WARNING, f"the merged file takes {needed}, this folder's disk has {free} free: write it elsewhere"
        )
    return Remark("disk", OK, f"the merged file takes {needed}, {free} are free here ({printable(Path.cwd(), 60)})")
