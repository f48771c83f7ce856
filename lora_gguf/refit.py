"""Move a block's grid towards its update before codes are rounded.

A block's weights are ``d * s - m * o``: d and m are two f16 numbers (m is 0 in the types without a minimum), s and o what
the codes and the small integer scales make. Two free numbers for 32 or 256 weights absorb little of an update, but they
can absorb it where it counts: in large language models a few input columns carry most of the activations' energy, and
what rounding adds there is most of the damage. ``refit_row`` finds the d and m whose change fits the update best, column j
weighted by ``importance`` E[x_j²]; what is left is dithered, so that the whole stays unbiased. Two free numbers can free two
columns of a block from rounding, so it is done only in the blocks whose heaviest two are worth it: a third of them in real models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_gguf.kernel import kernel, part
from lora_gguf.lanes import N, copy, fma, load, splat, store, total
from lora_gguf.quants.half import f32_from_f16

UNTOUCHED = 0.02  # share of all importance that the heaviest columns of the blocks left out may have
_RIDGE = np.float32(1e-3)
_LARGEST = np.float32(0.5)


@dataclass(frozen=True)
class Weighting:
    """By what ``refit_row`` weighs a matrix's columns: f32 (cols,), their sums over the groups (groups,), and the blocks that it moves."""

    importance: np.ndarray
    heights: np.ndarray
    blocks: np.ndarray


def weighting(importance: np.ndarray, block_size: int, group: int, n_free: int) -> Weighting:
    """The weighting of columns of ``importance`` f32 (cols,) on blocks with ``n_free`` free numbers."""
    freed = np.sort(importance.reshape(-1, block_size), axis=1)[:, -n_free:].sum(axis=1, dtype=np.float64)
    order = np.argsort(freed, kind="stable")
    worth = order[np.cumsum(freed[order]) > UNTOUCHED * importance.sum(dtype=np.float64)]
    return Weighting(importance, importance.reshape(-1, group).sum(axis=1), np.sort(worth))


@kernel
def _pattern(row, at):
    return np.uint32(row[at]) | np.uint32(row[at + 1]) << 8


@kernel
def _put(half, row, at):
    row[at], row[at + 1] = half & 255, half >> 8


