"""ggml's searches for the scale of a group of weights, bit for bit.

A search tries several scales for each group and keeps the one with the least weighted error. Here 64 groups are
searched side by side, one a lane: what is known of lane v stands in ``s[NAME, v]`` and its element j in
``s[NAME + j, v]``, so that the inner loops run over lanes and vectorise, while each lane adds in ggml's order. One
array holds it all, which spares the compiled code the checks whether arrays overlap. Comparisons with NaN are false, as
in C, so a lane without a fit keeps what it has.

In all of them x and w (groups, n) are f32 weights and their importance, ``numerators`` f32 the tries: a scale is the
group's range, or extreme, divided by a numerator; codes (groups, n) and scales (groups,) are written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_gguf.kernels.decorators import kernel, part
from lora_gguf.kernels.lanes import (
    N,
    bits,
    greatest,
    least,
    load,
    magnitude,
    most,
    splat,
    store,
    to_f32,
    to_u32,
    where_less,
)
from lora_gguf.kernels.nearest import ROUNDING, nearest_int

LANES = 64
F0, F1 = np.float32(0), np.float32(1)
_TINY = np.float32(1e-15)
_NO_LIMIT = np.int32(-0x7FFFFFFF)


def upward(code_max: int, first: float, step: float, count: int) -> np.ndarray:
    """Return ``code_max`` itself, then ``count`` numerators from code_max + first on."""
    tries = np.float32(first) + np.float32(step) * np.arange(count, dtype=np.float32) + np.float32(code_max)
    return np.concatenate([np.array([code_max], np.float32), tries])


def around(n: int, reach: int) -> np.ndarray:
    """Return ``n`` itself, then numerators up to ``reach`` tenths below and above."""
    tenths = [0, *range(-reach, 0), *range(1, reach + 1)]
    return np.float32(n) + np.float32(0.1) * np.array(tenths, np.float32)


@kernel
def _level(t: float, lowest: int, highest: int) -> float:
    level = nearest_int(t)
    level = level if level > lowest else lowest
    return np.float32(level if level < highest else highest)


@kernel
def _gather(groups: np.ndarray, first: int, lanes: np.ndarray) -> None:
    """Groups ``first`` to ``first + LANES`` into lanes; past the last group comes the last one again."""
    for v in range(LANES):
        group = groups[min(first + v, len(groups) - 1)]
        for j in range(group.size):
            lanes[j, v] = group[j]


@kernel
def _scatter(s: np.ndarray, first: int, codes: np.ndarray) -> None:
    for v in range(min(LANES, len(codes) - first)):
        group = codes[first + v]
        for j in range(group.size):
            group[j] = np.int32(s[LEVELS + j, v])


# Rows of the state: of every search; of ``fit_affine``; of the others, where sums and extremes have two rows each.
BEST, SCALE, INVERSE, KEPT = range(4)
LOW, HIGH, SUM_W, SUM_X, SUM_L, SUM_L2, SUM_XL, NEW_SCALE, NEW_LOW, KEPT_LOW = range(4, 14)
EXPLAINED, NORM, EXTREME, MAGNITUDE, ERROR = 4, 5, 8, 9, 12
X, W, LEVELS, N_ROWS = 14, 46, 78, 110  # the rows of the at most 32 weights, their importance and their levels


@kernel
def fit_affine(
    x: np.ndarray,
    w: np.ndarray,
    numerators: np.ndarray,
    absolute: bool,
    scales: np.ndarray,
    minima: np.ndarray,
    codes: np.ndarray,
) -> None:
    """Fit weight = scale * code - minimum, with codes 0 to ``numerators[0]`` (int8) and minima (groups,) of at least 0.

    Each try rounds with the scale (highest - lowest) / numerator and takes the weighted least squares fit to the codes
    found, if its error, ``absolute`` or squared, is the least so far; the fit's minimum then stands for the lowest
    weight. The first try is no fit: its scale counts as it is.
    """
    s, n = np.empty((N_ROWS, LANES), np.float32), x.shape[1]
    highest = np.int32(numerators[0])
    for first in range(0, len(x), LANES):
        _gather(x, first, s[X:])
        _gather(w, first, s[W:])
        _affine_start(s, n)
        for k in range(len(numerators)):
            _affine_round(s, n, numerators[k], highest)
            _affine_solve(s, k == 0)
            _affine_keep(s, n, absolute, k == 0)
        for j in range(n):
            for v in range(LANES):
                s[LEVELS + j, v] = _level(s[KEPT, v] * (s[X + j, v] - s[KEPT_LOW, v]), np.int32(0), highest)
        _scatter(s, first, codes)
        for v in range(min(LANES, len(x) - first)):
            scales[first + v], minima[first + v] = s[SCALE, v], -s[LOW, v]


@kernel
def _affine_start(s: np.ndarray, n: int) -> None:
    for v in range(LANES):
        s[LOW, v], s[HIGH, v], s[SUM_W, v], s[SUM_X, v] = s[X, v], s[X, v], s[W, v], s[W, v] * s[X, v]
    for j in range(1, n):
        for v in range(LANES):
            s[LOW, v] = s[X + j, v] if s[X + j, v] < s[LOW, v] else s[LOW, v]
            s[HIGH, v] = s[X + j, v] if s[X + j, v] > s[HIGH, v] else s[HIGH, v]
            s[SUM_W, v] += s[W + j, v]
            s[SUM_X, v] += s[W + j, v] * s[X + j, v]
    for v in range(LANES):
        s[LOW, v] = F0 if s[LOW, v] > F0 else s[LOW, v]


@kernel
def _affine_round(s: np.ndarray, n: int, numerator: float, highest: int) -> None:
    for v in range(LANES):
        s[INVERSE, v] = numerator / (s[HIGH, v] - s[LOW, v])
        s[SUM_L, v], s[SUM_L2, v], s[SUM_XL, v] = F0, F0, F0
    for j in range(n):
        for v in range(LANES):
            level = _level(s[INVERSE, v] * (s[X + j, v] - s[LOW, v]), np.int32(0), highest)
            wl = s[W + j, v] * level
            s[LEVELS + j, v] = level
            s[SUM_L, v] += wl
            s[SUM_L2, v] += wl * level
            s[SUM_XL, v] += wl * s[X + j, v]


@kernel
def _affine_solve(s: np.ndarray, is_first: bool) -> None:
    for v in range(LANES):
        determinant = s[SUM_W, v] * s[SUM_L2, v] - s[SUM_L, v] * s[SUM_L, v]
        scale = (s[SUM_W, v] * s[SUM_XL, v] - s[SUM_X, v] * s[SUM_L, v]) / determinant
        low = (s[SUM_L2, v] * s[SUM_X, v] - s[SUM_L, v] * s[SUM_XL, v]) / determinant
        scale = s[SUM_XL, v] / s[SUM_L2, v] if low > F0 else scale
        scale = scale if determinant > F0 else np.float32(np.nan)
        s[NEW_SCALE, v] = F1 / s[INVERSE, v] if is_first else scale
        s[NEW_LOW, v] = s[LOW, v] if is_first else F0 if low > F0 else low


@kernel
def _affine_keep(s: np.ndarray, n: int, absolute: bool, is_first: bool) -> None:
    error = s[SUM_L]
    error[:] = F0
    for j in range(n):
        for v in range(LANES):
            difference = s[NEW_SCALE, v] * s[LEVELS + j, v] + s[NEW_LOW, v] - s[X + j, v]
            error[v] += s[W + j, v] * (abs(difference) if absolute else difference * difference)
    for v in range(LANES):
        better = (error[v] < s[BEST, v]) | is_first
        s[BEST, v] = error[v] if better else s[BEST, v]
        s[SCALE, v] = s[NEW_SCALE, v] if better else s[SCALE, v]
        s[KEPT, v] = s[INVERSE, v] if better else s[KEPT, v]
        s[KEPT_LOW, v] = s[LOW, v] if better else s[KEPT_LOW, v]
        s[LOW, v] = s[NEW_LOW, v] if better else s[LOW, v]


@kernel
def fit_symmetric(x: np.ndarray, w: np.ndarray, numerators: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
    """Fit weight = scale * (code - n), n = ``-numerators[0]``, with codes 0 to 2 n - 1 (int8).

    Each try rounds with the scale extreme / numerator (the extreme is the weight of the largest magnitude) and takes
    the weighted least squares fit to the codes found if it explains the most so far. A group below 1e-15 is all zero:
    its scale and codes are 0.
    """
    s, n = np.empty((N_ROWS, LANES), np.float32), x.shape[1]
    lowest, highest = np.int32(numerators[0]), np.int32(-numerators[0] - 1)
    for first in range(0, len(x), LANES):
        _gather(x, first, s[X:])
        _gather(w, first, s[W:])
        _find_extremes(s, n)
        for k in range(len(numerators)):
            for v in range(LANES):
                s[INVERSE, v] = numerators[k] / s[EXTREME, v]
            _round(s, n, lowest, highest, False)
            _keep_if_better(s, k == 0)
        s[INVERSE] = s[KEPT]
        _round(s, n, lowest, highest, False)
        _write_symmetric(s, first, lowest, scales, codes)


@kernel
def fit_by_descent(x: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
    """Fit weight = scale * (code - 4), codes 0 to 7, importance x**2: each code in turn moves to where it explains
    more.
    """
    s, n = np.empty((N_ROWS, LANES), np.float32), x.shape[1]
    lowest, highest = np.int32(-4), np.int32(3)
    for first in range(0, len(x), LANES):
        _gather(x, first, s[X:])
        _find_extremes(s, n)
        for v in range(LANES):
            s[INVERSE, v] = np.float32(-4) / s[EXTREME, v]
        for j in range(n):
            for v in range(LANES):
                s[W + j, v] = s[X + j, v] * s[X + j, v]
        _round(s, n, lowest, highest, False)
        _descend(s, n, lowest, highest, False)
        for v in range(LANES):
            s[SCALE, v] = s[EXPLAINED, v] / s[NORM, v]
        _write_symmetric(s, first, lowest, scales, codes)


@kernel
def fit_positive(x: np.ndarray, w: np.ndarray, numerators: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
    """Fit weight = scale * code, codes 0 to ``numerators[0]`` (uint8): the scales of a super-block as weights
    themselves.

    The best of the tries by squared error, then each code in turn moves to where it explains more. Codes are kept as
    bytes; a negative one, which only a negative weight brings about, wraps around.
    """
    s, n = np.empty((N_ROWS, LANES), np.float32), x.shape[1]
    highest = np.int32(numerators[0])
    for first in range(0, len(x), LANES):
        _gather(x, first, s[X:])
        _gather(w, first, s[W:])
        s[EXTREME] = F0
        for j in range(n):
            for v in range(LANES):
                s[EXTREME, v] = s[EXTREME, v] if s[EXTREME, v] > s[X + j, v] else s[X + j, v]
        for k in range(len(numerators)):
            _positive_try(s, n, numerators[k], highest, k == 0)
        s[INVERSE] = s[KEPT]
        _round(s, n, _NO_LIMIT, highest, True)
        _descend(s, n, _NO_LIMIT, highest, True)
        for v in range(min(LANES, len(x) - first)):
            is_zero = s[EXTREME, v] < _TINY
            scale = s[EXPLAINED, v] / s[NORM, v] if s[NORM, v] > F0 else F0
            scales[first + v] = F0 if is_zero else scale
            for j in range(n):
                codes[first + v, j] = 0 if is_zero else np.int32(s[LEVELS + j, v])


@kernel
def _find_extremes(s: np.ndarray, n: int) -> None:
    """n is even: the extremes go back and forth between two pairs of rows; a masked store would stall the next load."""
    s[EXTREME] = F0
    s[MAGNITUDE] = F0
    for j in range(n):
        now, after = 2 * (j & 1), 2 - 2 * (j & 1)
        for v in range(LANES):
            magnitude, largest = abs(s[X + j, v]), s[MAGNITUDE + now, v]
            is_larger = magnitude > largest
            s[EXTREME + after, v] = s[X + j, v] if is_larger else s[EXTREME + now, v]
            s[MAGNITUDE + after, v] = magnitude if is_larger else largest


@part
def _levels(t: Any, lowest: int, highest: int) -> Any:
    """``_level`` of lanes."""
    whole = (bits(t + splat(ROUNDING)) & splat(np.uint32(0x7FFFFF))) + splat(np.uint32(0xFFC00000))
    return least(most(to_f32(whole), splat(np.float32(lowest))), splat(np.float32(highest)))


@part
def _round(s: np.ndarray, n: int, lowest: int, highest: int, are_bytes: bool) -> None:
    for v in range(0, LANES, N):
        explained = norm = splat(F0)
        inverse = load(s, (INVERSE, v))
        for j in range(n):
            x, w = load(s, (X + j, v)), load(s, (W + j, v))
            level = _levels(inverse * x, lowest, highest)
            store(_bytes(level) if are_bytes else level, s, (LEVELS + j, v))
            explained, norm = explained + w * x * level, norm + w * level * level
        store(explained, s, (EXPLAINED, v))
        store(norm, s, (NORM, v))


@part
def _bytes(levels: Any) -> Any:
    return to_f32(to_u32(levels) & splat(np.uint32(255)))


@kernel
def _byte(level: float) -> float:
    return np.float32(np.int32(level) & 255)


@kernel
def _keep_if_better(s: np.ndarray, is_first: bool) -> None:
    for v in range(LANES):
        explained, norm = s[EXPLAINED, v], s[NORM, v]
        better = (norm > F0) & (explained * explained > s[BEST, v] * norm) | is_first
        scale = explained / norm if norm != F0 else F0
        s[SCALE, v] = scale if better else s[SCALE, v]
        s[BEST, v] = scale * explained if better else s[BEST, v]
        s[KEPT, v] = s[INVERSE, v] if better else s[KEPT, v]


@kernel
def _positive_try(s: np.ndarray, n: int, numerator: float, highest: int, is_first: bool) -> None:
    for v in range(LANES):
        s[INVERSE, v] = numerator / s[EXTREME, v]
        s[SCALE, v] = F1 / s[INVERSE, v]
        s[ERROR, v] = F0
    for j in range(n):
        for v in range(LANES):
            level = _level(s[INVERSE, v] * s[X + j, v], _NO_LIMIT, highest)
            difference = s[X + j, v] - s[SCALE, v] * (_byte(level) if is_first else level)
            s[ERROR, v] += s[W + j, v] * difference * difference
    for v in range(LANES):
        better = (s[ERROR, v] < s[BEST, v]) | is_first
        s[BEST, v] = s[ERROR, v] if better else s[BEST, v]
        s[KEPT, v] = s[INVERSE, v] if better else s[KEPT, v]


@part
def _descend(s: np.ndarray, n: int, lowest: int, highest: int, are_bytes: bool) -> None:
    """Each code waits for what became of the one before, so all lanes are in work at once."""
    for _ in range(5):
        moves = splat(F0)
        for j in range(n):
            now, after = 2 * (j & 1), 2 - 2 * (j & 1)
            for v in range(0, LANES, N):
                moves = moves + _move(s, j, v, (now, after), (lowest, highest, are_bytes))
        if greatest(moves) == F0:
            return


@part
def _move(s: np.ndarray, j: int, v: int, turn: Any, limits: Any) -> Any:
    """Move the codes of element ``j`` to where they explain more; return 1 in the lanes that moved."""
    (now, after), (lowest, highest, are_bytes) = turn, limits
    zero, one = splat(F0), splat(F1)
    old_explained, old_norm = load(s, (EXPLAINED + now, v)), load(s, (NORM + now, v))
    x, weight, level = load(s, (X + j, v)), load(s, (W + j, v)), load(s, (LEVELS + j, v))
    wx = weight * x
    explained, norm = old_explained - wx * level, old_norm - weight * level * level
    moved = _levels(x * norm / explained, lowest, highest)
    new_explained, new_norm = explained + wx * moved, norm + weight * moved * moved
    less, more = old_explained * old_explained * new_norm, new_explained * new_explained * old_norm
    better = where_less(zero, magnitude(moved - level), where_less(less, more, one, zero), zero)
    better = where_less(zero, norm if are_bytes else new_norm, where_less(zero, explained, better, zero), zero)
    store(where_less(zero, better, _bytes(moved) if are_bytes else moved, level), s, (LEVELS + j, v))
    store(where_less(zero, better, new_explained, old_explained), s, (EXPLAINED + after, v))
    store(where_less(zero, better, new_norm, old_norm), s, (NORM + after, v))
    return better


@kernel
def _write_symmetric(s: np.ndarray, first: int, lowest: int, scales: np.ndarray, codes: np.ndarray) -> None:
    for v in range(min(LANES, len(codes) - first)):
        is_zero, group = s[MAGNITUDE, v] < _TINY, codes[first + v]
        scales[first + v] = F0 if is_zero else s[SCALE, v]
        for j in range(group.size):
            group[j] = 0 if is_zero else np.int32(s[LEVELS + j, v]) - lowest


@kernel
def recode(x: np.ndarray, steps: np.ndarray, minima: np.ndarray, lowest: int, highest: int, codes: np.ndarray) -> None:
    """Compute code = round((x + minimum) / step) - lowest; where the step is 0 the code stays.

    x, codes (m, 32); steps, minima (m, 1), or (m, 2) for groups of 16.
    """
    last = steps.shape[1] - 1
    for g in range(len(x)):
        for half in range(2):
            step, minimum = steps[g, half & last], minima[g, half & last]
            if step != F0:
                levels = _levels((load(x, (g, N * half)) + splat(minimum)) / splat(step), lowest, highest)
                store(levels - splat(np.float32(lowest)), codes, (g, N * half))
