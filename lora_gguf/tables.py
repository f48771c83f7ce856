"""Reports as text tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence

from lora_gguf.merge import MergeReport
from lora_gguf.retention import Retention, total


def text_table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Columns as wide as their widest cell, the first ``left`` aligned left, the others right."""
    lines = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return "\n".join("  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths)).rstrip() for line in lines)


def retention_table(report: MergeReport) -> str:
    """One line per kind of tensor and one for the whole."""
    rows = [
        _row(kind, f"{before} > {after}" if before != after else before, len(parts), total(parts))
        for (kind, before, after), parts in report.by_kind().items()
    ]
    rows.append(_row("all merged", "", len(report.plan.merged), report.whole))
    return text_table(("tensors", "type", "count", "delta kept", "codes changed", "rms(delta)", "noise/delta"), rows, left=2)


def _row(kind: str, types: str, count: int, part: Retention) -> tuple:
    if not part.n_weights:
        return (kind, types, count, "-", "-", "-", "-")
    return (kind, types, count, f"{part.kept:.3f}", f"{part.changed:.2%}", f"{part.delta_rms:.2e}", f"{part.noise:.1f}")


def as_dict(report: MergeReport) -> dict:
    """The report as plain data for JSON: the whole, and each merged tensor."""
    tensors = [
        {
            "name": tensor.target.name,
            "type": tensor.target.type.name,
            "base_type": tensor.source.type.name,
            "shape": list(tensor.source.shape),
            "rank": sum(pair.rank for pair in tensor.pairs),
            **report.retention.get(tensor.target.name, Retention()).as_dict(),
        }
        for tensor in report.plan.merged
    ]
    copied = [tensor.target.name for tensor in report.plan.tensors if not tensor.recipe]
    return {"merged": tensors, "copied": copied, "all": report.whole.as_dict(), "warnings": report.plan.warnings}
