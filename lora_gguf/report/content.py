"""What the page of each command says: the command's ``--json`` dict as it is, and how to show it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_gguf.adapters.adapter import adapter_name
from lora_gguf.checks.checkup import DoctorReport
from lora_gguf.checks.compared import CompareReport
from lora_gguf.checks.keeping import judgement
from lora_gguf.checks.remarks import WARNING
from lora_gguf.commands.merge import MergeReport
from lora_gguf.commands.next_steps import next_steps
from lora_gguf.commands.verify import VerifyReport
from lora_gguf.errors import printable
from lora_gguf.merging.loss import loss_text
from lora_gguf.merging.retention import WARN_BELOW
from lora_gguf.text import size_of

CACHED = re.compile(
    r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<rest>.*)$", re.ASCII
)
Adapters = Sequence[tuple[str | os.PathLike, float]]


@dataclass(frozen=True)
class Column:
    """A column of a table on the page: the rows' key, its title, and how its values are shown ("" as they are, "bytes",
    or like d3).

    ``under`` is the key of a type that is told beside the value; a ``minor`` column is left out on a narrow screen.
    """

    key: str
    title: str
    format: str = ""
    under: str | None = None
    minor: bool = False


_KIND, _COUNT, _KEPT = (
    Column("kind", "tensors", under="type"),
    Column("count", "count", "d"),
    Column("kept", "delta kept", ".3f"),
)
ACCOUNTS = [
    Column("tensor", "adapter tensor"),
    Column("outcome", "outcome"),
    Column("target", "target"),
    Column("reason", "reason"),
]
MERGED_KINDS = [
    _KIND, _COUNT, _KEPT, Column("changed", "codes changed", ".1%"), Column("delta_per_step", "delta / step", ".2g"),
    Column("noise", "noise / delta", ".1f"),
]  # fmt: skip
VERIFIED_KINDS = [
    _KIND, _COUNT, Column("wrong", "wrong", "d"), _KEPT, Column("standard_error", "±", ".3f", minor=True),
    Column("noise", "noise / delta", ".1f"), Column("noise_expected", "of rounding", ".1f", minor=True),
]  # fmt: skip
WAYS = [
    Column("options", "merge with"), _KEPT, Column("expected_loss", "effect lost, about", ".1%"),
    Column("n_bytes", "file", "bytes"), Column("noise", "noise / delta", ".1f", minor=True),
]  # fmt: skip
ANSWERS = [
    Column("prompt", "prompt"), Column("base", "the base"), Column("adapter", "with the adapter at run time"),
    Column("merged", "the merged file"),
]  # fmt: skip
NEAR = [
    Column("model", ""),
    Column("same", "same next token", ".1%"),
    Column("agreement", "or one as likely", ".1%"),
    Column("kl", "KL from the adapter", ".4f"),
    Column("strength", "the adapter's effect", ".0%"),
]
REMARKS = [Column("topic", "about"), Column("level", "level"), Column("text", "found")]


@dataclass(frozen=True)
class Table:
    """A table on the page: the rows that the report has under ``key``, and a last one, ``total``."""

    title: str
    key: str
    columns: list[Column]
    total: dict | None = None


@dataclass
class Content:
    """One page: ``report`` is the ``--json`` dict, ``rows`` the key of its list of tensors.

    ``accounts`` are the columns of the table of what became of the adapter's tensors, ``files`` pairs of role and path,
    ``run`` the command lines to go on with. ``best`` are the options in the row that is recommended.
    """

    title: str
    figure: dict
    lines: list[str]
    warnings: list[str]
    report: dict
    rows: str
    measures: Sequence[str]
    tables: list[Table]
    files: list[tuple[str, str | os.PathLike]] = field(default_factory=list)
    accounts: list[Column] = field(default_factory=lambda: ACCOUNTS)
    run: list[str] = field(default_factory=list)
    tables_first: bool = False
    best: str = ""


def of_merge(report: MergeReport, base: str | os.PathLike, adapters: Adapters, rounding: str) -> Content:
    """Return the page of a merge, or of its dry run."""
    data, whole = report.as_dict(), report.whole
    n_merged, n_copied = len(data["merged"]), len(data["copied"])
    figure = {
        "value": percent_text(whole.kept),
        "label": f"of the fine-tune is kept{lost(report.expected_loss)}",
        "badge": badge(whole.kept, report.expected_loss),
        "bad": not whole.kept >= WARN_BELOW,
    }
    if not whole.n_weights:
        figure = {
            "value": str(n_merged),
            "label": "tensors would change: a dry run, nothing was merged or measured",
            "bad": False,
        }
    return Content(
        title=f"Merge of {_names(adapters)} into {Path(base).name}",
        figure=figure,
        lines=[f"{n_merged} tensors merged, {n_copied} copied as they are. Rounding: {rounding}. {_accounted(data)}"],
        warnings=report.plan.warnings,
        report=data,
        rows="merged",
        measures=("kept", "delta_per_step", "delta_norm", "changed", "noise", "type"),
        tables=[
            Table("By kind of tensor", "kinds", MERGED_KINDS, {"kind": "all merged", "count": n_merged, **data["all"]})
        ],
        files=[*report.inputs, *(("output", path) for path in report.written)],
        run=list(next_steps(report, os.fspath(base), adapters)),
    )


def of_verify(report: VerifyReport, merged: str | os.PathLike, base: str | os.PathLike, adapters: Adapters) -> Content:
    """Return the page of a verification."""
    data = report.as_dict()
    whole, untouched, n_adapted = data["all"], data["untouched"], len(data["tensors"])
    verdict = {
        "right": "holds its base plus the adapter, within rounding",
        "wrong": "does not hold its base plus the adapter",
        "unproved": "cannot be proved to hold its base plus the adapter",
    }[report.verdict]
    error = "" if math.isnan(whole["standard_error"]) else f", ± {whole['standard_error']:.3f}"
    changed = f", {len(untouched['changed'])} changed" if untouched["changed"] else ""
    return Content(
        title=f"{Path(merged).name} {verdict}",
        figure={"value": percent_text(data["kept"]),
                "label": f"of the update is in the file{error}{lost(report.expected_loss)}", "badge": report.verdict,
                "bad": not report.ok or data["kept"] < WARN_BELOW},
        lines=[
            f"Compared with {Path(base).name} and {_names(adapters)}: {n_adapted} adapted tensors, {whole['wrong']} "
            f"wrong; of the others {untouched['identical']} identical, {len(untouched['requantized'])} "
            f"requantized{changed}."
        ],
        warnings=[*map(str, report.findings), *report.missing, *report.notes],
        report=data,
        rows="tensors",
        measures=("holds", "kept", "delta_per_step", "delta_norm", "noise", "correlation", "type"),
        tables=[Table("By kind of tensor", "kinds", VERIFIED_KINDS, whole)],
        files=report.inputs,
    )  # fmt: skip


def of_doctor(report: DoctorReport, base: str | os.PathLike, adapters: Adapters) -> Content:
    """Return the page of a checkup."""
    data = report.as_dict()
    if report.ok:
        kept = report.outlooks[0].kept
        figure = {
            "value": percent_text(kept),
            "label": f"of the fine-tune would be kept{lost(report.outlooks[0].expected_loss)}",
            "badge": badge(kept, report.outlooks[0].expected_loss),
            "bad": not kept >= WARN_BELOW,
        }
    else:
        figure = {"value": "refused", "label": str(report.refusal), "bad": True}
    ways = [f"kept.{way.name}" for way in report.outlooks]
    return Content(
        title=f"{_names(adapters)} in {Path(base).name}: a merge will {'work' if report.ok else 'not work'}",
        figure=figure,
        lines=[line for line in (report.recommendation,) if line],
        warnings=[f"{remark.topic}: {remark.text}" for remark in report.remarks if remark.level == WARNING],
        report=data,
        rows="tensors",
        measures=("delta_per_step", *ways, "delta_norm", "type"),
        tables=[Table("Ways to merge", "outlooks", WAYS), Table("What was looked at", "remarks", REMARKS)],
        files=report.inputs,
        tables_first=True,
        best=best_way(report),
    )


def best_way(report: DoctorReport) -> str:
    """Return the options of the way to merge that the report recommends."""
    named = [way.options for way in report.outlooks if way.options in report.recommendation]
    return max(named, key=len, default="")


def badge(kept: float, loss: float | None) -> str:
    """Return in a word whether what a merge keeps and loses is good; nothing where there is nothing to keep."""
    return judgement(kept, loss) if math.isfinite(kept) else ""


def lost(loss: float | None) -> str:
    """Return as a part of a sentence what is expected to be lost of the fine-tune's effect; nothing if not known."""
    return "" if loss is None else f"; {loss_text(loss)} of its effect lost (within a factor of 2)"


