"""Reports as text tables and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_gguf.mapping.accounts import summary
from lora_gguf.merging.retention import Retention, kind_of, total
from lora_gguf.text import share_text, text_table

if TYPE_CHECKING:
    from lora_gguf.checks.findings import Check
    from lora_gguf.commands.extract import Extraction
    from lora_gguf.commands.merge import MergeReport
    from lora_gguf.commands.verify import VerifyReport

HEAD = ("tensors", "type", "count", "kept", "codes changed", "rms(delta)", "noise/delta")
SHORT = 4  # columns
VERIFIED = ("tensors", "type", "count", "verdict", "kept", "noise/delta", "expected")
VERIFIED_SHORT = 5


def retention_table(report: MergeReport, verbose: bool = False) -> str:
    """Return one line per kind of tensor, one for the whole, for the mmproj likewise, and what became of the adapters'
    tensors; ``verbose`` with all that was measured.
    """
    rows = [
        *_merged_rows(report, "all merged"),
        *(_merged_rows(report.mmproj, "all of the mmproj") if report.mmproj else ()),
    ]
    measured = (len(HEAD) if verbose else SHORT) if report.retention else 3  # columns: a dry run measures nothing
    table = text_table(HEAD[:measured], [row[:measured] for row in rows], left=2)
    return "\n".join([table, *summary(report.accounts, "applied" if report.written else "would be applied")])


def _merged_rows(report: MergeReport, whole: str) -> list[tuple]:
    rows = [
        _row(kind, f"{before} > {after}" if before != after else before, len(parts), total(parts))
        for (kind, before, after), parts in report.by_kind().items()
    ]
    return [*rows, _row(whole, "", len(report.plan.merged), report.whole)]


def _row(kind: str, types: str, count: int, part: Retention) -> tuple:
    if not part.n_weights:
        return (kind, types, count, "-", "-", "-", "-")
    return (
        kind,
        types,
        count,
        share_text(part.kept),
        f"{part.changed:.2%}",
        f"{part.delta_rms:.2e}",
        f"{part.noise:.1f}",
    )


def verify_table(report: VerifyReport, verbose: bool = False) -> str:
    """Return one line per kind of adapted tensor, one for all of them, one for the rest of the file; ``verbose`` with
    all that was measured.
    """
    rows = [
        _verify_row(kind, f"{before} > {after}" if before != after else before, checks)
        for (kind, before, after), checks in report.by_kind().items()
    ]
    rows.append(_verify_row("all adapted", "", report.adapted))
    rest = [check for check in report.checks if not check.touched]
    rows.append(("untouched", "", len(rest), _verdict(rest), "-", "-", "-"))
    measured = len(VERIFIED) if verbose else VERIFIED_SHORT
    return text_table(VERIFIED[:measured], [row[:measured] for row in rows], left=2)


def _verify_row(kind: str, types: str, checks: Sequence[Check]) -> tuple:
    from lora_gguf.checks.comparison import Comparison

    found = sum((check.comparison for check in checks), Comparison())
    exact = math.isnan(found.standard_error)  # made again: nothing was left to chance
    kept = f"{found.kept:.3f}" + ("" if exact else f" ± {found.standard_error:.3f}")
    expected = "-" if exact else f"{found.expected_noise:.1f}"
    measured = (kept, f"{found.noise:.1f}", expected) if checks else ("-", "-", "-")
    return (kind, types, len(checks), _verdict(checks), *measured)


def _verdict(checks: Sequence[Check]) -> str:
    if not checks:
        return "-"
    wrong = sum(not check.holds for check in checks)
    unproved = sum(check.is_faint or not check.proved for check in checks)
    return f"{wrong} wrong" if wrong else f"{unproved} unproved" if unproved else "proved"


def extraction_table(found: Extraction) -> str:
    """Return one line per kind of tensor: how large its update is beside the weights, and how much of its energy the
    rank holds.
    """
    groups: dict[str, list] = {}
    for tensor in found.tensors:
        groups.setdefault(kind_of(tensor.name), []).append(tensor)
    rows = [
        (kind, len(group), f"{max(t.relative_size for t in group):.2e}", f"{min(t.kept for t in group):.3f}")
        for kind, group in groups.items()
    ]
    return text_table(("tensors", "count", "largest |update|/|weights|", "least energy kept"), rows)
