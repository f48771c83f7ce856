"""Move a block's grid towards its update, before and after codes are rounded.

A block's weights are ``d * s - m * o``: d and m are two f16 numbers (m is 0 in the types without a minimum), s and o
what the codes and the small integer scales make. Two free numbers for 32 or 256 weights absorb little of an update, but
they can absorb it where it counts: in large language models a few input columns carry most of the activations' energy,
and what rounding adds there is most of the damage. ``refit_row`` finds the d and m whose change fits an update best,
column j weighted by ``importance`` E[x_j²].

Before the codes are rounded that is the adapter's update; what it leaves is dithered, so that the whole stays unbiased.
Two free numbers free two columns of a block from rounding, so it is done only in the blocks whose heaviest two are
worth it. Afterwards it is what rounding has left: linear in errors whose mean is zero, so it is nearly unbiased too,
and it repairs codes at an end of their range. In a block whose columns matter alike it gains nothing.

What a column gains, the others of its block pay. Where its weight is near zero, no change of d would be too large: so a
move takes no weight farther than ``reach``, by its block's mean step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lora_gguf.kernels.decorators import kernel, part
from lora_gguf.kernels.lanes import (
    ONE,
    STRIDE,
    N,
    bits,
    floor,
    fma,
    least,
    load,
    most,
    splat,
    store,
    to_f32,
    totals,
    where_less,
)
from lora_gguf.quants.codec import Grid

UNEVEN = 0.08  # share of a block's importance that its heaviest columns have where it is moved after rounding
UNTOUCHED = 0.05  # share of all importance that the heaviest columns of the blocks left out before rounding may have
# how far a move may take a weight: so many steps, and so much of what the codes reach where the importance is measured
FARTHEST, SHARE = 2.0, 1 / 8
_RIDGE = np.float32(1e-3)
_LARGEST = np.float32(0.5)
_UNBOUND = np.float32(1e20)
_EXACT = np.float32(2.0**23)  # a whole number below it, added to it, stands in the lowest bits
# of f16: the least normal number, the least number, and the last before the largest
_NORMAL, _UNIT, _PER_UNIT, _MOST = np.float32(2.0**-14), np.float32(2.0**-24), np.float32(2.0**24), np.float32(65472)


class MovingGrid(NamedTuple):
    """What ``refit_row`` moves: the grid of some rows, and the weighting of their columns.

    ``blocks`` uint8 (rows, row_bytes) are changed in place, and ``lows`` f32 (rows, groups) too; the next four are
    those of ``Weighting``. A block has ``block_bytes``; in it d is at ``d_at``, and m at ``m_at``, -1 if there is none.
    Its weights are at most ``breadth`` apart, or that over two from zero, and move by ``farthest`` at most: in steps.
    """

    blocks: np.ndarray
    lows: np.ndarray
    importance: np.ndarray
    heights: np.ndarray
    before: np.ndarray
    after: np.ndarray
    work: np.ndarray
    block_bytes: int
    d_at: int
    m_at: int
    breadth: np.float32
    farthest: np.float32


_NOTHING, _NONE = np.empty(0, np.float32), np.empty(0, np.int64)
NO_GRID = MovingGrid(
    np.empty((0, 0), np.uint8),
    np.empty((0, 0), np.float32),
    _NOTHING,
    _NOTHING,
    _NONE,
    _NONE,
    np.empty((10, 0), np.float32),
    0,
    0,
    -1,
    np.float32(0),
    np.float32(0),
)


@dataclass(frozen=True)
class Weighting:
    """By what ``refit_row`` weighs a matrix's columns: f32 (cols,), their sums over the groups (groups,), and the
    numbers of the blocks that it moves before and after codes are rounded.
    """

    importance: np.ndarray
    heights: np.ndarray
    before: np.ndarray
    after: np.ndarray


def reach(grid: Grid, measured: bool) -> float:
    """Return how far a move may take a weight, over the step; farther where the columns' importance is ``measured``
    than where it is guessed.
    """
    return max(FARTHEST * grid.gap, SHARE * grid.breadth if measured else 0.0)


def weighting(importance: np.ndarray, block_size: int, group: int, n_free: int) -> Weighting:
    """Return the weighting of columns of ``importance`` f32 (cols,) on blocks with ``n_free`` free numbers."""
    of_block = importance.reshape(-1, block_size)
    freed = np.sort(of_block, axis=1)[:, -n_free:].sum(axis=1, dtype=np.float64)
    order = np.argsort(freed, kind="stable")
    before = order[np.cumsum(freed[order]) > UNTOUCHED * importance.sum(dtype=np.float64)]
    after = np.flatnonzero(freed > UNEVEN * of_block.sum(axis=1, dtype=np.float64))
    return Weighting(importance, importance.reshape(-1, group).sum(axis=1), np.sort(before), after)


@part
def _take(row: np.ndarray, at: Any) -> Any:
    """The magnitude of the f16 number at byte ``at`` of a row: its bit pattern, in an f32 of the same bits."""
    return np.uint32(row[at] | (np.uint32(row[at + ONE]) & np.uint32(0x7F)) << np.uint32(8)).view(np.float32)


@part
def _put(magnitude: Any, row: np.ndarray, at: Any) -> None:
    """Store what ``_take`` took; the sign stays."""
    half = np.float32(magnitude).view(np.uint32)
    row[at], row[at + ONE] = half & 255, half >> 8 | np.uint32(row[at + ONE]) & 0x80


@part
def _values(taken: Any) -> Any:
    """The f32 values of lanes of finite f16 magnitudes as ``_take`` takes them."""
    patterns = bits(taken)
    count = to_f32(patterns)
    normal = bits(patterns * splat(np.uint32(1 << 13)) + splat(np.uint32(0x38000000)))
    return where_less(count, splat(np.float32(1024.0)), count * splat(_UNIT), normal)


@part
def _taken(values: Any) -> Any:
    """The reverse of ``_values``."""
    denormal = bits(fma(values, splat(_PER_UNIT), splat(_EXACT))) & splat(np.uint32(0x7FFFFF))
    normal = (bits(values) + splat(np.uint32(0xC8000000))) >> splat(np.uint32(13))
    return where_less(values, splat(_NORMAL), bits(denormal), bits(normal))


@part
def _f16_below(x: np.ndarray, up: Any) -> Any:
    """The f16 numbers next to lanes ``x`` > 0 towards zero, after 2**-13 ``up`` of their unit was added: 0x1000 rounds
    to nearest.
    """
    normal = bits((bits(x) + splat(np.uint32(up))) & splat(np.uint32(0xFFFFE000)))
    denormal = floor(fma(x, splat(_PER_UNIT), splat(np.float32(up) * np.float32(2.0**-13)))) * splat(_UNIT)
    return least(where_less(x, splat(_NORMAL), denormal, normal), splat(_MOST))


@part
def _f16_above(x: np.ndarray) -> Any:
    """The f16 numbers after the f16 numbers ``x`` >= 0."""
    return where_less(x, splat(_NORMAL), x + splat(_UNIT), bits(bits(x) + splat(np.uint32(0x2000))))


@part
def _within(x: np.ndarray, limit: Any) -> Any:
    """``x``, at most ``limit`` from 0."""
    return least(most(x, splat(np.float32(0.0)) - limit), limit)


@part
def _limits(steps_sum: Any, lows_sum: Any, breadth: Any, farthest: Any, has_m: Any) -> Any:
    """The mean step of a block over its mean low, from the sums of both, and how much of d may be added: so much that
    no weight moves farther than ``farthest`` where m moves along as it may.
    """
    if not has_m:
        return np.float32(0.0), min(_LARGEST, np.float32(2.0) * farthest / breadth)
    if steps_sum == 0:  # codes move nothing, m all weights alike
        return _UNBOUND, _LARGEST
    along = min(farthest, _LARGEST * abs(lows_sum / steps_sum))
    return steps_sum / lows_sum if lows_sum != 0 else np.float32(0.0), min(_LARGEST, (farthest + along) / breadth)


@part
def _solve(work: np.ndarray, n_blocks: int, breadth: Any, farthest: Any) -> None:
    """The changes of d and m that come nearest to the update, for many blocks side by side.

    ``work`` is that of ``MovingGrid``. Its rows are Σ h·s², Σ h·s·delta, Σ h·s·o, Σ h·o·delta, Σ
    h·o², the ridge of the first, |d| and |m| as ``_take`` takes them, and what ``_limits`` gives; the first
    four become the new |d| and |m|, the same way, and the changes x and y, as parts of d and m. The error is
    Σ h (delta - x s + y o)². Both neighbours of the best d are tried, each with the m that goes with it best. Neither
    the lowest weight moves by more than ``farthest``, nor one that is ``breadth`` above it.
    """
    zero, one, two = splat(np.float32(0.0)), splat(np.float32(1.0)), splat(np.float32(2.0))
    far, largest = splat(farthest), splat(_LARGEST)
    for b in range(0, n_blocks, N):
        ss, sd, so, od = load(work, (0, b)), load(work, (1, b)), load(work, (2, b)), load(work, (3, b))
        oo, ridge, per_low = load(work, (4, b)), load(work, (5, b)), load(work, (8, b))
        d, m = _values(load(work, (6, b))), _values(load(work, (7, b)))
        per_oo, per_d, per_m = (
            where_less(zero, oo, one / oo, zero),
            where_less(zero, d, one / d, zero),
            where_less(zero, m, one / m, zero),
        )
        det = ss + ridge - so * so * per_oo
        x = _within(where_less(zero, det, (sd - so * od * per_oo) / det, zero), load(work, (9, b)))
        new_d = _f16_below(d * (one + x), 0)
        best, best_d, best_m, best_x, best_y = zero, d, m, zero, zero
        for _ in range(2):
            x = where_less(zero, d, new_d * per_d - one, zero)
            stretch = x * splat(breadth)
            one_end, other = (most(stretch, zero) - far) * per_low, (least(stretch, zero) + far) * per_low
            y = _within(most(least((so * x - od) * per_oo, most(one_end, other)), least(one_end, other)), largest)
            new_m = _f16_below(m * (one + y), 0x1000)
            y = where_less(zero, m, new_m * per_m - one, zero)
            error = x * (ss * x - two * sd) + y * (oo * y + two * (od - so * x))
            best_d, best_m = where_less(error, best, new_d, best_d), where_less(error, best, new_m, best_m)
            best_x, best_y = where_less(error, best, x, best_x), where_less(error, best, y, best_y)
            best = least(error, best)
            new_d = _f16_above(new_d)
        store(_taken(best_d), work, (0, b))
        store(_taken(best_m), work, (1, b))
        store(best_x, work, (2, b))
        store(best_y, work, (3, b))


@part
def _moments(columns: Any, delta: np.ndarray, span: Any, steps: np.ndarray, lows: np.ndarray, has_m: Any) -> Any:
    """Σ h·s², Σ h·s·delta, Σ h·s·o and Σ h·o·delta over the groups of ``span``; ``columns`` is (unit, zero,
    importance, the size of a group).
    """
    unit, zero, importance, group = columns
    nothing, zeros = splat(np.float32(0.0)), splat(zero)
    ss = sd = so = od = nothing
    for g in range(span[0], span[1]):
        uu = ud = u1 = d1 = nothing
        for j in range(g * group, (g + ONE) * group, STRIDE):
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
    return totals(ss, sd, so, od)


@part
def _leave(columns: Any, left: np.ndarray, span: Any, steps: np.ndarray, lows: np.ndarray, change: Any) -> None:
    """Take from ``left`` what the groups of ``span`` have moved by: ``change`` (x, y), parts of steps and lows, which
    change too.
    """
    unit, zero, _, group = columns
    x, y = change
    zeros = splat(zero)
    for g in range(span[0], span[1]):
        moved, shifted = splat(-x * steps[g]), splat(y * lows[g])
        for j in range(g * group, (g + ONE) * group, STRIDE):
            store(fma(moved, load(unit, j) - zeros, load(left, j) + shifted), left, j)
        steps[g] *= np.float32(1.0) + x
        lows[g] *= np.float32(1.0) + y


@kernel
def refit_row(
    movable: MovingGrid,
    numbers: np.ndarray,
    row: np.ndarray,
    unit: np.ndarray,
    zero: Any,
    steps: np.ndarray,
    left: np.ndarray,
) -> None:
    """Move the grid of some blocks of a row towards its update ``left`` f32 (cols,), which becomes what the codes
    would still have to move by.

    ``movable`` is a ``MovingGrid``. A weight is step * (unit - zero) - low: ``unit`` (cols,), int8 or f32, is what the
    codes count; ``steps`` (groups,) and the grid's lows become those of the new grid. ``numbers`` are the
    blocks.
    """
    blocks, all_lows, importance, heights, _, _, work, block_bytes, d_at, m_at, breadth, farthest = movable
    stored, lows, has_m = blocks[row], all_lows[row], m_at >= 0
    per_block, group = np.uint64(len(steps) // (len(stored) // block_bytes)), np.uint64(len(unit) // len(steps))
    columns, d_byte, m_byte = (unit, zero, importance, group), np.uint64(d_at), np.uint64(m_at)
    for k in range(np.uint64(len(numbers))):
        number, oo, height = np.uint64(numbers[k]), np.float32(0.0), np.float32(0.0)
        steps_sum = lows_sum = np.float32(0.0)
        first, at = number * per_block, number * np.uint64(block_bytes)
        end = first + per_block
        for g in range(first, end):
            oo += heights[g] * lows[g] * lows[g]
            height += heights[g]
            steps_sum += steps[g]
            lows_sum += lows[g]
        work[0, k], work[1, k], work[2, k], work[3, k] = _moments(columns, left, (first, end), steps, lows, has_m)
        work[4, k], work[5, k] = oo, _RIDGE * steps[first] * steps[first] * height
        work[6, k] = _take(stored, at + d_byte)
        work[7, k] = _take(stored, at + m_byte) if has_m else np.float32(0.0)
        work[8, k], work[9, k] = _limits(steps_sum, lows_sum, breadth, farthest, has_m)
    _solve(work, len(numbers), breadth, farthest)
    for k in range(np.uint64(len(numbers))):
        number = np.uint64(numbers[k])
        first, at = number * per_block, number * np.uint64(block_bytes)
        _put(work[0, k], stored, at + d_byte)
        if has_m:
            _put(work[1, k], stored, at + m_byte)
        _leave(columns, left, (first, first + per_block), steps, lows, (work[2, k], work[3, k]))
