"""Prove that a merged file holds base + scale * B @ A within its types' rounding, or say what it holds instead.

Two roads lead there. A file of this version of ours says all that it takes to make it again: that is done, chunk by
chunk, and every byte compared (``reproduction.py``). Any other is compared with what other tools write, exactly
(``routes.py``), and where that is not it with what rounding may do (``comparison.py``): chance can hide that a small
part lacks the update, so this never proves a file right, but often wrong. Only where something is wrong are some
tensors read again, to name the cause (``diagnosis.py``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lora_gguf.adapters.adapter import adapter_name
from lora_gguf.adapters.lora import HEAD
from lora_gguf.checks.comparison import Comparison
from lora_gguf.checks.diagnosis import Evidence, causes
from lora_gguf.checks.examination import compared, remade
from lora_gguf.checks.findings import (
    Check,
    Finding,
    adapted_holds,
    as_doubt,
    as_error,
    grouped,
    tells_dither,
    untouched_holds,
)
from lora_gguf.checks.metadata import metadata_findings
from lora_gguf.checks.reproduction import (
    Origin,
    Placements,
    header_findings,
    origin_of,
    plan_again,
    short_findings,
    tail_findings,
)
from lora_gguf.checks.sums import UPDATE2
from lora_gguf.errors import LoraGgufError
from lora_gguf.files.base import Base
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.mapping.accounts import Account
from lora_gguf.mapping.reading import AsFound, Reading
from lora_gguf.mapping.sources import placement_of
from lora_gguf.merging.loss import harm
from lora_gguf.merging.options import Policy
from lora_gguf.merging.plan import Plan, make_plan
from lora_gguf.merging.retention import WARN_BELOW, kind_of, total
from lora_gguf.merging.steps import has_steps, stored_step, weight_rms
from lora_gguf.progress import Progress
from lora_gguf.quants.table import CODECS

PLAIN = Policy("dither")  # only where the updates go matters here, not how they would be rounded
MIXED = ("more adapters", "fewer adapters")
RIGHT, WRONG, UNPROVED = "right", "wrong", "unproved"


@dataclass
class VerifyReport:
    """What ``verify`` found: ``ok`` where the merged file holds what it should, else ``findings`` with their causes, or
    what is ``missing`` of a proof.

    ``inputs`` are the role (merged, base, adapter) and path of what was read. ``remade`` says that the merge was made
    again, ``expected_loss`` is the share of the fine-tune's effect that is lost, within a factor of two; None where it
    is not known.
    """

    label: str
    inputs: list[tuple[str, str | os.PathLike[str]]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    remade: bool = False
    expected_loss: float | None = None
    notes: list[str] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """``right``, ``wrong``, or ``unproved``: nothing speaks against the file, but it cannot be proved."""
        return WRONG if self.findings else UNPROVED if self.missing else RIGHT

    @property
    def ok(self) -> bool:
        return self.verdict == RIGHT

    @property
    def error(self) -> LoraGgufError | None:
        """The verdict as a refusal, unless it is right."""
        if self.findings:
            return as_error(self.label, self.findings)
        return as_doubt(self.label, self.missing) if self.missing else None

    @property
    def adapted(self) -> list[Check]:
        return [check for check in self.checks if check.touched]

    def by_kind(self) -> dict[tuple[str, str, str], list[Check]]:
        """Return the adapted tensors by (kind, type before, type after), in the file's order of first appearance."""
        groups: dict[tuple[str, str, str], list[Check]] = {}
        for check in self.adapted:
            groups.setdefault((kind_of(check.name), check.base_type, check.type), []).append(check)
        return groups

    @property
    def whole(self) -> Comparison:
        """All adapted tensors as one."""
        return sum((check.comparison for check in self.adapted), Comparison())

    def as_dict(self) -> dict:
        """Return the report as plain data for JSON."""
        untouched = [check for check in self.checks if not check.touched]
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "missing": self.missing,
            "remade": self.remade,
            "findings": [finding.as_dict() for finding in self.findings],
            "notes": self.notes,
            "kept": self.whole.kept,
            "expected_loss": self.expected_loss,
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
        "kind": kind, "base_type": base_type, "type": type, "count": len(checks),
        "wrong": sum(not check.holds for check in checks), "kept": found.kept, "standard_error": found.standard_error,
        "noise": found.noise, "noise_expected": found.expected_noise,
    }  # fmt: skip


