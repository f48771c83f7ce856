"""ggml's searches for the scale of a group of weights, bit for bit.

A search tries several scales for each group and keeps the one with the least weighted error. Here 64 groups are searched
side by side, one a lane: element j of lane v stands at ``[j, v]`` and what is known of lane v at ``state[NAME, v]``, so
that the inner loops run over lanes and vectorise, while each lane adds in ggml's order. Comparisons with NaN are false,
as in C, so a lane without a fit keeps what it has.

In all of them x and w (groups, n) are f32 weights and their importance, ``numerators`` f32 the tries: a scale is the
group's range, or extreme, divided by a numerator; codes (groups, n) and scales (groups,) are written.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernel import kernel

LANES = 64
F0, F1 = np.float32(0), np.float32(1)
_ROUNDING = np.float32(12582912)  # 1.5 * 2**23: a sum's lowest bit is worth one
_TINY = np.float32(1e-15)


def upward(code_max, first, step, count):
    """``code_max`` itself, then ``count`` numerators from code_max + first on."""
    tries = np.float32(first) + np.float32(step) * np.arange(count, dtype=np.float32) + np.float32(code_max)
    return np.concatenate([np.array([code_max], np.float32), tries])


def around(n, reach):
    """``n`` itself, then numerators up to ``reach`` tenths below and above."""
    tenths = [0, *range(-reach, 0), *range(1, reach + 1)]
    return np.float32(n) + np.float32(0.1) * np.array(tenths, np.float32)


def nearest(t):
    """int32, as ``_nearest``, of an array."""
    return ((t + _ROUNDING).view(np.int32) & 0x7FFFFF) - 0x400000


@kernel
def _nearest(t):
    """The integer nearest to ``t``, ties to even; beyond 2**22 whatever ggml's bit trick gives: for infinity -2**22."""
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
    """weight = scale * code - minimum, with codes 0 to ``numerators[0]`` (int8) and minima (groups,) of at least 0.

    Each try rounds with the scale (highest - lowest) / numerator and takes the weighted least squares fit to the codes
    found, if its error, ``absolute`` or squared, is the least so far; the fit's minimum then replaces the lowest weight.
    The first try is no fit: its scale counts as it is.
    """
    n = x.shape[1]
    scratch = np.empty((3 * n + 14, LANES), np.float32)
    xs, ws, levels, state = scratch[:n], scratch[n : 2 * n], scratch[2 * n : 3 * n], scratch[3 * n :]
    highest = np.int32(numerators[0])
    for first in range(0, len(x), LANES):
        _gather(x, first, xs)
        _gather(w, first, ws)
        _affine_start(xs, ws, state)
        for k in range(len(numerators)):
            _affine_round(xs, ws, numerators[k], highest, levels, state)
            _affine_solve(state, k == 0)
            _affine_keep(xs, ws, levels, absolute, state, k == 0)
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
def _affine_round(x, w, numerator, highest, levels, s):
    for v in range(LANES):
        s[INVERSE, v] = numerator / (s[HIGH, v] - s[LOW, v])
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
def _affine_solve(s, is_first):
    for v in range(LANES):
        determinant = s[SUM_W, v] * s[SUM_L2, v] - s[SUM_L, v] * s[SUM_L, v]
        scale = (s[SUM_W, v] * s[SUM_XL, v] - s[SUM_X, v] * s[SUM_L, v]) / determinant
        low = (s[SUM_L2, v] * s[SUM_X, v] - s[SUM_L, v] * s[SUM_XL, v]) / determinant
        scale = s[SUM_XL, v] / s[SUM_L2, v] if low > F0 else scale
        scale = scale if determinant > F0 else np.float32(np.nan)
        s[NEW_SCALE, v] = F1 / s[INVERSE, v] if is_first else scale
        s[NEW_LOW, v] = s[LOW, v] if is_first else F0 if low > F0 else low


@kernel
def _affine_keep(x, w, levels, absolute, s, is_first):
    error = s[SUM_L]
    error[:] = F0
    for j in range(len(x)):
        for v in range(LANES):
            difference = s[NEW_SCALE, v] * levels[j, v] + s[NEW_LOW, v] - x[j, v]
            error[v] += w[j, v] * (abs(difference) if absolute else difference * difference)
    for v in range(LANES):
        better = (error[v] < s[BEST, v]) | is_first
        s[BEST, v] = error[v] if better else s[BEST, v]
        s[SCALE, v] = s[NEW_SCALE, v] if better else s[SCALE, v]
        s[KEPT_INVERSE, v] = s[INVERSE, v] if better else s[KEPT_INVERSE, v]
        s[KEPT_LOW, v] = s[LOW, v] if better else s[KEPT_LOW, v]
        s[LOW, v] = s[NEW_LOW, v] if better else s[LOW, v]