def percent_text(share: float) -> str:
    """Return a share of one as per cent for a reader; n/a where there is nothing to share."""
    return f"{share:.0%}" if math.isfinite(share) else "n/a"


def of_compare(
    report: CompareReport, base: str | os.PathLike, adapters: Adapters, merged: str | os.PathLike
) -> Content:
    """Return the page of a comparison: no charts, but the answers."""
    data = report.as_dict()
    answers = [{"prompt": part["prompt"], **part["answers"]} for part in data["prompts"]]
    rows = (("base", "the base"), ("again", "the adapter, asked again"), ("merged", "the merged file"))
    near = [{"model": label, **data[name]} for name, label in rows]
    return Content(
        title=f"{report.merged_name} beside {_names(adapters)} at run time",
        figure={
            "value": f"{report.merged.same:.0%}",
            "label": f"of {report.merged.n_tokens} next tokens are the adapter's (its own, asked again: "
            f"{report.again.same:.0%})",
            "badge": report.judgement,
            "bad": not report.ok,
        },
        lines=[report.verdict],
        warnings=[],
        report=data | {"answers": answers, "near": near, "tensors": []},
        rows="tensors",
        measures=(),
        tables=[Table("How near they are", "near", NEAR), Table("What they answer", "answers", ANSWERS)],
        files=[("base", base), *(("adapter", path) for path, _ in adapters), ("merged", merged)],
    )


def _names(adapters: Adapters) -> str:
    return " and ".join(adapter_name(path) + ("" if scale == 1 else f" × {scale:g}") for path, scale in adapters)


def _accounted(data: dict) -> str:
    applied = sum(account["outcome"] == "applied" for account in data["accounts"])
    return f"{applied} of {len(data['accounts'])} adapter tensors applied."


def file_rows(files: Sequence[tuple[str, str | os.PathLike]]) -> list[dict]:
    """Return the files' roles, names, and sizes in bytes; a folder's size is that of the files in it."""
    return [{"role": role, "name": file_name(path), "size": size_of(path)} for role, path in files]


def file_name(path: str | os.PathLike[str]) -> str:
    """Return what to call a file: of the Hub's cache OWNER/NAME@COMMIT and its name there, else its path."""
    found = CACHED.search(Path(path).as_posix())
    if not found:
        return printable(path)
    return printable(f"{found['owner']}/{found['name']}@{found['commit'][:12]}{found['rest']}")
