"""The search of ggml's IQ1 quantizers, bit-identical: every split of the sorted weights of a group into -1, 0 and 1.

A group's weights are sorted; each pair of boundaries makes the lower ones -1, the upper ones 1. Each split is tried
with the levels shifted up and down by an eighth (IQ1_M: either way for each half of the group), its best scale and its
score follow from weighted sums, and the best split's vectors then move to the grid. All sums are added in ggml's order.

Where a group is too small to matter, ggml writes the sign of a shift left over from another block; here it is a plus.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.half import f16_from_f32
from lora_gguf.kernels.nearest import nearest_int, nearest_vector
from lora_gguf.quants.iquant_grids import Lattice

Eight = tuple[float, float, float, float, float, float, float, float]
SHIFT = np.float32(0.125)
UP = np.array([-1, 0, 1], np.float32) + SHIFT
DOWN = np.array([-1, 0, 1], np.float32) - SHIFT
NEGLIGIBLE_S, NEGLIGIBLE_M = np.float32(1e-12), np.float32(1e-7)
LEAST = np.float32(-np.finfo(np.float32).max)
FUDGE_S, FUDGE_M = np.float32(1.125), np.float32(1.1125)


@kernel
def _twice_mean_square(x: np.ndarray) -> float:
    total = np.float32(0)
    for v in x:
        total += v * v
    return np.float32(2) * total / np.float32(256)


@kernel
def _weigh(x: np.ndarray, importance: np.ndarray, variance: float, w: np.ndarray) -> float:
    """Each weight's importance in the error; returns the largest magnitude."""
    largest = np.float32(0)
    for j in range(len(x)):
        square = x[j] * x[j]
        w[j] = importance[j] * np.sqrt(variance + square) if len(importance) else square
        largest = max(largest, abs(x[j]))
    return largest


@kernel
def _sort(x: np.ndarray, order: np.ndarray) -> None:
    """``order`` such that x[order] ascends, equals in their order."""
    for j in range(len(x)):
        rank = np.int32(0)
        for i in range(len(x)):
            rank += np.int32((x[i] < x[j]) | ((x[i] == x[j]) & (i < j)))
        order[rank] = j


@kernel
def _eight(a: np.ndarray, at: int) -> Eight:
    return a[at], a[at + 1], a[at + 2], a[at + 3], a[at + 4], a[at + 5], a[at + 6], a[at + 7]


@kernel
def _place(
    lattice: Lattice,
    group: tuple[np.ndarray, np.ndarray],
    k: int,
    scale: float,
    shift: float,
    errors: np.ndarray,
    levels: np.ndarray,
) -> tuple[int, bool]:
    """Put the ``k``-th eight of ``levels`` on the grid: the index of the vector, and whether it moved.

    ``group`` is (weights, their importance).
    """
    x, w = group
    point = 0
    for i in range(7, -1, -1):
        point = 3 * point + levels[8 * k + i]
    first, count = np.uint64(lattice.points[point, 0]), np.uint64(lattice.points[point, 1])
    if count == 0:
        return np.int64(first), False
    m, importance = _eight(x, 8 * k), _eight(w, 8 * k)
    code = nearest_vector(lattice.neighbours, (first, count), m, importance, scale, shift, errors)
    for i in range(8):
        levels[8 * k + i] = code >> (2 * i) & 3
    return np.int64(code >> 16), True


@kernel
def _split_levels(order: np.ndarray, i1: int, i2: int, reverse: bool, levels: np.ndarray) -> None:
    """-1 below the i1-th of the sorted weights, 0 below the i2-th, 1 from there on, as 0, 1 and 2; or the opposite."""
    for j in range(len(order)):
        level = (j >= i1) + (j >= i2)
        levels[order[j]] = 2 - level if reverse else level


@kernel
def _project(
    x: np.ndarray, w: np.ndarray, levels: np.ndarray, q: np.ndarray, factor: float, qx: float, qq: float
) -> tuple[float, float]:
    """Add Σ w q x to ``qx`` and Σ w q q to ``qq``, q being the levels' values times ``factor``."""
    for j in range(len(x)):
        value = q[levels[j]] * factor
        qx += w[j] * value * x[j]
        qq += w[j] * value * value
    return qx, qq


@kernel
def _better(qx: float, qq: float, best: float) -> bool:
    return (qq > 0) & (qx * qx > best * qq)


@kernel
def _score(q: np.ndarray, x1: float, x2: float, x: float, w1: float, w2: float, w: float) -> tuple[float, float]:
    """Σ w q x and Σ w q q of a split, from the sums of w x and of w below its two boundaries and over all."""
    qx = x1 * q[0] + (x2 - x1) * q[1] + (x - x2) * q[2]
    qq = w1 * q[0] * q[0] + (w2 - w1) * q[1] * q[1] + (w - w2) * q[2] * q[2]
    return qx, qq