MAX, AMAX, SUM_WXL, SUM_WL2 = range(4)  # and BEST, SCALE, INVERSE, KEPT_INVERSE as above


@kernel
def fit_symmetric(x, w, numerators, scales, codes):
    """weight = scale * (code - n), n = ``-numerators[0]``, with codes 0 to 2 n - 1.

    Each try rounds with the scale extreme / numerator (the extreme is the weight of the largest magnitude) and takes
    the weighted least squares fit to the codes found if it explains the most so far. A group below 1e-15 is all zero:
    its scale and codes are 0.
    """
    n = x.shape[1]
    scratch = np.empty((3 * n + 8, LANES), np.float32)
    xs, wx, ws, state = scratch[:n], scratch[n : 2 * n], scratch[2 * n : 3 * n], scratch[3 * n :]
    lowest, highest = np.int32(numerators[0]), np.int32(-numerators[0] - 1)
    for first in range(0, len(x), LANES):
        _gather(x, first, xs)
        _gather(w, first, ws)
        _symmetric_start(xs, ws, wx, state)
        for k in range(len(numerators)):
            _symmetric_try(xs, wx, ws, numerators[k], lowest, highest, state, k == 0)
        for j in range(n):
            for v in range(LANES):
                level = _level(state[KEPT_INVERSE, v] * xs[j, v], lowest, highest) - numerators[0]
                xs[j, v] = F0 if state[AMAX, v] < _TINY else level
        _scatter(xs, first, codes)
        for v in range(min(LANES, len(x) - first)):
            scales[first + v] = F0 if state[AMAX, v] < _TINY else state[SCALE, v]


@kernel
def _symmetric_start(x, w, wx, s):
    """n is even: the extremes go back and forth between two pairs of rows; a masked store would stall the next load."""
    s[AMAX] = F0
    s[MAX] = F0
    for j in range(len(x)):
        now, after = 2 * (j & 1), 2 - 2 * (j & 1)
        for v in range(LANES):
            magnitude, largest = abs(x[j, v]), s[AMAX + now, v]
            is_larger = magnitude > largest
            s[MAX + after, v] = x[j, v] if is_larger else s[MAX + now, v]
            s[AMAX + after, v] = magnitude if is_larger else largest
            wx[j, v] = w[j, v] * x[j, v]


@kernel
def _symmetric_try(x, wx, w, numerator, lowest, highest, s, is_first):
    for v in range(LANES):
        s[INVERSE, v] = numerator / s[MAX, v]
        s[SUM_WXL, v], s[SUM_WL2, v] = F0, F0
    for j in range(len(x)):
        for v in range(LANES):
            level = _level(s[INVERSE, v] * x[j, v], lowest, highest)
            s[SUM_WXL, v] += wx[j, v] * level
            s[SUM_WL2, v] += w[j, v] * level * level
    for v in range(LANES):
        explained, norm = s[SUM_WXL, v], s[SUM_WL2, v]
        better = (norm > F0) & (explained * explained > s[BEST, v] * norm) | is_first
        scale = explained / norm if norm != F0 else F0
        s[SCALE, v] = scale if better else s[SCALE, v]
        s[BEST, v] = scale * explained if better else s[BEST, v]
        s[KEPT_INVERSE, v] = s[INVERSE, v] if better else s[KEPT_INVERSE, v]


MOVES = 6


@kernel
def fit_by_descent(x, scales, codes):
    """weight = scale * (code - 4), codes 0 to 7, importance x**2: each code in turn moves to where it explains more."""
    n = x.shape[1]
    scratch = np.empty((3 * n + 7, LANES), np.float32)
    xs, ws, levels, state = scratch[:n], scratch[n : 2 * n], scratch[2 * n : 3 * n], scratch[3 * n :]
    for first in range(0, len(x), LANES):
        _gather(x, first, xs)
        _symmetric_start(xs, xs, ws, state)
        _descent_start(xs, ws, levels, state)
        for _ in range(5):
            if not _descend(xs, ws, levels, state):
                break
        for j in range(n):
            for v in range(LANES):
                levels[j, v] = F0 if state[AMAX, v] < _TINY else levels[j, v] + np.float32(4)
        _scatter(levels, first, codes)
        for v in range(min(LANES, len(x) - first)):
            scale = state[SUM_WXL, v] / state[SUM_WL2, v]
            scales[first + v] = F0 if state[AMAX, v] < _TINY else scale


