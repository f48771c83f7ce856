"""The two values of a type's grid between which a weight lies."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.merging.scratch import scratch
from lora_gguf.quants.codec import Codec


@kernel
def bracket_codes(codes, steps, after, wanted, code_min, code_max, low, high):
    """The grid's two values around ``wanted``, all f32 (rows, cols); ``steps`` is (rows, cols // group)."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    first, last, one = np.float32(code_min), np.float32(code_max - 1), np.float32(1)
    for i in range(n_rows):
        for g in range(steps.shape[1]):
            step = steps[i, g]
            inverse = np.float32(0) if step == 0 else one / step
            for j in range(g * group, (g + 1) * group):
                code = np.float32(codes[i, j])
                place = np.floor(code + (wanted[i, j] - after[i, j]) * inverse)
                place = min(max(place, first), last) - code
                below, above = after[i, j] + place * step, after[i, j] + (place + one) * step
                low[i, j], high[i, j] = min(below, above), max(below, above)


@kernel
def _place(target, levels, below, above):
    """For each of ``target`` (n,): the last level that is not above it, but for the highest, and the next level."""
    below[:], above[:] = levels[0], levels[1]
    for c in range(1, len(levels) - 1):
        for j in range(len(target)):
            reached = target[j] >= levels[c]
            below[j] = levels[c] if reached else below[j]
            above[j] = levels[c + 1] if reached else above[j]


@kernel
def bracket_levels(codes, steps, after, wanted, levels, code_min, low, high):
    """As ``bracket_codes`` on a codebook: code c stands for ``levels[c - code_min]`` steps."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    target, level = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    below, above = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    for i in range(n_rows):
        for j in range(n_cols):
            step = steps[i, j // group]
            level[j] = levels[codes[i, j] - code_min]
            target[j] = level[j] if step == 0 else level[j] + (wanted[i, j] - after[i, j]) / step
        _place(target, levels, below, above)
        for j in range(n_cols):
            step = steps[i, j // group]
            one, other = after[i, j] + (below[j] - level[j]) * step, after[i, j] + (above[j] - level[j]) * step
            low[i, j], high[i, j] = min(one, other), max(one, other)


def bracket_floats(type_name: str, before, delta, wanted) -> tuple[np.ndarray, np.ndarray]:
    """The two values of a float type around ``wanted``, wider by what a product of half-precision factors may be off.

    For F32 two that are a unit of bf16 apart, through which a merge may have gone.
    """
    if type_name == "F32":
        half = np.maximum(np.abs(before), np.abs(wanted)) * np.float32(2.0**-8)
        inner, outer = wanted - half, wanted + half
    else:
        unit = np.uint32(1 << {"F16": 13, "BF16": 16}[type_name])
        bits = np.ascontiguousarray(wanted).view(np.uint32) & ~(unit - np.uint32(1))
        inner, outer = bits.view(np.float32), (bits + unit).view(np.float32)
    if type_name == "F16":
        fine = np.abs(wanted) < 2.0**-14  # denormal in f16, whose unit is 2**-24
        truncated = np.trunc(wanted * np.float32(2.0**24)) * np.float32(2.0**-24)
        inner = np.where(fine, truncated, inner)
        outer = np.where(fine, truncated + np.copysign(np.float32(2.0**-24), wanted), outer)
    margin = np.abs(delta) * np.float32(2.0**-8)
    return np.minimum(inner, outer) - margin, np.maximum(inner, outer) + margin


def neighbours(quant: Codec, blocks, before, after, delta) -> tuple[np.ndarray, np.ndarray] | None:
    """``low`` and ``high`` around ``before + delta``, all f32 (rows, cols), on the grid of ``blocks``.

    None where the type's weights are not coded one by one.
    """
    wanted = np.add(before, delta, out=scratch("wanted", delta.shape))
    if quant.type.name in ("F32", "F16", "BF16"):
        return bracket_floats(quant.type.name, before, delta, wanted)
    if quant.grid is None:
        return None
    codes, steps = unpacked(quant, blocks, wanted.shape)
    low, high = scratch("low", wanted.shape), scratch("high", wanted.shape)
    if quant.grid.levels is None:
        bracket_codes(codes, steps, after, wanted, quant.grid.code_min, quant.grid.code_max, low, high)
    else:
        bracket_levels(codes, steps, after, wanted, quant.grid.levels, quant.grid.code_min, low, high)
    return low, high


def unpacked(quant: Codec, blocks: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    codes, steps = scratch("codes", shape, np.int8), np.empty((shape[0], shape[1] // quant.grid.group), np.float32)
    quant.grid.unpack(blocks, codes, steps)
    return codes, steps


def same_grid(quant: Codec, one: np.ndarray, other: np.ndarray, shape: tuple[int, int]) -> bool:
    return bool((unpacked(quant, one, shape)[1] == unpacked(quant, other, shape)[1]).all())


def free_range(wanted: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without a grid the errors themselves stand for their size: a gap of twice the error, wanted in its middle."""
    error = np.abs(after - wanted)
    return wanted - error, wanted + error
