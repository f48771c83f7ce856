"""Path 2: a base GGUF and an adapter become one standalone GGUF."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from lora_gguf import __version__
from lora_gguf.errors import NumericError, UsageError
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.gguf_writer import GgufWriter, key_value, raw_key_values
from lora_gguf.lora import LoraPair
from lora_gguf.placement import Account
from lora_gguf.plan import Plan, TensorPlan, make_plan
from lora_gguf.requantize import recode
from lora_gguf.retention import Retention, kind_of, total
from lora_gguf.rounding import low_rank
from lora_gguf.sources import adapter_name, placement_of

CHUNK_WEIGHTS = 1 << 18
COPY_BYTES = 16 << 20
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


def merge(
    base: str | os.PathLike,
    adapters: Sequence[tuple[str | os.PathLike, float]],
    out: str | os.PathLike | None,
    *,
    rounding: str = "dither",
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Add the updates of ``adapters`` to ``base`` and write the result, in the base's own types, to ``out``.

    Each adapter is a PEFT directory or an adapter GGUF with the factor that multiplies its own scale; their updates are
    summed in f32 and rounded once. ``rounding`` is one of ``requantize.SPREADS``; ``out`` None only plans. ``progress`` is
    called with (bytes done since the last call, bytes in all, tensor name).
    Raises the subclasses of ``LoraGgufError``, before the first byte is written wherever that is possible.
    """
    with GgufReader(base) as reader:
        placements = [placement_of(path, reader, scale) for path, scale in adapters]
        plan = make_plan(reader, [pair for placement in placements for pair in placement.pairs], rounding=rounding, seed=seed)
        report = MergeReport(plan, [account for placement in placements for account in placement.accounts])
        if out is None:
            return report
        key_values = merged_key_values(reader, adapters, rounding, seed)
        targets = [tensor.target for tensor in plan.tensors]
        inputs = [base, *(path for path, _ in adapters)]
        with GgufWriter(out, key_values, targets, alignment=reader.alignment, force=force, inputs=inputs) as writer:
            for tensor, n_bytes, outcome in run(jobs(plan, reader, writer), threads):
                if outcome is not None:
                    report.retention.setdefault(tensor.source.name, Retention()).add(*outcome)
                if progress:
                    progress(n_bytes, reader.size - reader.data_position, tensor.source.name)
            reader.check_unchanged()
            writer.commit()
    return report


def merged_key_values(reader: GgufReader, adapters, rounding: str, seed: int) -> list[bytes]:
    """The base's key/value pairs as they are, then how this file was made."""
    earlier = [key for key in reader.kv if key.startswith("lora_gguf.")]
    return [
        *raw_key_values(reader, earlier),
        key_value("lora_gguf.version", __version__, "str"),
        key_value("lora_gguf.adapter.names", [adapter_name(path) for path, _ in adapters], "str"),
        key_value("lora_gguf.adapter.scales", [float(scale) for _, scale in adapters], "f32"),
        key_value("lora_gguf.rounding", rounding, "str"),
        key_value("lora_gguf.seed", seed, "u64"),
    ]


Job = tuple[TensorPlan, int, Callable[[], tuple | None]]


def jobs(plan: Plan, reader: GgufReader, writer: GgufWriter) -> Iterator[Job]:
    """The work, in the file's order, as (tensor, bytes of the base that it takes, function)."""
    for tensor in plan.tensors:
        yield from (_merge_jobs if tensor.recipe else _copy_jobs)(tensor, reader, writer)


def _copy_jobs(tensor: TensorPlan, reader: GgufReader, writer: GgufWriter) -> Iterator[Job]:
    info, target = tensor.source, writer.tensors[tensor.source.name]
    for offset in range(0, info.n_bytes, COPY_BYTES):
        n_bytes = min(COPY_BYTES, info.n_bytes - offset)
        yield tensor, n_bytes, lambda offset=offset, n=n_bytes: writer.copy(target, reader, info, offset, n)


def _merge_jobs(tensor: TensorPlan, reader: GgufReader, writer: GgufWriter) -> Iterator[Job]:
    info = tensor.source
    a, b = stack(tensor.pairs)
    n_out = b.shape[-2]
    rows = max(1, CHUNK_WEIGHTS // info.n_cols)
    for expert in range(info.n_rows // n_out):
        for row in range(0, n_out, rows):
            n_rows, first = min(rows, n_out - row), expert * n_out + row
            factors = (a[expert], b[expert, row : row + n_rows])
            yield (
                tensor,
                n_rows * info.row_bytes,
                lambda factors=factors, first=first, n=n_rows: _merge_rows(tensor, reader, writer, factors, first, n),
            )


def stack(pairs: Sequence[LoraPair]) -> tuple[np.ndarray, np.ndarray]:
    """All updates of one tensor as one pair of factors, scales folded into b: a (E, R, in), b (E, out, R), E 1 for a matrix."""
    a = np.concatenate([np.asarray(pair.a, np.float32) for pair in pairs], axis=-2)
    b = np.concatenate([np.asarray(pair.b, np.float32) * np.float32(pair.scale) for pair in pairs], axis=-1)
    return np.ascontiguousarray(a.reshape(-1, *a.shape[-2:])), np.ascontiguousarray(b.reshape(-1, *b.shape[-2:]))


def _merge_rows(tensor: TensorPlan, reader: GgufReader, writer: GgufWriter, factors, first: int, n_rows: int):
    info, target = tensor.source, writer.tensors[tensor.source.name]
    a, b = factors
    delta = np.empty((n_rows, info.n_cols), np.float32)
    low_rank(b, a, delta)
    blocks, sums = recode(tensor.recipe, reader.read(info, first, n_rows), delta, first)
    if not np.isfinite(sums).all():
        raise NumericError(
            f"{reader.label}: {info.name}: rows {first} to {first + n_rows - 1}: NaN, infinity or overflow in the merged "
            f"{target.type}: check the base, or lower --scale"
        )
    writer.write(target, first * target.row_bytes, blocks)
    return delta.size, sums


def run(work: Iterator[Job], threads: int | None) -> Iterator[tuple[TensorPlan, int, tuple | None]]:
    """Do the jobs in ``threads`` threads, a few ahead of the results, which come in order."""
    threads = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads or os.cpu_count() or 1
    if threads < 1:
        raise UsageError(f"threads: expected at least 1, found {threads}")
    ahead: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for tensor, n_bytes, function in work:
                ahead.append((tensor, n_bytes, pool.submit(function)))
                if len(ahead) > 4 * threads:
                    tensor, n_bytes, future = ahead.popleft()
                    yield tensor, n_bytes, future.result()
            while ahead:
                tensor, n_bytes, future = ahead.popleft()
                yield tensor, n_bytes, future.result()
        finally:
            for _, _, future in ahead:
                future.cancel()


def by_kind(report: MergeReport) -> dict[tuple[str, str, str], list[Retention]]:
    """The merged tensors' retention by (kind, type before, type after), in the file's order of first appearance."""
    groups: dict[tuple[str, str, str], list[Retention]] = {}
    for tensor in report.plan.merged:
        key = (kind_of(tensor.source.name), tensor.source.type.name, tensor.target.type.name)
        groups.setdefault(key, []).append(report.retention.get(tensor.source.name, Retention()))
    return groups
