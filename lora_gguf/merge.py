"""Path 2: a base GGUF and an adapter become one standalone GGUF."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_gguf import __version__
from lora_gguf.chunks import carry_out, cut, in_threads
from lora_gguf.errors import NumericError
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.gguf_writer import GgufWriter, key_value, raw_key_values
from lora_gguf.placement import Account
from lora_gguf.plan import Plan, Policy, make_plan
from lora_gguf.retention import Retention, kind_of, total
from lora_gguf.sources import adapter_name, placement_of

Progress = Callable[[int, int, str], None]


@dataclass
class MergeReport:
    """What a merge did: its plan, the account of each adapter's tensors, and per merged tensor what was kept."""

    plan: Plan
    accounts: list[Account]
    retention: dict[str, Retention] = field(default_factory=dict)

    @property
    def whole(self) -> Retention:
        return total(self.retention.values())

    def by_kind(self) -> dict[tuple[str, str, str], list[Retention]]:
        """The merged tensors' retention by (kind, type before, type after), in the file's order of first appearance."""
        groups: dict[tuple[str, str, str], list[Retention]] = {}
        for tensor in self.plan.merged:
            key = (kind_of(tensor.source.name), tensor.source.type.name, tensor.target.type.name)
            groups.setdefault(key, []).append(self.retention.get(tensor.source.name, Retention()))
        return groups


def merge(
    base: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float]],
    out: str | os.PathLike | None,
    policy: Policy = Policy(),
    *,
    min_retention: float = 0.0,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Add the updates of ``adapters`` to ``base`` and write the result to ``out``.

    Each adapter is a PEFT directory or an adapter GGUF with the factor that multiplies its own scale; their updates are
    summed in f32 and rounded once, as ``policy`` says. ``out`` None only plans. ``progress`` is called with (bytes of the
    base done since the last call, bytes in all, tensor name).
    Raises the subclasses of ``LoraGgufError``, before the first byte is written wherever that is possible;
    ``NumericError`` where less than ``min_retention`` of the update is kept. Then ``out`` stays what it was.
    """
    with GgufReader(base) as reader:
        placements = [placement_of(path, reader, scale) for path, scale in adapters]
        plan = make_plan(reader, [pair for placement in placements for pair in placement.pairs], policy)
        report = MergeReport(plan, [account for placement in placements for account in placement.accounts])
        if out is None:
            return report
        with GgufWriter(
            out,
            merged_key_values(reader, adapters, policy),
            [tensor.target for tensor in plan.tensors],
            alignment=reader.alignment,
            force=force,
            inputs=[base, *(path for path, _ in adapters)],
        ) as writer:
            for chunk, outcome in in_threads(lambda chunk: carry_out(chunk, reader, writer), cut(plan), threads):
                name = chunk.tensor.source.name
                if outcome and chunk.tensor.pairs:
                    report.retention.setdefault(name, Retention()).add(*outcome)
                if progress:
                    progress(chunk.n_bytes, reader.size - reader.data_position, name)
            check_retention(report, policy, min_retention)
            reader.check_unchanged()
            writer.commit()
    return report


def merged_key_values(reader: GgufReader, adapters: Sequence[tuple[str | os.PathLike, float]], policy: Policy) -> list[bytes]:
    """The base's key/value pairs as they are, then how this file was made."""
    earlier = [key for key in reader.kv if key.startswith("lora_gguf.")]
    return [
        *raw_key_values(reader, earlier),
        key_value("lora_gguf.version", __version__, "str"),
        key_value("lora_gguf.adapter.names", [adapter_name(path) for path, _ in adapters], "str"),
        key_value("lora_gguf.adapter.scales", [float(scale) for _, scale in adapters], "f32"),
        key_value("lora_gguf.rounding", policy.rounding, "str"),
        key_value("lora_gguf.seed", policy.seed, "u64"),
    ]


def check_retention(report: MergeReport, policy: Policy, min_retention: float) -> None:
    """Warn where little of the update was kept, or raise ``NumericError`` below ``min_retention``."""
    kept = report.whole.kept
    if kept < min_retention:
        raise NumericError(f"kept {kept:.2f} of the adapter, --min-retention is {min_retention}: {remedy(policy)}")
    if kept < WARN_BELOW:
        report.plan.warnings.append(f"only {kept:.2f} of the adapter was kept: {remedy(policy)}")


WARN_BELOW = 0.8


def remedy(policy: Policy) -> str:
    """What to try when rounding erased an adapter, with the retention to expect."""
    if policy.rounding in ("nearest", "fresh"):
        return "--rounding auto keeps about 1.00 of it at the same size"
    return "--type Q8_0 keeps about 1.00 of it in a larger file"
