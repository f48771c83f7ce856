"""Spend a size budget where it buys the most fidelity: promote the adapted tensors that rounding disturbs most per byte.

What dither adds to a tensor has the energy Σ |delta|·step; its output is disturbed by that relative to Σ W². The ratio
over the bytes that a promotion costs ranks the tensors. A few rows tell both sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_gguf.files.base import Base, evenly
from lora_gguf.merging.chunks import chunks_of, update_of
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.quants.codec import Grid
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS

GROWN = "Q8_0"
GROWTH_ROWS = 16


def grown(tensors: Sequence[TensorPlan], base: Base, max_growth: float) -> list[TensorPlan]:
    """Return the tensors, those that gain most per byte in the type Q8_0, larger by at most ``max_growth`` of the base."""
    budget, larger = max_growth * base.n_bytes, set()
    for _, cost, name in sorted(_candidates(tensors, base), key=lambda entry: -entry[0]) if budget else ():
        if cost <= budget:
            budget -= cost
            larger.add(name)
    return [_promoted(tensor) if tensor.target.name in larger else tensor for tensor in tensors]


def _candidates(tensors: Sequence[TensorPlan], base: Base) -> Iterator[tuple[float, int, str]]:
    """Yield (what it gains per byte, the bytes that it costs, its name) of each tensor that could grow."""
    target = BY_NAME[GROWN]
    for tensor in tensors:
        if not (tensor.changes and tensor.wanted.keeps_grid and tensor.wanted.source.grid):
            continue
        info, grid = tensor.source, tensor.wanted.source.grid
        cost = info.n_elements // target.block_size * target.block_bytes - info.n_bytes
        if cost > 0 and info.n_cols % target.block_size == 0:
            yield disturbance(tensor, grid, base) / cost, cost, tensor.target.name


def _promoted(tensor: TensorPlan) -> TensorPlan:
    target = replace(tensor.target, type=BY_NAME[GROWN])
    return replace(tensor, target=target, recipe=replace(tensor.wanted, target=CODECS[GROWN]))


def disturbance(tensor: TensorPlan, grid: Grid, base: Base) -> float:
    """Return the energy that dither adds to a tensor relative to that of its weights, from a sample of its rows."""
    info, codec = tensor.source, tensor.wanted.source
    noise = energy = 0.0
    for chunk in chunks_of(tensor, ((int(row), 1) for row in evenly(info.n_rows, GROWTH_ROWS))):
        blocks = base.reader_of(info.name).read(info, chunk.first, 1)
        delta = update_of(chunk, blocks)
        codes, steps = np.empty((1, info.n_cols), np.int8), np.empty((1, info.n_cols // grid.group), np.float32)
        grid.unpack(blocks, codes, steps)
        noise += float((np.abs(delta) * np.abs(np.repeat(steps, grid.group, axis=1))).sum())
        energy += float((codec.decoded(blocks).astype(np.float64) ** 2).sum())
    return noise / energy if energy else 0.0
