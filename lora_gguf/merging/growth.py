"""Spend a size budget where it buys the most fidelity: promote the adapted tensors that rounding disturbs most per
byte.

Rows of each are merged as planned and in the types that it could have. What rounding adds, Σ h·E² over the columns'
importance h, relative to Σ h·W², tells how far a tensor's output is disturbed. That does more harm in the first layers,
whose output is added to little, and in the last, and less in attention. What a type takes away of the harm, over the
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
from lora_gguf.merging.retention import kind_of, layer_of
from lora_gguf.merging.rows import merge_rows
from lora_gguf.merging.tensor import FINER, TensorPlan
from lora_gguf.quants.ggml import BY_NAME, GgmlType
from lora_gguf.quants.table import CODECS

GROWN = "Q8_0"
RUNS, RUN_ROWS = 4, 16  # of a tensor that are merged to see
# the harm that the same disturbance does, as on SmolLM2 and Gemma 3: in attention beyond the first layers, and in the
# feed-forward network of the first and the last
ATTENTION, FIRST, ENDS = 1 / 3, 2, 3.0


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
    harm = harm_at(tensor.target.name, base.hparam("block_count"))
    now, error = tensor, disturbance(tensor, base, importance, weigh)
    larger = [(option, disturbance(option, base, importance, weigh)) for option in _options(tensor)]
    while larger:
        steps = []
        for option, left in larger:
            cost = option.target.n_bytes - now.target.n_bytes
            worth = harm * (error - left) / cost
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


def harm_at(name: str, n_layers: object) -> float:
    """Return how much harm a disturbance of a tensor's output does, relative to the same in a feed-forward network
    in the middle of a model.
    """
    layer = layer_of(name)
    if kind_of(name).startswith("attn"):
        return 1.0 if layer is not None and layer < FIRST else ATTENTION
    return ENDS if layer == 0 or (isinstance(n_layers, int) and layer == n_layers - 1) else 1.0


def disturbance(tensor: TensorPlan, base: Base, importance: np.ndarray, weigh: Weigh) -> float:
    """Return Σ h·E² / Σ h·W² of some rows: E what merging them adds, h the ``importance`` (matrices, cols); the
    mean of that and of what it is where all columns count alike.
    """
    info, recipe = tensor.source, tensor.wanted
    noise, energy = np.zeros(2), np.zeros(2)
    for chunk in chunks_of(tensor, _runs(tensor), weigh):
        blocks = base.reader_of(info.name).read(info, chunk.first, chunk.n_rows)
        weights = recipe.source.decoded(blocks)
        wanted = weights + update_of(chunk, blocks)
        merged, _ = merge_rows(chunk, blocks.copy())
        columns = np.stack([importance[chunk.matrix], np.ones(info.n_cols)])
        noise += columns @ np.square(recipe.target.decoded(merged) - wanted).sum(axis=0, dtype=np.float64)
        energy += columns @ np.square(weights).sum(axis=0, dtype=np.float64)
    weighted, even = np.divide(noise, energy, out=np.zeros(2), where=energy > 0)
    return float(weighted + even) / 2


def _runs(tensor: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of a tensor, each run in one matrix."""
    n_rows, n_out = tensor.source.n_rows, (1, *tensor.source.shape)[-2]
    n_run = min(RUN_ROWS, n_out)
    for i in range(RUNS):
        matrix, row = divmod((2 * i + 1) * n_rows // (2 * RUNS), n_out)
        yield matrix * n_out + min(row, n_out - n_run), n_run
