"""Spend a size budget where it buys the most fidelity: promote the adapted tensors that rounding disturbs most per
byte.

What dither adds to a tensor has the energy Σ |delta|·step; its output is disturbed by that relative to Σ W². The ratio
over the bytes that a promotion costs ranks the tensors. A few rows tell both sums.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_gguf.files.base import Base, evenly
from lora_gguf.merging.plan import Plan, TensorPlan
from lora_gguf.merging.work import Chunk, stack, update_of
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS

PROMOTED = "Q8_0"
SAMPLE_ROWS = 16


def promote(plan: Plan, base: Base, max_growth: float) -> None:
    """Give the tensors that gain most per byte the type Q8_0, while the tensors grow by at most ``max_growth`` of their
    size.
    """
    if not max_growth:
        return
    target, ranked = BY_NAME[PROMOTED], []
    for tensor in plan.merged:
        info = tensor.source
        cost = info.n_elements // target.block_size * target.block_bytes - info.n_bytes
        if tensor.recipe.keeps_grid and tensor.recipe.source.grid and cost > 0 and info.n_cols % target.block_size == 0:
            ranked.append((disturbance(tensor, base) / cost, cost, tensor))
    budget = max_growth * base.n_bytes
    for _, cost, tensor in sorted(ranked, key=lambda entry: -entry[0]):
        if cost <= budget:
            budget -= cost
            tensor.target = replace(tensor.target, type=target)
            tensor.recipe = replace(tensor.recipe, target=CODECS[PROMOTED])


def disturbance(tensor: TensorPlan, base: Base) -> float:
    """The energy that dither adds to a tensor relative to that of its weights, from a sample of its rows."""
    info, quant = tensor.source, tensor.recipe.source
    n_out, n_cols = info.shape[-2:]
    a, b = stack(tensor.pairs, info.n_rows // n_out, n_out, n_cols)
    noise = energy = 0.0
    for row in evenly(info.n_rows, SAMPLE_ROWS):
        matrix, i = divmod(int(row), n_out)
        blocks = base.reader_of(info.name).read(info, int(row), 1)
        delta = update_of(Chunk(tensor, int(row), 1, matrix, a[matrix], b[matrix, i : i + 1]), blocks)
        codes, steps = np.empty((1, n_cols), np.int8), np.empty((1, n_cols // quant.grid.group), np.float32)
        weights = np.empty((1, n_cols), np.float32)
        quant.grid.unpack(blocks, codes, steps)
        quant.decode(blocks, weights)
        noise += float((np.abs(delta) * np.abs(np.repeat(steps, quant.grid.group, axis=1))).sum())
        energy += float((weights.astype(np.float64) ** 2).sum())
    return noise / energy if energy else 0.0
