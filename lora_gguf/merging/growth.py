"""Spend a size budget where it buys the most fidelity: promote the adapted tensors that rounding disturbs most per byte.

What dither adds to a tensor has the energy Σ |delta|·step; its output is disturbed by that relative to Σ W². The ratio
over the bytes that a promotion costs ranks the tensors. A few rows tell both sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_gguf.files.base import Base, evenly
from lora_gguf.merging.chunks import chunks_of, update_of
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS

GROWN = "Q8_0"
GROWTH_ROWS = 16


def grown(tensors: Sequence[TensorPlan], base: Base, max_growth: float) -> list[TensorPlan]:
    """Return the tensors, those that gain most per byte in the type Q8_0, larger by at most ``max_growth`` of the base."""
    budget, larger = max_growth * base.n_bytes, set()
    ranked = (
        [(disturbance(tensor, base) / cost, cost, tensor) for tensor, cost in _candidates(tensors)] if budget else []
    )
    for _, cost, tensor in sorted(ranked, key=lambda entry: -entry[0]):
        if cost <= budget:
            budget -= cost
            larger.add(tensor.target.name)
    return [_promoted(tensor) if tensor.target.name in larger else tensor for tensor in tensors]


def _candidates(tensors: Sequence[TensorPlan]) -> list[tuple[TensorPlan, int]]:
    """Return the tensors that could grow, each with the bytes that it would cost."""
    grown_type, found = BY_NAME[GROWN], []
    for tensor in tensors:
        if tensor.changes and tensor.recipe.keeps_grid and tensor.recipe.source.grid:
            info = tensor.source
            cost = info.n_elements // grown_type.block_size * grown_type.block_bytes - info.n_bytes
            if cost > 0 and info.n_cols % grown_type.block_size == 0:
                found.append((tensor, cost))
    return found


def _promoted(tensor: TensorPlan) -> TensorPlan:
    target = replace(tensor.target, type=BY_NAME[GROWN])
    return replace(tensor, target=target, recipe=replace(tensor.recipe, target=CODECS[GROWN]))


def disturbance(tensor: TensorPlan, base: Base) -> float:
    """Return the energy that dither adds to a tensor relative to that of its weights, from a sample of its rows."""
    info, codec = tensor.source, tensor.recipe.source
    grid, n_cols = codec.grid, info.n_cols
    noise = energy = 0.0
    for chunk in chunks_of(tensor, ((int(row), 1) for row in evenly(info.n_rows, GROWTH_ROWS))):
        blocks = base.reader_of(info.name).read(info, chunk.first, 1)
        delta = update_of(chunk, blocks)
        codes, steps = np.empty((1, n_cols), np.int8), np.empty((1, n_cols // grid.group), np.float32)
        grid.unpack(blocks, codes, steps)
        noise += float((np.abs(delta) * np.abs(np.repeat(steps, grid.group, axis=1))).sum())
        energy += float((codec.decoded(blocks).astype(np.float64) ** 2).sum())
    return noise / energy if energy else 0.0