@kernel
def _descent_start(x, w, levels, s):
    s[SUM_WXL] = F0
    s[SUM_WL2] = F0
    for j in range(len(x)):
        for v in range(LANES):
            level = _level(np.float32(-4) / s[MAX, v] * x[j, v], np.int32(-4), np.int32(3))
            levels[j, v] = level
            s[SUM_WXL, v] += w[j, v] * x[j, v] * level
            s[SUM_WL2, v] += w[j, v] * level * level


@kernel
def _descend(x, w, levels, s):
    """Whether a code moved. n is even, and the sums go back and forth as the extremes above."""
    s[MOVES] = F0
    for j in range(len(x)):
        now, after = 2 * (j & 1), 2 - 2 * (j & 1)
        for v in range(LANES):
            level, weight, wx = levels[j, v], w[j, v], w[j, v] * x[j, v]
            old_explained, old_norm = s[SUM_WXL + now, v], s[SUM_WL2 + now, v]
            explained, norm = old_explained - wx * level, old_norm - weight * level * level
            moved = _level(x[j, v] * norm / explained, np.int32(-4), np.int32(3))
            new_explained, new_norm = explained + wx * moved, norm + weight * moved * moved
            gains = new_explained * new_explained * old_norm > old_explained * old_explained * new_norm
            better = (explained > F0) & (moved != level) & (new_norm > F0) & gains
            levels[j, v] = moved if better else level
            s[SUM_WXL + after, v] = new_explained if better else old_explained
            s[SUM_WL2 + after, v] = new_norm if better else old_norm
            s[MOVES, v] += F1 if better else F0
    return s[MOVES].any()


LARGEST, ERROR = 0, 9  # and SUM_WXL, SUM_WL2, BEST, SCALE, INVERSE, KEPT_INVERSE as above
_NO_LIMIT = np.int32(-0x7FFFFFFF)


@kernel
def fit_positive(x, w, numerators, scales, codes):
    """weight = scale * code, codes 0 to ``numerators[0]`` (uint8): the scales of a super-block as weights themselves.

    The best of the tries by squared error, then each code in turn moves to where it explains more. Codes are kept as
    bytes; a negative one, which only a negative weight brings about, wraps around.
    """
    n = x.shape[1]
    scratch = np.empty((3 * n + 10, LANES), np.float32)
    xs, ws, levels, state = scratch[:n], scratch[n : 2 * n], scratch[2 * n : 3 * n], scratch[3 * n :]
    highest = np.int32(numerators[0])
    for first in range(0, len(x), LANES):
        _gather(x, first, xs)
        _gather(w, first, ws)
        state[LARGEST] = F0
        for j in range(n):
            for v in range(LANES):
                state[LARGEST, v] = state[LARGEST, v] if state[LARGEST, v] > xs[j, v] else xs[j, v]
        for k in range(len(numerators)):
            _positive_try(xs, ws, numerators[k], highest, state, k == 0)
        _positive_round(xs, ws, highest, levels, state)
        for _ in range(5):
            _positive_descend(xs, ws, highest, levels, state)
        for v in range(min(LANES, len(x) - first)):
            has_scale = not state[LARGEST, v] < _TINY
            scale = state[SUM_WXL, v] / state[SUM_WL2, v] if state[SUM_WL2, v] > F0 else F0
            scales[first + v] = scale if has_scale else F0
            for j in range(n):
                codes[first + v, j] = np.int32(levels[j, v]) if has_scale else 0


@kernel
def _byte(level):
    return np.float32(np.int32(level) & 255)


@kernel
def _positive_try(x, w, numerator, highest, s, is_first):
    for v in range(LANES):
        s[INVERSE, v] = numerator / s[LARGEST, v]
        s[SCALE, v] = F1 / s[INVERSE, v]
        s[ERROR, v] = F0
    for j in range(len(x)):
        for v in range(LANES):
            level = _level(s[INVERSE, v] * x[j, v], _NO_LIMIT, highest)
            difference = x[j, v] - s[SCALE, v] * (_byte(level) if is_first else level)
            s[ERROR, v] += w[j, v] * difference * difference
    for v in range(LANES):
        better = (s[ERROR, v] < s[BEST, v]) | is_first
        s[BEST, v] = s[ERROR, v] if better else s[BEST, v]
        s[KEPT_INVERSE, v] = s[INVERSE, v] if better else s[KEPT_INVERSE, v]


