"""Prove that a merged file holds base + scale * B @ A within its types' rounding, or say what it holds instead.

The three files are read once, chunk by chunk, as a merge reads them. What the adapters do not touch must be the base's,
byte for byte; what they touch is compared with what rounding may do to it (``comparison.py``). Only where something is
wrong are some tensors read again, to name the cause (``diagnosis.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_gguf.adapters.lora import HEAD
from lora_gguf.checks.comparison import Comparison, compare_rows
from lora_gguf.checks.diagnosis import Evidence, causes
from lora_gguf.checks.findings import Check, Finding, grouped, rounded_to_nearest
from lora_gguf.checks.reproduction import IMATRIX_KEY
from lora_gguf.errors import UnsupportedError
from lora_gguf.files.base import Base
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.mapping.accounts import Account
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.sources import adapter_name, placement_of
from lora_gguf.merging.chunks import CHUNK_WEIGHTS, Changed, Chunk, New, cut, update_of
from lora_gguf.merging.options import Policy
from lora_gguf.merging.plan import Plan, make_plan
from lora_gguf.merging.retention import WARN_BELOW, kind_of
from lora_gguf.merging.steps import stored_step
from lora_gguf.merging.work import encoded, in_threads
from lora_gguf.progress import Progress
from lora_gguf.quants.table import CODECS

PLAIN = Policy("dither")  # only where the updates go matters here, not how they would be rounded


@dataclass
class VerifyReport:
    """What ``verify`` found: ``ok`` where the merged file holds what it should, else ``findings`` with their causes.

    ``inputs`` are the role (merged, base, adapter) and path of what was read.
    """

    label: str
    inputs: list[tuple[str, str | os.PathLike[str]]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def adapted(self) -> list[Check]:
        return [check for check in self.checks if check.touched]

    def by_kind(self) -> dict[tuple[str, str, str], list[Check]]:
        """The adapted tensors by (kind, type before, type after), in the file's order of first appearance."""
        groups: dict[tuple[str, str, str], list[Check]] = {}
        for check in self.adapted:
            groups.setdefault((kind_of(check.name), check.base_type, check.type), []).append(check)
        return groups

    @property
    def whole(self) -> Comparison:
        """All adapted tensors as one."""
        return sum((check.comparison for check in self.adapted), Comparison())

    def as_dict(self) -> dict:
        """The report as plain data for JSON."""
        untouched = [check for check in self.checks if not check.touched]
        return {
            "ok": self.ok,
            "findings": [finding.as_dict() for finding in self.findings],
            "notes": self.notes,
            "kept": self.whole.kept,
            "all": _kind_as_dict("all adapted", "", "", self.adapted),
            "kinds": [_kind_as_dict(*key, checks) for key, checks in self.by_kind().items()],
            "tensors": [check.as_dict() for check in self.adapted],
            "untouched": {
                "identical": sum(check.identical for check in untouched),
                "requantized": [check.name for check in untouched if not check.identical and check.holds],
                "changed": [check.name for check in untouched if not check.holds],
            },
            "accounts": [vars(account) for account in self.accounts],
        }


def _kind_as_dict(kind: str, base_type: str, type: str, checks: Sequence[Check]) -> dict:
    found = sum((check.comparison for check in checks), Comparison())
    return {
        "kind": kind, "base_type": base_type, "type": type, "count": len(checks), "wrong": sum(not check.holds for check in checks),
        "kept": found.kept, "standard_error": found.standard_error, "noise": found.noise, "noise_expected": found.expected_noise,
    }  # fmt: skip


