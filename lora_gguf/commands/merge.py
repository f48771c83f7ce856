"""Path 2: a base GGUF and an adapter become one standalone GGUF."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_gguf.adapters.adapter import adapter_name, hub_id
from lora_gguf.checks.earlier import earlier_merges
from lora_gguf.checks.keeping import idle, judged, sentence
from lora_gguf.checks.kinship import kin_warnings
from lora_gguf.errors import UsageError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.files.gguf_writer import GgufWriter, is_written
from lora_gguf.files.lazy_array import close_files
from lora_gguf.files.output import check_space, check_target, write_bytes
from lora_gguf.mapping.accounts import Account, ElsewhereError, Placement
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.sources import inputs_of, placement_of
from lora_gguf.mapping.tower_names import WAITING
from lora_gguf.mapping.towers import CLIP
from lora_gguf.merging.chunks import Weigh, whole
from lora_gguf.merging.importance import weigher
from lora_gguf.merging.layout import OutputPart, output_parts
from lora_gguf.merging.loss import harm_of
from lora_gguf.merging.modelfile import modelfile as modelfile_text
from lora_gguf.merging.options import Policy, Resources, Writing
from lora_gguf.merging.plan import Plan, make_plan
from lora_gguf.merging.provenance import merged_key_values, names_of
from lora_gguf.merging.retention import Retention, kind_of, layer_of, total
from lora_gguf.merging.steps import planned_step
from lora_gguf.merging.tasks import in_executor, tasks_of
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.merging.work import Done, merge_ranges
from lora_gguf.progress import Progress
from lora_gguf.text import size_of, versions

Adapters = Sequence[tuple[str | os.PathLike, float]]


@dataclass
class MergeReport:
    """What a merge did: its plan, the account of each adapter's tensors, and per merged tensor what was kept.

    ``inputs`` are the role (base, adapter) and path of what was read, ``written`` the files that it made, or, where it
    was ``skipped``, those that an earlier run had made; ``architecture`` is the base's. ``mmproj`` is the same of the
    mmproj that was merged beside the model; the accounts are of both.
    """

    plan: Plan
    accounts: list[Account]
    inputs: list[tuple[str, str | os.PathLike[str]]] = field(default_factory=list)
    policy: Policy = field(default_factory=Policy)
    architecture: str = ""
    retention: dict[str, Retention] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)
    mmproj: MergeReport | None = None
    skipped: bool = False

    @property
    def warnings(self) -> list[str]:
        """What to know of the merge, of the mmproj too."""
        return [*self.plan.warnings, *(self.mmproj.plan.warnings if self.mmproj else ())]

    @property
    def tensors(self) -> list[TensorPlan]:
        """All tensors that are written."""
        return [*self.plan.tensors, *(self.mmproj.plan.tensors if self.mmproj else ())]

    @property
    def waiting(self) -> bool:
        """Whether the adapters have tensors that wait for the model's mmproj."""
        return any(account.reason == WAITING for account in self.accounts)

    @property
    def whole(self) -> Retention:
        return total(self.retention.values())

    @property
    def expected_loss(self) -> float | None:
        """The share of the fine-tune's effect that is lost, within a factor of two; None where it is not known."""
        return self.whole.expected_loss

    @property
    def verdict(self) -> str:
        """How much was kept and whether that is good, in one sentence; empty where nothing was measured."""
        return sentence(self.whole, self.policy)

    def by_kind(self) -> dict[tuple[str, str, str], list[Retention]]:
        """Return the merged tensors' retention by (kind, type before, type after): kinds in the file's order of first
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
        inputs = [{"role": role, "path": os.fspath(path), "size": size_of(path)} for role, path in self.inputs]
        outputs = [{"path": str(path), "size": size_of(path)} for path in self.written]
        return {
            "outputs": outputs, "inputs": inputs, "versions": versions(), "rounding": self.policy.rounding,
            "seed": self.policy.seed, "skipped": self.skipped, "verdict": self.verdict,
            "expected_loss": self.expected_loss,
            "all": self.whole.as_dict(), "kinds": kinds, "merged": tensors, "copied": copied, "accounts": accounts,
            "warnings": self.warnings, **({"mmproj": self.mmproj.as_dict()} if self.mmproj else {}),
        }  # fmt: skip


@dataclass
class Job:
    """One file of a merge: a base that is open, the adapters that have a part in it, and what comes of them.

    ``accounts`` are those of all adapters, one after the other. ``prepare`` adds the ``parts`` and what each says of
    itself.
    """

    model: Base
    policy: Policy
    placements: list[tuple[Placement, float]]
    names: list[str]
    accounts: list[list[Account]]
    report: MergeReport
    parts: list[OutputPart] = field(default_factory=list)
    key_values: list[list[bytes]] = field(default_factory=list)
    writers: list[GgufWriter] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.report.plan


def merge(
    base: str | os.PathLike,
    adapters: Adapters,
    writing: Writing | None,
    policy: Policy = Policy(),
    reading: Reading = Reading(),
    resources: Resources = Resources(),
    progress: Progress | None = None,
) -> MergeReport:
    """Add the updates of ``adapters`` to ``base`` and write the result; ``writing`` None only plans.

    Each adapter is a PEFT directory or an adapter GGUF with the factor that multiplies its own scale; their updates are
    summed in f32 and rounded once, as ``policy`` says. The bytes written do not depend on ``resources``. ``progress``
    is called with (bytes of the base done since the last call, bytes in all, tensor name). The mmproj that ``reading``
    names is merged too, each of its tensors in its own type: both files are written, or neither. Raises the subclasses
    of ``LoraGgufError``, before the first byte is written wherever that is possible; then the output stays what it was.
    """
    with ExitStack() as opened:
        opened.callback(close_files)
        models = [opened.enter_context(Base(path)) for path in (base, reading.mmproj) if path is not None]
        check_pair(*models)
        jobs = [planned(model, adapters, policy, reading) for model in models]
        report = reported(jobs, [("base", base), *(("adapter", path) for path, _ in adapters)])
        if writing is None:
            return report
        inputs = [path for model in models for path in files_read(model, adapters, policy, reading)]
        for job in jobs:
            prepare(job, writing if job is jobs[0] else beside(writing), adapters)
        if writing.skip_existing and all(is_made(job) for job in jobs):
            report.written, report.skipped = [part.path for job in jobs for part in job.parts], True
            return report
        for job in jobs:
            job.writers = [GgufWriter(*made, force=writing.force, inputs=inputs) for made in outputs(job)]
        writers = [writer for job in jobs for writer in job.writers]
        check_space(writers[0].output.target, sum(writer.size for writer in writers))
        recipe = ollama_recipe(jobs, writing.force) if writing.modelfile else None
        told = progress and _of_all(progress, sum(model.n_bytes for model in models))
        for job in jobs:
            carry_out(job, opened, resources, told)
        for model in models:
            model.check_unchanged()
        report.written += committed(writers)
    if recipe:
        write_bytes(*recipe, force=writing.force)
        report.written.append(recipe[0])
    return report


def check_pair(model: Base, mmproj: Base | None = None) -> None:
    """Raise ``UsageError`` where ``mmproj`` is none, or ``model`` is one too."""
    if mmproj is not None and mmproj.architecture != CLIP:
        found = printable(mmproj.architecture, 40) or "none"
        raise UsageError(f"--mmproj {mmproj.label}: expected architecture clip, found {found}: name the model's mmproj")
    if mmproj is not None and model.architecture == CLIP:
        raise UsageError(f"{model.label} is an mmproj too: name the text model first, or leave out --mmproj")


def planned(model: Base, adapters: Adapters, policy: Policy, reading: Reading) -> Job:
    """Plan one file. Where there are several adapters or files, an adapter need not have a part in each.

    Raises ``ElsewhereError`` where none has.
    """
    if model.architecture == CLIP and reading.mmproj is not None:
        policy = replace(policy, type=None, mix=None, imatrix=None, max_growth=0.0)
    placements, used, accounts, absent = [], [], [], []
    for path, scale in adapters:
        try:
            placement = placement_of(path, model, reading)
            placements.append((placement, scale))
            used.append((path, scale))
            accounts.append(placement.accounts)
        except ElsewhereError as error:
            absent.append(error)
            accounts.append(error.accounts)
    if not placements:
        raise absent[0]
    plan = make_plan(model, placements, policy)
    earlier = earlier_merges(model, used, placements, again=reading.again)
    plan.warnings += [*earlier, *kin_warnings(used, model), *idle(used, placements)]
    every = [account for found in accounts for account in found]
    report = MergeReport(plan, every, policy=policy, architecture=model.architecture)
    return Job(model, policy, placements, [adapter_name(path) for path, _ in used], accounts, report)


def reported(jobs: Sequence[Job], inputs: list[tuple[str, str | os.PathLike]]) -> MergeReport:
    """Return the report of the first job, with that of an mmproj in it, and what each adapter tensor became in both."""
    report, *others = (job.report for job in jobs)
    report.inputs, report.mmproj = inputs, next(iter(others), None)
    found = zip(*(job.accounts for job in jobs), strict=True)
    report.accounts = [account for accounts in found for account in joined_accounts(*accounts)]
    return report


def joined_accounts(first: list[Account], second: Iterable[Account] = ()) -> list[Account]:
    """Return one account for each tensor: the second file's of what the first one leaves to it."""
    later = {account.tensor: account for account in second}
    return [
        later.get(account.tensor, account)
        if account.reason == WAITING or later.get(account.tensor, account).outcome == "applied"
        else account
        for account in first
    ]