def verify(
    merged: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    reading: Reading = AsFound(),
    imatrix: Imatrix | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare ``merged`` with ``base`` and ``adapters``, PEFT directories or adapter GGUFs with their factors.

    ``reading`` says how the adapters are read; ``AsFound`` makes of a tied head what the merged file does. ``imatrix``
    is the importance matrix that the merge used, if it did: with it, tensors can be merged again. ``progress`` is
    called with (bytes of the base done since the last call, bytes in all, tensor name). Raises ``MismatchError`` where
    the adapters do not fit the base, ``UnsupportedError`` for an unreadable type.
    """
    with Base(base) as model, Base(merged) as result:
        if isinstance(reading, AsFound):
            reading = replace(reading, tied="separate" if HEAD in result.tensors else "shared")
        placements = [(placement_of(path, model, reading), scale) for path, scale in adapters]
        accounts = [account for placement, _ in placements for account in placement.accounts]
        inputs = [("merged", merged), ("base", base), *(("adapter", path) for path, _ in adapters)]
        report = VerifyReport(result.label, inputs, accounts=accounts)
        evidence = evidence_of(model, result, placements, [adapter_name(path) for path, _ in adapters])
        origin = origin_of(result, model, placements, imatrix)
        again = plan_again(model, result, origin)
        if again:
            make_again(report, evidence, origin, again, (threads, progress))
        else:
            compare(report, evidence, origin, imatrix, (threads, progress))
        for check in report.adapted:
            check.step = stored_step(result, result.tensors[check.name])
        if not report.findings:
            report.expected_loss = loss_of(report, model, again or evidence.plan)
        report.notes = notes(report)
        model.check_unchanged()
        result.check_unchanged()
    return report


def evidence_of(model: Base, result: Base, placements: Placements, names: list[str]) -> Evidence:
    """Return what the causes of a wrong file are found by."""
    alone = placements if len(placements) > 1 else []
    parts = [make_plan(model, [placement], PLAIN) for placement in alone]
    return Evidence(model, result, make_plan(model, placements, PLAIN), names, parts)


def loss_of(report: VerifyReport, model: Base, plan: Plan) -> float | None:
    """Return what share of the effect of a file's updates is lost, of one that was not made again as by rounding that
    moved no grid; None where it is not known.
    """
    by_name = {tensor.target.name: tensor for tensor in plan.tensors}
    parts = []
    for check in report.adapted:
        tensor, part = by_name[check.name], check.comparison.as_kept()
        moved = report.remade and tensor.wanted.moves_grid
        caused = harm(tensor.wanted.source, CODECS[check.type], moved)
        part.measure(check.step, weight_rms(model, tensor.source), caused)
        parts.append(part)
    return total(parts).expected_loss


Work = tuple[int | None, Progress | None]


def make_again(report: VerifyReport, evidence: Evidence, origin: Origin, plan: Plan, work: Work) -> None:
    """Take the first road: every byte must be that of the same merge."""
    models = evidence.model, evidence.result
    checks = remade(plan, models, *work)
    others = list(header_findings(origin, *models, plan))
    others = others or ([origin.finding] if origin.finding else [])
    others += [*tail_findings(evidence.result), *short_findings(evidence.result)]
    report.remade = True
    for check in checks.values():
        check.holds = check.proved = not check.n_wrong
    if any(not check.holds for check in checks.values()):
        statistics = compared(evidence.plan, models, None, work[0], None)
        for name, check in statistics.items():
            check.n_wrong, check.holds, check.proved = checks[name].n_wrong, checks[name].holds, checks[name].holds
        checks = statistics
    report.checks = list(checks.values())
    settle(report, evidence, others)


def compare(report: VerifyReport, evidence: Evidence, origin: Origin, imatrix: Imatrix | None, work: Work) -> None:
    """Take the second road: exactly what another tool writes, or what rounding may do, and no more."""
    models = evidence.model, evidence.result
    report.checks = list(compared(evidence.plan, models, imatrix, *work).values())
    for check in report.checks:
        check.proved = check.n_unexplained == 0 and (check.comparison.is_finite or check.identical)
    dithered = tells_dither(report.checks)
    for check in report.checks:
        check.holds = adapted_holds(check, dithered) if check.touched else untouched_holds(check)
    settle(report, evidence, [*metadata_findings(*models, evidence.plan), *tail_findings(evidence.result)])
    if origin.finding and origin.finding.cause in MIXED:
        others = [finding for finding in report.findings if finding.cause in ("metadata", "shape")]
        report.findings = [origin.finding, *others]  # the comparison with other adapters tells nothing more
    elif origin.finding and not any(finding.cause in (origin.finding.cause, "sign") for finding in report.findings):
        report.findings.append(origin.finding)
    left = [
        check for check in report.checks if not check.proved and not (check.is_faint and check.comparison.is_erased)
    ]
    if left and not report.findings:
        report.missing.append(unexplained(left, report, origin))


def settle(report: VerifyReport, evidence: Evidence, others: Sequence[Finding]) -> None:
    """Find the causes of what does not hold, or say what the file does not show."""
    report.findings = grouped(causes(evidence, report.checks, others))
    wrong = {name for finding in report.findings for name in finding.tensors}
    for check in report.checks:
        check.holds = check.holds and check.name not in wrong
    faint = [check for check in report.adapted if check.is_faint and (check.proved or check.comparison.is_erased)]
    if faint and not report.findings:
        report.missing.append(too_faint(faint, report))


def too_faint(faint: Sequence[Check], report: VerifyReport) -> str:
    """Return what to say of tensors whose types are too coarse for the update."""
    of_faint = sum((check.comparison for check in faint), Comparison())
    names = f"{len(faint)} of {len(report.adapted)} adapted tensors, such as {faint[0].name}"
    on_grid = all(check.type == check.base_type and has_steps(CODECS[check.type]) for check in faint)
    return (
        f"{names} ({faint[0].type}): kept {of_faint.kept:.2f} of the update: it is not in the file, or smaller than "
        f"its type can show; merge with {'--rounding auto' if on_grid else '--type Q8_0'}"
    )


def unexplained(checks: Sequence[Check], report: VerifyReport, origin: Origin) -> str:
    """Return what to say of tensors against which nothing speaks, but that no known way of rounding gives."""
    whole = report.whole
    names = f"{len(checks)} of {len(report.checks)} tensors, such as {checks[0].name}"
    why = origin.why or "it does not say how it was made"
    return (
        f"{names}: nothing speaks against them (kept {whole.kept:.2f} ± {whole.standard_error:.2f} of the update in "
        f"all), but no rounding that is known gives their bytes, and chance can hide a small part without the update; "
        f"{why}"
    )


def notes(report: VerifyReport) -> list[str]:
    """Return what is worth saying of a file that holds."""
    if report.findings or not report.adapted:
        return []
    whole = report.whole
    if not whole.sums[UPDATE2] > 0:
        return ["the adapters change nothing: the update is zero"]
    if whole.kept < WARN_BELOW:
        return [f"kept {whole.kept:.2f} of the update"]
    return []