@kernel
def _mark_better(cx: np.ndarray, cw: np.ndarray, i1: int, best: float, hits: np.ndarray) -> int:
    """Mark the splits with the lower boundary ``i1`` that beat ``best``; returns how many."""
    x1, x, w1, w, n_hits = cx[i1], cx[32], cw[i1], cw[32], np.int32(0)
    for i2 in range(len(hits)):
        ux, uq = _score(UP, x1, cx[i2], x, w1, cw[i2], w)
        dx, dq = _score(DOWN, x1, cx[i2], x, w1, cw[i2], w)
        hits[i2] = np.int32(_better(ux, uq, best) | _better(dx, dq, best))
        n_hits = np.int32(n_hits + hits[i2])
    return n_hits


@kernel
def _best_split_s(
    x: np.ndarray, w: np.ndarray, order: np.ndarray, cx: np.ndarray, cw: np.ndarray, hits: np.ndarray
) -> tuple[float, int, int, bool]:
    """The scale, the boundaries and whether the shift is down of the best split of 32 weights, the first one if there
    are several, boundary -1 if none has a weight. Of each row of splits only those are looked at one by one that beat
    the best before it, ``hits``."""
    for j in range(len(cx)):
        cx[j] = cw[j] = 0
    for j in range(32):
        cx[j + 1] = cx[j] + w[order[j]] * x[order[j]]
        cw[j + 1] = cw[j] + w[order[j]]
    scale, best, low, high, down = np.float32(0), LEAST, -1, 0, False
    for i1 in range(33):
        for i2 in range(i1, 33 if _mark_better(cx, cw, i1, best, hits) else 0):
            if not hits[i2]:
                continue
            for minus in (False, True):
                q = DOWN if minus else UP
                qx, qq = _score(q, cx[i1], cx[i2], cx[32], cw[i1], cw[i2], cw[32])
                if _better(qx, qq, best):
                    scale = qx / qq
                    best, low, high, down = scale * qx, i1, i2, minus
    return scale, low, high, down


@kernel
def _plus(a: Eight, b: Eight) -> Eight:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7]


@kernel
def _terms(x: np.ndarray, w: np.ndarray, order: np.ndarray, terms: np.ndarray) -> None:
    """The terms w q x, in columns 0 to 3, and w q q, in 4 to 7, of 16 sorted weights at each of the three levels; the
    columns are for the shifts of the two halves of the group: up up, up down, down up, down down."""
    for j in range(16):
        i = order[j]
        for level in range(3):
            for k in range(4):
                down = k // 2 if i < 8 else k % 2
                q = DOWN[level] if down else UP[level]
                terms[16 * level + j, k] = w[i] * q * x[i]
                terms[16 * level + j, k + 4] = w[i] * q * q


@kernel
def _best_split_m(terms: np.ndarray) -> tuple[float, int, int, int]:
    """The scale, the boundaries and the shifts (0 to 3, as above) of the best split of 16 weights, as _best_split_s.

    Tuples, not arrays, hold the eight sums: those below the lower boundary, below the higher one, and of all.
    """
    scale, best, low, high, shifts = np.float32(0), LEAST, -1, 0, 0
    zero = np.float32(0)
    lower = (zero, zero, zero, zero, zero, zero, zero, zero)
    for i1 in range(17):
        middle = lower
        for i2 in range(i1, 17):
            sums = middle
            for j in range(32 + i2, 48):
                sums = _plus(sums, _eight(terms[j], 0))
            for k in range(4):
                if _better(sums[k], sums[k + 4], best):
                    scale = sums[k] / sums[k + 4]
                    best, low, high, shifts = scale * sums[k], i1, i2, k
            if i2 < 16:
                middle = _plus(middle, _eight(terms[16 + i2], 0))
        if i1 < 16:
            lower = _plus(lower, _eight(terms[i1], 0))
    return scale, low, high, shifts


@kernel
def _three_bits(raw: np.ndarray, scales: np.ndarray) -> float:
    """Round the scales of a block to the nearest of 1, 3, … 15 steps, kept as 0 to 7; returns the step."""
    largest = np.float32(0)
    for scale in raw:
        largest = max(largest, scale)
    step = largest / np.float32(15)
    inverse = np.float32(1) / step if largest > 0 else np.float32(0)
    for g in range(len(raw)):
        level = nearest_int(np.float32(0.5) * (inverse * raw[g] - np.float32(1)))
        scales[g] = max(0, min(7, level)) if largest > 0 else 0
    return step