def verify(
    merged: str | os.PathLike,
    base: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float]],
    reading: Reading = Reading(),
    imatrix: Imatrix | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare ``merged`` with ``base`` and ``adapters``, PEFT directories or adapter GGUFs with their factors.

    The adapters are read as ``reading`` says, but for a tied head, which is what the merged file makes of it.
    ``imatrix`` is the importance matrix that the merge used, if it did: with it, tensors can be merged again.
    ``progress`` is called with (bytes of the base done since the last call, bytes in all, tensor name).
    Raises ``MismatchError`` where the adapters do not fit the base, ``UnsupportedError`` for an unreadable type.
    """
    with Base(base) as model, Base(merged) as result:
        reading = replace(reading, tied="separate" if HEAD in result.tensors else "shared")
        placements = [(placement_of(path, model, reading), scale) for path, scale in adapters]
        plan = make_plan(model, placements, PLAIN)
        accounts = [account for placement, _ in placements for account in placement.accounts]
        inputs = [("merged", merged), ("base", base), *(("adapter", path) for path, _ in adapters)]
        report = VerifyReport(result.label, inputs, accounts=accounts)
        names = [adapter_name(path) for path, _ in adapters]
        evidence = Evidence(model, result, placements, plan, names, imatrix=imatrix)
        if len(adapters) > 1:
            evidence.parts = [make_plan(model, [placement], PLAIN) for placement in placements]
        report.checks = list(check_tensors(plan, model, result, threads, progress))
        report.findings = grouped(causes(evidence, report.checks))
        wrong = {name for finding in report.findings for name in finding.tensors}
        for check in report.checks:
            check.holds = check.holds and check.name not in wrong
        for check in report.adapted:
            check.step = stored_step(result, result.tensors[check.name])
        report.notes = notes(report)
        if (used := result.get(IMATRIX_KEY)) and not imatrix:
            report.notes.append(
                f"merged with the importance matrix {used}: with --imatrix, tensors can be compared byte by byte"
            )
        model.check_unchanged()
        result.check_unchanged()
    return report


def notes(report: VerifyReport) -> list[str]:
    """What is worth saying of a file that holds."""
    if not report.ok or not report.adapted:
        return []
    kept, lines = report.whole.kept, []
    if rounded_to_nearest(report.adapted):
        lines.append(f"rounded to nearest: kept {kept:.2f} of the update")
    elif kept < WARN_BELOW:
        lines.append(f"kept {kept:.2f} of the update")
    if report.whole.slack > 0.5:
        lines.append(f"too few weights to tell the scale: kept {kept:.2f} ± {report.whole.standard_error:.2f}")
    return lines


def check_tensors(
    plan: Plan, model: Base, result: Base, threads: int | None, progress: Progress | None
) -> Iterable[Check]:
    """One check for each tensor of the plan that the merged file has in the same shape, in order."""
    present = [tensor for tensor in plan.tensors if fits(tensor.target, result)]
    for tensor in present:
        for info in (tensor.source, result.tensors[tensor.target.name]):
            if info.type.name not in CODECS and (tensor.changes or info.type != tensor.source.type):
                raise UnsupportedError(f"{info.name}: type {info.type} cannot be read")
    checks = {
        tensor.target.name: Check(
            tensor.target.name, tensor.source.type.name, result.tensors[tensor.target.name].type.name, tensor.changes
        )
        for tensor in present
    }

    def work(chunk: Chunk) -> tuple[int, Comparison]:
        return inspect(chunk, model, result)

    for chunk, (n_different, comparison) in in_threads(work, cut(present), threads):
        check = checks[chunk.tensor.target.name]
        check.n_different += n_different
        check.comparison += comparison
        if progress:
            progress(chunk.n_bytes, model.n_bytes, check.name)
    return checks.values()


def fits(target, result: Base) -> bool:
    found = result.tensors.get(target.name)
    return found is not None and found.shape == target.shape


def inspect(chunk: Chunk, model: Base, result: Base) -> tuple[int, Comparison]:
    """(number of bytes that differ from the base's, the comparison of the weights) of a chunk of rows.

    Equal bytes of a tensor that no adapter touches need no comparison; of another type, all bytes count as different.
    """
    source, target = chunk.tensor.source, result.tensors[chunk.tensor.target.name]
    if isinstance(chunk, New):
        return inspect_new(chunk, result)
    before = model.reader_of(source.name).read(source, chunk.first, chunk.n_rows)
    after = result.reader_of(target.name).read(target, chunk.first, chunk.n_rows)
    n_different = after.size if source.type != target.type else int(np.count_nonzero(before != after))
    if chunk.tensor.changes and isinstance(chunk, Changed):
        delta = update_of(chunk, before)
        return n_different, compare_rows(CODECS[source.type.name], CODECS[target.type.name], before, after, delta)
    if not n_different or source.type.name not in CODECS:
        return n_different, Comparison()
    comparison = Comparison()
    for rows in row_slices(chunk.n_rows, source.n_cols):
        nothing = np.zeros((len(before[rows]), source.n_cols), np.float32)
        quants = CODECS[source.type.name], CODECS[target.type.name]
        comparison += compare_rows(*quants, before[rows], after[rows], nothing)
    return n_different, comparison


def inspect_new(chunk: New, result: Base) -> tuple[int, Comparison]:
    """``inspect`` for rows that the base lacks: they should be what the type's own quantizer makes of the adapter's."""
    target = result.tensors[chunk.tensor.target.name]
    after = result.reader_of(target.name).read(target, chunk.first, chunk.n_rows)
    tensor = replace(chunk.tensor, target=target)
    wanted = encoded(replace(chunk, tensor=tensor))
    n_different, comparison, quant = int(np.count_nonzero(wanted != after)), Comparison(), CODECS[target.type.name]
    if n_different:
        comparison += compare_rows(quant, quant, wanted, after, np.zeros_like(chunk.rows))
    return n_different, comparison


def row_slices(n_rows: int, n_cols: int) -> list[slice]:
    n = max(1, CHUNK_WEIGHTS // n_cols)
    return [slice(first, first + n) for first in range(0, n_rows, n)]
