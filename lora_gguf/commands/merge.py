"""Path 2: a base GGUF and an adapter become one standalone GGUF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lora_gguf.checks.earlier import earlier_merges
from lora_gguf.checks.keeping import idle, judged
from lora_gguf.checks.kinship import kin_warnings
from lora_gguf.errors import UsageError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_writer import GgufWriter
from lora_gguf.files.output import check_space, check_target, write_bytes
from lora_gguf.mapping.placement import Account
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.sources import adapter_name, inputs_of, placement_of
from lora_gguf.merging.chunks import Chunk, Weigh, cut, weights_within
from lora_gguf.merging.importance import weigher
from lora_gguf.merging.layout import OutputPart, output_parts
from lora_gguf.merging.modelfile import modelfile as modelfile_text
from lora_gguf.merging.options import Policy, Resources, Writing
from lora_gguf.merging.plan import Plan, make_plan
from lora_gguf.merging.provenance import merged_key_values, names_of
from lora_gguf.merging.retention import Retention, kind_of, layer_of, total
from lora_gguf.merging.steps import planned_step
from lora_gguf.merging.work import in_threads, merge_chunk
from lora_gguf.progress import Progress


@dataclass
class MergeReport:
    """What a merge did: its plan, the account of each adapter's tensors, and per merged tensor what was kept.

    ``inputs`` are the role (base, adapter) and path of what was read, ``written`` the files that it made.
    """

    plan: Plan
    accounts: list[Account]
    inputs: list[tuple[str, str | os.PathLike[str]]] = field(default_factory=list)
    retention: dict[str, Retention] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)

    @property
    def whole(self) -> Retention:
        return total(self.retention.values())

    def by_kind(self) -> dict[tuple[str, str, str], list[Retention]]:
        """The merged tensors' retention by (kind, type before, type after): kinds in the file's order of first
        appearance.
        """
        groups: dict[tuple[str, str, str], list[Retention]] = {}
        for tensor in self.plan.merged:
            key = (kind_of(tensor.target.name), tensor.source.type.name, tensor.target.type.name)
            groups.setdefault(key, []).append(self.retention.get(tensor.target.name, Retention()))
        kinds = list(dict.fromkeys(kind for kind, *_ in groups))
        return {key: groups[key] for key in sorted(groups, key=lambda key: kinds.index(key[0]))}

    def as_dict(self) -> dict:
        """Return the report as plain data for JSON: the whole, each kind of tensor, each merged tensor, each of the
        adapter's.
        """
        tensors = [
            {
                "name": tensor.target.name,
                "layer": layer_of(tensor.target.name),
                "kind": kind_of(tensor.target.name),
                "type": tensor.target.type.name,
                "base_type": tensor.source.type.name,
                "shape": list(tensor.source.shape),
                "rank": sum(pair.rank for pair in tensor.pairs),
                **self.retention.get(tensor.target.name, Retention()).as_dict(),
            }
            for tensor in self.plan.merged
        ]
        kinds = [
            {"kind": kind, "base_type": before, "type": after, "count": len(parts), **total(parts).as_dict()}
            for (kind, before, after), parts in self.by_kind().items()
        ]
        copied = [tensor.target.name for tensor in self.plan.tensors if not tensor.recipe]
        accounts = [vars(account) for account in self.accounts]
        return {
            "all": self.whole.as_dict(), "kinds": kinds, "merged": tensors, "copied": copied, "accounts": accounts,
            "warnings": self.plan.warnings,
        }  # fmt: skip


def merge(
    base: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float]],
    writing: Writing | None,
    policy: Policy = Policy(),
    reading: Reading = Reading(),
    resources: Resources = Resources(),
    progress: Progress | None = None,
) -> MergeReport:
    """Add the updates of ``adapters`` to ``base`` and write the result; ``writing`` None only plans.

    Each adapter is a PEFT directory or an adapter GGUF with the factor that multiplies its own scale; their updates are
    summed in f32 and rounded once, as ``policy`` says. The bytes written do not depend on ``resources``. ``progress``
    is called with (bytes of the base done since the last call, bytes in all, tensor name). Raises the subclasses of
    ``LoraGgufError``, before the first byte is written wherever that is possible; then the output stays what it was.
    """
    with Base(base) as model:
        placements = [(placement_of(path, model, reading), scale) for path, scale in adapters]
        plan = make_plan(model, placements, policy)
        earlier = earlier_merges(model, adapters, placements, again=reading.again)
        plan.warnings += [*earlier, *kin_warnings(adapters, model), *idle(adapters, placements)]
        accounts = [account for placement, _ in placements for account in placement.accounts]
        report = MergeReport(plan, accounts, [("base", base), *(("adapter", path) for path, _ in adapters)])
        if writing is None:
            return report
        names = [adapter_name(path) for path, _ in adapters]
        parts = output_parts(writing, model, plan, names)
        metadata = merged_key_values(model, plan, placements, policy, names_of(model, names, policy))
        inputs = files_read(model, adapters, policy, reading)
        writers = [writer_of(part, plan, metadata, model.alignment, writing.force, inputs) for part in parts]
        check_space(writers[0].output.target, sum(writer.size for writer in writers))
        recipe = ollama_recipe(parts, model, writing.force) if writing.modelfile else None
        report.plan = replace(plan, tensors=[tensor for part in parts for tensor in part.tensors])
        with ExitStack() as opened:
            weigh = weigher(model, policy.imatrix)
            for part, writer in zip(parts, writers, strict=True):
                write_part(part, model, opened.enter_context(writer), report, weigh, resources, progress)
            note_steps(report, model)
            plan.warnings += judged(report.by_kind(), report.plan, model, policy)
            model.check_unchanged()
            report.written += committed(writers)
    if recipe:
        write_bytes(*recipe, force=writing.force)
        report.written.append(recipe[0])
    return report


def files_read(
    model: Base,
    adapters: Sequence[tuple[str | os.PathLike, float]],
    policy: Policy,
    reading: Reading,
) -> list[str | os.PathLike]:
    """Return every path that a merge reads, and so must not write."""
    paths = [*model.paths, *(inputs_of(path) for path, _ in adapters)]
    return [*paths, *(policy.imatrix.paths if policy.imatrix else ()), *filter(None, [reading.base_config])]


def committed(writers: Sequence[GgufWriter]) -> list[Path]:
    """Make all files durable, and only then put them in place; their paths."""
    for writer in writers:
        writer.sync()
    for writer in writers:
        writer.commit()
    return [writer.output.path for writer in writers]


def ollama_recipe(parts: list[OutputPart], model: Base, force: bool) -> tuple[Path, bytes]:
    """Where the Modelfile of a merge goes, and its content; refused here, before the merge, where it could not be
    written.
    """
    if len(parts) > 1:
        raise UsageError("--modelfile: Ollama takes one file: leave out --keep-split and --split-max-size")
    merged = parts[0].path
    path = merged.with_name(merged.name.removesuffix(".gguf") + ".Modelfile")
    check_target(path, force=force)
    return path, modelfile_text(model, merged.name).encode()


def writer_of(
    part: OutputPart, plan: Plan, metadata: list[bytes], alignment: int, force: bool, inputs: list
) -> GgufWriter:
    """The writer of one output file, its path checked; nothing is written before it is entered."""
    targets, key_values = [tensor.target for tensor in part.tensors], part.key_values(metadata, len(plan.tensors))
    return GgufWriter(part.path, key_values, targets, alignment=alignment, force=force, inputs=inputs)


def write_part(
    part: OutputPart,
    model: Base,
    writer: GgufWriter,
    report: MergeReport,
    weigh: Weigh,
    resources: Resources,
    progress: Progress | None,
) -> None:
    """Carry out all chunks of one output file, and note what was kept."""

    n_weights = weights_within(resources.memory, resources.threads)

    def work(chunk: Chunk) -> np.ndarray | None:
        return merge_chunk(chunk, model.reader_of(chunk.tensor.source.name), writer)

    for chunk, sums in in_threads(work, cut(part.tensors, weigh, n_weights), resources.threads):
        name = chunk.tensor.target.name
        if sums is not None and chunk.tensor.changes:
            report.retention.setdefault(name, Retention()).add(chunk.n_rows * chunk.tensor.source.n_cols, sums)
        if progress:
            progress(chunk.n_bytes, model.n_bytes, name)


def note_steps(report: MergeReport, model: Base) -> None:
    """Add to what was kept of each tensor how large the steps of its type are."""
    for tensor in report.plan.merged:
        if found := report.retention.get(tensor.target.name):
            found.steps2 = found.n_weights * planned_step(tensor, model) ** 2