@kernel
def _half(value, up):
    """The finite f16 pattern next to ``value`` towards zero, after 2**-13 ``up`` of its unit was added: 0x1000 rounds to nearest."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    half = np.uint32((magnitude - 0x38000000 + up) >> 13)
    if magnitude < 0x38800000:  # denormal in f16, whose unit is 2**-24
        half = np.uint32(magnitude.view(np.float32) * np.float32(2.0**24) + np.float32(up) * np.float32(2.0**-13))
    return np.uint32(min(half, np.uint32(0x7BFE)) | ((bits >> 16) & 0x8000))


@part
def _best(ss, so, oo, sd, od, half_d, half_m, ridge):
    """The f16 patterns of the d and m whose change (1 + x, 1 + y) comes nearest to the update, and their x and y.

    The error is Σ h (delta - x s + y o)². Both neighbours of the best d are tried, each with the m that goes with it best.
    No branch depends on the numbers: where the processor guesses wrong, it costs more than all of this.
    """
    zero, one, two = np.float32(0.0), np.float32(1.0), np.float32(2.0)
    d, m = f32_from_f16(half_d), f32_from_f16(half_m)
    per_d, per_m, per_oo = one / d if d != 0 else zero, one / m if m != 0 else zero, one / oo if oo > 0 else zero
    det = (ss + ridge) - so * so * per_oo
    x = (sd - so * od * per_oo) / det if det > 0 else zero
    below = _half(d * (one + (x if abs(x) < _LARGEST else zero)), np.uint32(0))
    best, best_d, best_m, best_x, best_y = zero, half_d, half_m, zero, zero
    for new_d in (below, np.uint32(below + 1)):
        x = f32_from_f16(new_d) * per_d - one if d != 0 else zero
        y = (so * x - od) * per_oo
        new_m = _half(m * (one + (y if abs(y) < _LARGEST else zero)), np.uint32(0x1000))
        y = f32_from_f16(new_m) * per_m - one if m != 0 else zero
        error = x * (ss * x - two * sd) + y * (oo * y + two * (od - so * x))
        better = error < best
        best = error if better else best
        best_d, best_x = new_d if better else best_d, x if better else best_x
        best_m, best_y = new_m if better else best_m, y if better else best_y
    return best_d if d != 0 else half_d, best_m if m != 0 else half_m, best_x, best_y


@part
def _moments(unit, zero, importance, delta, first, end, steps, lows, has_m):
    """Σ h·s², Σ h·s·delta, Σ h·s·o and Σ h·o·delta over the groups ``first`` to ``end``."""
    nothing, zeros = splat(np.float32(0.0)), splat(zero)
    ss = sd = so = od = nothing
    group = len(unit) // len(steps)
    for g in range(first, end):
        uu = ud = u1 = d1 = nothing
        for j in range(g * group, (g + 1) * group, N):
            h, u, d = load(importance, j), load(unit, j) - zeros, load(delta, j)
            hu = h * u
            uu = fma(hu, u, uu)
            ud = fma(hu, d, ud)
            if has_m:
                u1 = u1 + hu
                d1 = fma(h, d, d1)
        step, low = splat(steps[g]), splat(lows[g])
        ss, sd = fma(uu, step * step, ss), fma(ud, step, sd)
        if has_m:
            so, od = fma(u1, step * low, so), fma(d1, low, od)
    return total(ss), total(sd), total(so), total(od)


@part
def _leave(unit, zero, delta, first, end, steps, lows, x, y, left):
    """What is left of ``delta`` when the groups ``first`` to ``end`` have moved by x of their steps and y of their lows."""
    zeros, group = splat(zero), len(unit) // len(steps)
    for g in range(first, end):
        moved, shifted = splat(-x * steps[g]), splat(y * lows[g])
        for j in range(g * group, (g + 1) * group, N):
            store(fma(moved, load(unit, j) - zeros, load(delta, j) + shifted), left, j)


@kernel
def refit_row(grid, row, unit, zero, steps, delta, left):
    """Move the grid of a row towards its update ``delta`` f32 (cols,); ``left`` (cols,) gets what the codes have still to move by.

    ``grid`` is (blocks, lows, importance, heights, moving, block_bytes, d_at, m_at): uint8 (rows, row_bytes), changed in place;
    f32 (rows, groups); those of ``Weighting``; how long a block is; where d and m are in it, m's -1 if there is none.
    A weight is step * (unit - zero) - low: ``unit`` (cols,), int8 or f32, is what the codes count, ``steps`` (groups,) become
    those of the new grid.
    """
    blocks, all_lows, importance, heights, moving, block_bytes, d_at, m_at = grid
    stored, lows, has_m = blocks[row], all_lows[row], m_at >= 0
    per_block = len(steps) // (len(stored) // block_bytes)
    copy(delta, left)
    for b in moving:
        at, first, end, oo, height = np.uint64(b * block_bytes), b * per_block, (b + 1) * per_block, np.float32(0.0), np.float32(0.0)
        for g in range(first, end):
            oo += heights[g] * lows[g] * lows[g]
            height += heights[g]
        ridge = _RIDGE * steps[first] * steps[first] * height
        half_d, half_m = _pattern(stored, at + np.uint64(d_at)), _pattern(stored, at + np.uint64(m_at)) if has_m else np.uint32(0)
        ss, sd, so, od = _moments(unit, zero, importance, delta, first, end, steps, lows, has_m)
        new_d, new_m, x, y = _best(ss, so, oo, sd, od, half_d, half_m, ridge)
        _put(new_d, stored, at + np.uint64(d_at))
        if has_m:
            _put(new_m, stored, at + np.uint64(m_at))
        _leave(unit, zero, delta, first, end, steps, lows, x, y, left)
        for g in range(first, end):
            steps[g] *= np.float32(1.0) + x
