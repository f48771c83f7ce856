"""ggml's searches for the scales of a group of weights, bit for bit.

A search tries several scales for each group and keeps the one with the least weighted error. Here 64 groups are searched
side by side, one a lane: element j of lane v stands at ``[j, v]``, so that the inner loops run over lanes and vectorise
while each lane adds in ggml's order. Comparisons with NaN are false, as in C, so a lane without a fit keeps what it has.
All arrays of a search are parts of one, which spares the compiled code the checks whether they overlap.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernel import kernel

LANES = 64
F0, F1 = np.float32(0), np.float32(1)
_NAN = np.float32(np.nan)
_ROUNDING = np.float32(12582912)  # 1.5 * 2**23: the sum's lowest bit is worth one
_TINY = np.float32(1e-15)


@kernel
def _nearest(t):
    """The integer nearest to ``t``, ties to even; beyond 2**22 whatever ggml's bit trick gives, so infinity is -2**22."""
    return np.int32(np.int32(np.float32(t + _ROUNDING).view(np.int32) & 0x7FFFFF) - 0x400000)


@kernel
def _level(t, lowest, highest):
    level = _nearest(t)
    level = level if level > lowest else lowest
    return np.float32(level if level < highest else highest)


@kernel
def _gather(groups, first, lanes):
    """Groups ``first`` to ``first + LANES`` into lanes; past the last group comes the last one again."""
    for v in range(LANES):
        group = groups[min(first + v, len(groups) - 1)]
        for j in range(group.size):
            lanes[j, v] = group[j]


@kernel
def _scatter(lanes, first, groups):
    for v in range(min(LANES, len(groups) - first)):
        group = groups[first + v]
        for j in range(group.size):
            group[j] = np.int32(lanes[j, v])


LOW, HIGH, SUM_W, SUM_X, BEST, SCALE, INVERSE, KEPT_INVERSE, KEPT_LOW, SUM_L, SUM_L2, SUM_XL, NEW_SCALE, NEW_LOW = range(14)


@kernel
def fit_affine(x, w, numerators, absolute, scales, minima, codes):
    """weight = scale * code - minimum, codes 0 to ``numerators[0]``, minima at least 0.

    x, w (groups, n) weights and their importance; scales, minima (groups,); codes int8 (groups, n). Each try rounds with
    the scale (highest - lowest) / numerator and takes the weighted least squares fit to the codes found, if its error,
    ``absolute`` or squared, is the least so far. The lowest weight then counts as the minimum of that fit.
    """
    n = x.shape[1]
    scratch = np.empty((3 * n + 14, LANES), np.float32)
    xs, ws, levels, state = scratch[:n], scratch[n : 2 * n], scratch[2 * n : 3 * n], scratch[3 * n :]
    highest = np.int32(numerators[0])
    for first in range(0, len(x), LANES):
        _gather(x, first, xs)
        _gather(w, first, ws)
        for k in range(len(numerators)):
            if k == 0:
                _affine_start(xs, ws, state)
            for v in range(LANES):
                state[INVERSE, v] = numerators[k] / (state[HIGH, v] - state[LOW, v])
            _affine_sums(xs, ws, levels, highest, state)
            if k == 0:
                for v in range(LANES):
                    state[NEW_SCALE, v], state[NEW_LOW, v], state[BEST, v] = F1 / state[INVERSE, v], state[LOW, v], np.inf
            else:
                _affine_solve(state)
            _affine_error(xs, ws, levels, absolute, state)
        for j in range(n):
            for v in range(LANES):
                levels[j, v] = _level(state[KEPT_INVERSE, v] * (xs[j, v] - state[KEPT_LOW, v]), np.int32(0), highest)
        _scatter(levels, first, codes)
        for v in range(min(LANES, len(x) - first)):
            scales[first + v], minima[first + v] = state[SCALE, v], -state[LOW, v]


@kernel
def _affine_start(x, w, s):
    for v in range(LANES):
        s[LOW, v], s[HIGH, v], s[SUM_W, v], s[SUM_X, v] = x[0, v], x[0, v], w[0, v], w[0, v] * x[0, v]
    for j in range(1, len(x)):
        for v in range(LANES):
            s[LOW, v] = x[j, v] if x[j, v] < s[LOW, v] else s[LOW, v]
            s[HIGH, v] = x[j, v] if x[j, v] > s[HIGH, v] else s[HIGH, v]
            s[SUM_W, v] += w[j, v]
            s[SUM_X, v] += w[j, v] * x[j, v]
    for v in range(LANES):
        s[LOW, v] = F0 if s[LOW, v] > F0 else s[LOW, v]


@kernel
def _affine_sums(x, w, levels, highest, s):
    for v in range(LANES):
        s[SUM_L, v], s[SUM_L2, v], s[SUM_XL, v] = F0, F0, F0
    for j in range(len(x)):
        for v in range(LANES):
            level = _level(s[INVERSE, v] * (x[j, v] - s[LOW, v]), np.int32(0), highest)
            wl = w[j, v] * level
            levels[j, v] = level
            s[SUM_L, v] += wl
            s[SUM_L2, v] += wl * level
            s[SUM_XL, v] += wl * x[j, v]


@kernel
def _affine_solve(s):
    for v in range(LANES):
        determinant = s[SUM_W, v] * s[SUM_L2, v] - s[SUM_L, v] * s[SUM_L, v]
        scale = (s[SUM_W, v] * s[SUM_XL, v] - s[SUM_X, v] * s[SUM_L, v]) / determinant
        low = (s[SUM_L2, v] * s[SUM_X, v] - s[SUM_L, v] * s[SUM_XL, v]) / determinant
        scale = s[SUM_XL, v] / s[SUM_L2, v] if low > F0 else scale
        s[NEW_LOW, v] = F0 if low > F0 else low
        s[NEW_SCALE, v] = scale if determinant > F0 else _NAN


@kernel
def _affine_error(x, w, levels, absolute, s):
    for v in range(LANES):
        s[SUM_L, v] = F0
    for j in range(len(x)):
        for v in range(LANES):
            difference = s[NEW_SCALE, v] * levels[j, v] + s[NEW_LOW, v] - x[j, v]
            s[SUM_L, v] += w[j, v] * (abs(difference) if absolute else difference * difference)
    for v in range(LANES):
        better = s[SUM_L, v] < s[BEST, v]
        s[BEST, v] = s[SUM_L, v] if better else s[BEST, v]
        s[SCALE, v] = s[NEW_SCALE, v] if better else s[SCALE, v]
        s[KEPT_INVERSE, v] = s[INVERSE, v] if better else s[KEPT_INVERSE, v]
        s[KEPT_LOW, v] = s[LOW, v] if better else s[KEPT_LOW, v]
        s[LOW, v] = s[NEW_LOW, v] if better else s[LOW, v]