@kernel
def _positive_round(x, w, highest, levels, s):
    s[SUM_WXL] = F0
    s[SUM_WL2] = F0
    for j in range(len(x)):
        for v in range(LANES):
            level = _level(s[KEPT_INVERSE, v] * x[j, v], _NO_LIMIT, highest)
            levels[j, v] = _byte(level)
            s[SUM_WXL, v] += w[j, v] * x[j, v] * level
            s[SUM_WL2, v] += w[j, v] * level * level


@kernel
def _positive_descend(x, w, highest, levels, s):
    for j in range(len(x)):
        for v in range(LANES):
            level, weight, wx = levels[j, v], w[j, v], w[j, v] * x[j, v]
            explained, norm = s[SUM_WXL, v] - wx * level, s[SUM_WL2, v] - weight * level * level
            moved = _level(x[j, v] * norm / explained, _NO_LIMIT, highest)
            new_explained, new_norm = explained + wx * moved, norm + weight * moved * moved
            gains = new_explained * new_explained * s[SUM_WL2, v] > s[SUM_WXL, v] * s[SUM_WXL, v] * new_norm
            better = (explained > F0) & (norm > F0) & (moved != level) & gains
            levels[j, v] = _byte(moved) if better else level
            s[SUM_WXL, v] = new_explained if better else s[SUM_WXL, v]
            s[SUM_WL2, v] = new_norm if better else s[SUM_WL2, v]


@kernel
def recode(x, steps, minima, lowest, highest, codes):
    """code = round((x + minimum) / step) - lowest; where the step is 0 the code stays.

    x, codes (m, 32); steps, minima (m, 1), or (m, 2) for groups of 16, as fewer than 32 lanes are not vectorised.
    """
    last = steps.shape[1] - 1
    for g in range(len(x)):
        xg, group = x[g], codes[g]
        step_a, step_b, minimum_a, minimum_b = steps[g, 0], steps[g, last], minima[g, 0], minima[g, last]
        for j in range(group.size):
            step, minimum = step_a if j < 16 else step_b, minimum_a if j < 16 else minimum_b
            code = np.int8(np.int32(_level((xg[j] + minimum) / step, lowest, highest)) - lowest)
            group[j] = code if step != F0 else group[j]


def sums(x):
    """f32 sums of the rows of x (groups, n), added one after the other."""
    out = np.empty(len(x), np.float32)
    _sums(x, out)
    return out


@kernel
def _sums(x, out):
    for g in range(len(x)):
        total = F0
        for value in x[g]:
            total += value
        out[g] = total


def extremes(x):
    """Per group of x (groups, n) the weight of the largest magnitude, the lowest and the highest; of equals the first."""
    found = np.empty((3, len(x)), np.float32)
    _find_extremes(x, found)
    return found


@kernel
def _find_extremes(x, found):
    for g in range(len(x)):
        bits = x[g].view(np.int32)
        low_key, high_key = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for j in range(bits.size):
            key = _ordered(bits[j])
            low_key, high_key = min(low_key, key), max(high_key, key)
        low, high = np.int32(_ordered(low_key)).view(np.float32), np.int32(_ordered(high_key)).view(np.float32)
        if low == -high:
            found[0, g] = _first(x[g], low, high) + F0
        else:
            found[0, g] = high if high > -low else low
        found[1, g], found[2, g] = _first(x[g], low, low) if low == F0 else low, high


@kernel
def _ordered(bits):
    """An integer that grows with the number whose bits these are, and the bits again of such an integer."""
    return np.int32(bits ^ (np.int32(bits >> 31) & 0x7FFFFFFF))


@kernel
def _first(x, a, b):
    for value in x:
        if value == a or value == b:
            return value
    return a


@kernel
def truncate(x, inverses, minima, offset, code_max, codes):
    """codes = int8((x - minimum) * inverse + offset), at most ``code_max``; what no int32 can hold becomes 0."""
    for g in range(len(x)):
        xg, inverse, minimum, group = x[g], inverses[g], minima[g], codes[g]
        for j in range(group.size):
            t = (xg[j] - minimum) * inverse + offset
            code = np.int8(np.int32(t if abs(t) < np.float32(2.0**31) else F0))
            group[j] = code if code < code_max else code_max


@kernel
def round_away(x, inverses, codes):
    """codes = int8 of x * inverse rounded, halves away from zero; what no int32 can hold becomes 0."""
    for g in range(len(x)):
        xg, inverse, group = x[g], inverses[g], codes[g]
        for j in range(group.size):
            t = xg[j] * inverse
            whole = np.trunc(t)
            whole += np.float32(np.copysign(F1, t)) if abs(t - whole) >= np.float32(0.5) else F0
            group[j] = np.int8(np.int32(whole if abs(whole) < np.float32(2.0**31) else F0))