def prepare(job: Job, writing: Writing, adapters: Adapters) -> None:
    """Settle which files a job writes, and what they say of themselves."""
    job.parts = output_parts(writing, job.model, job.plan, [adapter_name(path) for path, _ in adapters])
    repos = [hub_id(path) for path in (job.model.path, *(path for path, _ in adapters))]
    names = names_of(job.model, job.names, job.policy, repos if len(job.names) == len(adapters) else repos[:1])
    metadata = merged_key_values(job.model, job.plan, job.placements, job.policy, names)
    job.key_values = [part.key_values(metadata, len(job.plan.tensors)) for part in job.parts]
    job.report.plan = replace(job.plan, tensors=[tensor for part in job.parts for tensor in part.tensors])


def beside(writing: Writing) -> Writing:
    """Return where the mmproj goes: in the same folder, called mmproj-NAME.gguf where the model is NAME.gguf.

    Raises ``UsageError`` for one shard of the model.
    """
    if writing.shard:
        raise UsageError("--shard writes a part of the model: merge the mmproj on its own, without --mmproj")
    path = Path(writing.path)
    return Writing(path if path.is_dir() else path.with_name(f"mmproj-{path.name}"), force=writing.force)


def carry_out(job: Job, opened: ExitStack, resources: Resources, progress: Progress | None) -> None:
    """Write all of a job's files, and judge what was kept."""
    weigh = weigher(job.model)
    for part, writer in zip(job.parts, job.writers, strict=True):
        write_part(job, part, opened.enter_context(writer), weigh, resources, progress)
    for tensor in job.plan.merged:
        if found := job.report.retention.get(tensor.target.name):
            found.measure(*planned_step(tensor, job.model), harm_of(tensor))
    job.plan.warnings += judged(job.report.by_kind(), job.plan, job.model, job.policy)


