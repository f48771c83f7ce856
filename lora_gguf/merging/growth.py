"""Spend a size budget where it buys the most fidelity: promote the adapted tensors that rounding disturbs most per
byte.

Rows of each are merged as planned and in the types that it could have. What rounding adds, Σ h·E² over the columns'
importance h, relative to Σ h·W², tells how far a tensor's output is disturbed; what a type takes away of that, over the
bytes that it costs, ranks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lora_gguf.files.base import Base
from lora_gguf.merging.chunks import Weigh, chunks_of, update_of
from lora_gguf.merging.importance import importance_of, weigher
from lora_gguf.merging.options import Policy
from lora_gguf.merging.rows import merge_rows
from lora_gguf.merging.tensor import FINER, TensorPlan
from lora_gguf.quants.ggml import BY_NAME, GgmlType
from lora_gguf.quants.table import CODECS

GROWN = "Q8_0"
RUNS, RUN_ROWS = 2, 8  # of a tensor that are merged to see


class Step(NamedTuple):
    """What a tensor gains per byte when it grows from one type to another, and the bytes that it costs."""

    worth: float
    cost: int
    name: str
    before: GgmlType
    after: GgmlType


def grown(tensors: Sequence[TensorPlan], base: Base, policy: Policy) -> list[TensorPlan]:
    """Return the tensors, those larger that gain most per byte, by at most ``policy.max_growth`` of the base's size."""
    budget = policy.max_growth * base.n_bytes
    if not budget:
        return list(tensors)
    weigh = weigher(base)
    energies: dict[str, np.ndarray] = {}
    found = {tensor.target.name: tensor for tensor in tensors}
    steps: list[Step] = []
    for tensor in tensors:
        if tensor.changes and tensor.wanted.keeps_grid and tensor.wanted.source.grid:
            importance = importance_of(base, tensor.source.name, tensor.wanted.importance, energies)
            steps += _steps(tensor, base, importance, weigh)
    for step in sorted(steps, key=lambda step: -step.worth):
        tensor = found[step.name]
        if step.cost <= budget and tensor.target.type is step.before:
            budget -= step.cost
            found[step.name] = _promoted(tensor, step.after)
    return list(found.values())


def _steps(tensor: TensorPlan, base: Base, importance: np.ndarray, weigh: Weigh) -> Iterator[Step]:
    """Yield the steps by which a tensor can grow, each worth less than the one before."""
    now, error = tensor, disturbance(tensor, base, importance, weigh)
    larger = [(option, disturbance(option, base, importance, weigh)) for option in _options(tensor)]
    while larger:
        steps = []
        for option, left in larger:
            cost = option.target.n_bytes - now.target.n_bytes
            worth = (error - left) / cost
            steps.append((Step(worth, cost, now.target.name, now.target.type, option.target.type), option, left))
        step, now, error = max(steps, key=lambda entry: entry[0].worth)
        if step.worth <= 0:
            return
        yield step
        larger = [(option, left) for option, left in larger if option.target.n_bytes > now.target.n_bytes]


def _options(tensor: TensorPlan) -> list[TensorPlan]:
    """Return the tensor in the larger types that it could have."""
    names = [name for name in (FINER.get(tensor.source.type.name), GROWN) if name]
    fitting = [BY_NAME[name] for name in names if tensor.source.n_cols % BY_NAME[name].block_size == 0]
    options = [_promoted(tensor, type) for type in fitting]
    return [option for option in options if option.target.n_bytes > tensor.target.n_bytes]


def _promoted(tensor: TensorPlan, type: GgmlType) -> TensorPlan:
    recipe = replace(tensor.wanted, target=CODECS[type.name])
    return replace(tensor, target=replace(tensor.target, type=type), recipe=recipe)


def disturbance(tensor: TensorPlan, base: Base, importance: np.ndarray, weigh: Weigh) -> float:
    """Return Σ h·E² / Σ h·W² of some rows: E what merging them adds, h the ``importance`` (matrices, cols)."""
    info, recipe = tensor.source, tensor.wanted
    noise = energy = 0.0
    for chunk in chunks_of(tensor, _runs(tensor), weigh):
        blocks = base.reader_of(info.name).read(info, chunk.first, chunk.n_rows)
        weights, h = recipe.source.decoded(blocks), importance[chunk.matrix]
        wanted = weights + update_of(chunk, blocks)
        merged, _ = merge_rows(chunk, blocks.copy())
        noise += float((h * np.square(recipe.target.decoded(merged) - wanted)).sum(dtype=np.float64))
        energy += float((h * np.square(weights)).sum(dtype=np.float64))
    return noise / energy if energy else 0.0


def _runs(tensor: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of a tensor, each run in one matrix."""
    n_rows, n_out = tensor.source.n_rows, (1, *tensor.source.shape)[-2]
    n_run = min(RUN_ROWS, n_out)
    for i in range(RUNS):
        matrix, row = divmod((2 * i + 1) * n_rows // (2 * RUNS), n_out)
        yield matrix * n_out + min(row, n_out - n_run), n_run