@kernel
def search_iq1_s(
    weights: np.ndarray,
    importance: np.ndarray,
    lattice: Lattice,
    d: np.ndarray,
    scales: np.ndarray,
    down: np.ndarray,
    vectors: np.ndarray,
) -> None:
    """Find the fields of all IQ1_S blocks: d (f16), scales (blocks, 8), down and vectors (blocks, 32), zero on
    entry.
    """
    n_cols = weights.shape[1]
    w, order, levels = np.empty(32, np.float32), np.empty(32, np.int64), np.empty(32, np.int64)
    cx, cw, hits = np.empty(40, np.float32), np.empty(40, np.float32), np.empty(40, np.int32)
    raw, errors = np.empty(8, np.float32), np.empty(lattice.longest, np.int32)
    for i in range(len(d)):
        variance = _twice_mean_square(weights.reshape(-1, 256)[i])
        for g in range(8):
            column, x = (256 * i + 32 * g) % n_cols, weights.reshape(-1, 32)[8 * i + g]
            raw[g] = 0
            if _weigh(x, importance[column : column + 32], variance, w) < NEGLIGIBLE_S:
                continue
            _sort(x, order)
            scale, low, high, minus = _best_split_s(x, w, order, cx, cw, hits)
            if low < 0:
                continue
            _split_levels(order, low, high, scale < 0, levels)
            minus, scale, moved = minus != (scale < 0), abs(scale), False
            for k in range(4 * g, 4 * g + 4):
                shift = -SHIFT if minus else SHIFT
                vectors[i, k], off = _place(lattice, (x, w), k - 4 * g, scale, shift, errors, levels)
                down[i, k] = minus
                moved |= off
            qx, qq = _project(x, w, levels, DOWN if minus else UP, np.float32(1), np.float32(0), np.float32(0))
            raw[g] = qx / qq if moved and qx > 0 and qq > 0 else scale
        d[i] = f16_from_f32(_three_bits(raw, scales[i]) * FUDGE_S)


@kernel
def _place_halves(
    lattice: Lattice,
    group: tuple[np.ndarray, np.ndarray],
    scale: float,
    shifts: int,
    errors: np.ndarray,
    levels: np.ndarray,
    vectors: np.ndarray,
) -> float:
    """Put both eights of a group of IQ1_M on the grid; returns the scale refined if one of them moved."""
    (x, w), qx, qq, moved = group, np.float32(0), np.float32(0), False
    for k in range(2):
        minus = shifts % 2 if k else shifts // 2
        vectors[k], off = _place(lattice, (x, w), k, scale, -SHIFT if minus else SHIFT, errors, levels)
        moved |= off
        start, end = 8 * k, 8 * k + 8
        q = DOWN if minus else UP
        qx, qq = _project(x[start:end], w[start:end], levels[start:end], q, np.float32(1), qx, qq)
    return qx / qq if moved and qx > 0 and qq > 0 else scale


@kernel
def _fit_d(
    x: np.ndarray,
    importance: np.ndarray,
    variance: float,
    w: np.ndarray,
    down: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
) -> tuple[float, float]:
    """Σ w q x and Σ w q q of a whole block of IQ1_M, whose quotient is its best scale."""
    qx, qq = np.float32(0), np.float32(0)
    for k in range(32):
        start, end = 8 * k, 8 * k + 8
        _weigh(x[start:end], importance[start:end], variance, w)
        factor = np.float32(2 * scales[k // 2] + 1)
        qx, qq = _project(x[start:end], w, levels[start:end], DOWN if down[k] else UP, factor, qx, qq)
    return qx, qq


@kernel
def search_iq1_m(
    weights: np.ndarray,
    importance: np.ndarray,
    lattice: Lattice,
    d: np.ndarray,
    scales: np.ndarray,
    down: np.ndarray,
    vectors: np.ndarray,
) -> None:
    """Find the fields of all IQ1_M blocks: d (f16), scales (blocks, 16), down and vectors (blocks, 32), zero on
    entry.
    """
    n_cols = weights.shape[1]
    w, order, levels = np.empty(16, np.float32), np.empty(16, np.int64), np.empty(256, np.int64)
    terms, raw, errors = np.empty((48, 8), np.float32), np.empty(16, np.float32), np.empty(lattice.longest, np.int32)
    for i in range(len(d)):
        block, first = weights.reshape(-1, 256)[i], 256 * i % n_cols
        variance = _twice_mean_square(block)
        for g in range(16):
            start, end = 16 * g, 16 * g + 16
            x, group_levels = block[start:end], levels[start:end]
            raw[g] = 0
            group_levels[:] = 0
            if _weigh(x, importance[first + start : first + end], variance, w) < NEGLIGIBLE_M:
                continue
            _sort(x, order)
            _terms(x, w, order, terms)
            scale, low, high, shifts = _best_split_m(terms)
            if low < 0:
                continue
            _split_levels(order, low, high, scale < 0, group_levels)
            shifts = 3 - shifts if scale < 0 else shifts
            down[i, 2 * g], down[i, 2 * g + 1] = shifts // 2, shifts % 2
            pair = vectors[i, 2 * g : 2 * g + 2]
            raw[g] = _place_halves(lattice, (x, w), abs(scale), shifts, errors, group_levels, pair)
        step = _three_bits(raw, scales[i])
        qx, qq = _fit_d(block, importance[first : first + 256], variance, w, down[i], levels, scales[i])
        d[i] = f16_from_f32((qx / qq if qq > 0 else step) * FUDGE_M) if step > 0 else 0