def _of_all(progress: Progress, n_bytes: int) -> Progress:
    """Return ``progress`` of several files as of one."""
    return lambda done, _, name: progress(done, n_bytes, name)


def files_read(
    model: Base,
    adapters: Adapters,
    policy: Policy,
    reading: Reading,
) -> list[str | os.PathLike]:
    """Return every path that a merge reads, and so must not write."""
    paths = [*model.paths, *(inputs_of(path) for path, _ in adapters)]
    config = [reading.base_config] if reading.base_config else []
    return [*paths, *(policy.imatrix.paths if policy.imatrix else ()), *config]


def committed(writers: Sequence[GgufWriter]) -> list[Path]:
    """Make all files durable, and only then put them in place; their paths."""
    for writer in writers:
        writer.sync()
    for writer in writers:
        writer.commit()
    return [writer.output.path for writer in writers]


def ollama_recipe(jobs: Sequence[Job], force: bool) -> tuple[Path, bytes]:
    """Return where the Modelfile of a merge goes, and its content; refused here, before the merge, where it could not
    be written.
    """
    if len(jobs[0].parts) > 1:
        raise UsageError("--modelfile: Ollama takes one file: leave out --keep-split and --split-max-size")
    if jobs[0].model.architecture == CLIP:
        raise UsageError("--modelfile: an mmproj goes into its model's: merge both, with --mmproj")
    merged, *others = [part.path for job in jobs for part in job.parts]
    path = merged.with_name(merged.name.removesuffix(".gguf") + ".Modelfile")
    check_target(path, force=force)
    return path, modelfile_text(jobs[0].model, *(found.name for found in (merged, *others))).encode()


def is_made(job: Job) -> bool:
    """Return whether all files of a job are there, made by the same merge: what they say of themselves tells."""
    return all(is_written(*made) for made in outputs(job))


def outputs(job: Job) -> Iterator[tuple[Path, list[bytes], list[TensorInfo], int]]:
    """Yield each output file of a job: its path, metadata, tensors and alignment."""
    for part, key_values in zip(job.parts, job.key_values, strict=True):
        yield part.path, key_values, [tensor.target for tensor in part.tensors], job.model.alignment


def write_part(
    job: Job,
    part: OutputPart,
    writer: GgufWriter,
    weigh: Weigh,
    resources: Resources,
    progress: Progress | None,
) -> None:
    """Carry out all chunks of one output file, here or by an executor, and note what was kept."""

    def told(done: Done) -> None:
        if progress:
            progress(done.n_bytes, job.model.n_bytes, done.name)

    if resources.executor is None:
        for done in merge_ranges(map(whole, part.tensors), job.model, writer, weigh, resources):
            told(done)
            note(job.report, done)
        return

    def written(done: Done) -> None:
        writer.output.wrote(done.n_bytes)
        told(done)

    for done in in_executor(resources.executor, tasks_of(part.tensors, job.model, writer, resources), written):
        note(job.report, done)


def note(report: MergeReport, done: Done) -> None:
    """Add what was kept of a chunk to ``report``."""
    if done.sums is not None:
        report.retention.setdefault(done.name, Retention()).add(done.n_weights, done.sums)
