"""Move a block's grid towards its update before codes are rounded.

A block's weights are ``d * s - m * o``: d and m are two f16 numbers (m is 0 in the types without a minimum), s and o what
the codes and the small integer scales make. Two free numbers for 32 or 256 weights absorb little of an update, but they
can absorb it where it counts: in large language models a few input columns carry most of the activations' energy, and
what rounding adds there is most of the damage. ``refit_row`` finds the d and m whose change fits the update best, column j
weighted by ``importance`` E[x_j²]; what is left is dithered, so that the whole stays unbiased.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernel import kernel
from lora_gguf.quants.half import f32_from_f16

_RIDGE = np.float32(1e-3)
_LARGEST = np.float32(0.5)


@kernel
def _pattern(block, offset):
    return np.uint32(block[offset]) | np.uint32(block[offset + 1]) << 8


@kernel
def _store(half, block, offset):
    block[offset], block[offset + 1] = half & 255, half >> 8


@kernel
def _half_below(value):
    """The f16 pattern next to ``value`` towards zero, small enough that the pattern after it is finite too."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    if magnitude < 0x38800000:  # denormal in f16, whose unit is 2**-24
        half = np.uint32(magnitude.view(np.float32) * np.float32(2.0**24))
    else:
        half = np.uint32((magnitude - 0x38000000) >> 13)
    return np.uint32(min(half, np.uint32(0x7BFE)) | ((bits >> 16) & 0x8000))


@kernel
def _block_sums(x, sums):
    """The sum of each block of ``x`` (cols,), which is overwritten, into ``sums`` (blocks,): by halves, in one order on every machine."""
    size = len(x) // len(sums)
    for b in range(len(sums)):
        block = x[b * size : (b + 1) * size]
        if size == 256:
            for j in range(128):
                block[j] += block[128 + j]
            for j in range(64):
                block[j] += block[64 + j]
            for j in range(32):
                block[j] += block[32 + j]
        elif size > 32:
            for k in range(32, size, 32):
                for j in range(32):
                    block[j] += block[k + j]
        for j in range(16):
            block[j] += block[16 + j]
        for j in range(8):
            block[j] += block[8 + j]
        for j in range(4):
            block[j] += block[4 + j]
        sums[b] = (block[0] + block[1]) + (block[2] + block[3])


@kernel
def expand(values, group, out):
    """Each of ``values`` (groups,) ``group`` times, into ``out`` (cols,)."""
    for g in range(len(values)):
        out[g * group : (g + 1) * group] = values[g]


@kernel
def _best(ss, so, oo, sd, od, half_d, half_m, ridge):
    """The f16 patterns of the d and m whose change (1 + x, 1 + y) comes nearest to the update, and their x and y.

    The error is Σ h (delta - x s + y o)²; of the real optimum's neighbours among f16 numbers the best pair is taken.
    """
    d, m = f32_from_f16(half_d), f32_from_f16(half_m)
    best, best_d, best_m = np.float32(0.0), half_d, half_m
    best_x, best_y = np.float32(0.0), np.float32(0.0)
    inverse = np.float32(1.0) / oo if oo > 0 else np.float32(0.0)
    det = (ss + ridge) - so * so * inverse
    x = (sd - so * od * inverse) / det if det > 0 else np.float32(0.0)
    moves_d = d != 0 and abs(x) < _LARGEST
    below_d = _half_below(d * (np.float32(1.0) + x)) if moves_d else half_d
    for i in range(2 if moves_d else 1):
        new_d = below_d + np.uint32(i)
        x = f32_from_f16(new_d) / d - np.float32(1.0) if moves_d else np.float32(0.0)
        error = ss * x * x - 2 * x * sd
        if m == 0:
            if error < best:
                best, best_d, best_x = error, new_d, x
            continue
        y = (so * x - od) * inverse
        below_m = _half_below(m * (np.float32(1.0) + y) if abs(y) < _LARGEST else m)
        for k in range(2):
            new_m = below_m + np.uint32(k)
            y = f32_from_f16(new_m) / m - np.float32(1.0)
            both = error - 2 * so * x * y + oo * y * y + 2 * y * od
            if both < best:
                best, best_d, best_m, best_x, best_y = both, new_d, new_m, x, y
    return best_d, best_m, best_x, best_y


@kernel
def _dots(p, q, x, sums):
    """Each block's Σ p·q into ``sums`` (blocks,); ``p``, ``q`` and ``x``, for work, are (cols,)."""
    for j in range(len(x)):
        x[j] = p[j] * q[j]
    _block_sums(x, sums)


@kernel
def _moments(s, o, delta, importance, has_m, hs, x, moments):
    """Each block's Σ h·s², Σ h·s·delta, Σ h·s·o and Σ h·o·delta: (4, blocks). ``hs`` and ``x`` (cols,) are for work."""
    for j in range(len(s)):
        hs[j] = importance[j] * s[j]
    _dots(hs, s, x, moments[0])
    _dots(hs, delta, x, moments[1])
    if has_m:
        _dots(hs, o, x, moments[2])
        for j in range(len(s)):
            hs[j] = importance[j] * o[j]
        _dots(hs, delta, x, moments[3])


@kernel
def refit_row(grid, row, unit, steps, delta, left, work, moments):
    """Move the grid of a row towards its update ``delta`` f32 (cols,); ``left`` (cols,) gets what the codes have still to move by.

    ``grid`` is (blocks, lows, importance, heights, d_at, m_at): uint8 (rows, blocks, block_bytes), changed in place; f32 (rows,
    groups); h (cols,) and its sums over the groups, (groups,); the offsets of d and m in a block, m's -1 where there is none.
    A weight is step * unit - low: ``unit`` (cols,) is what the codes count, ``steps`` (groups,) become those of the new grid.
    ``work`` (4, cols) and ``moments`` (6, blocks) hold what comes between.
    """
    blocks, lows, importance, heights, d_at, m_at = grid
    n_blocks, n_cols, has_m = blocks.shape[1], len(unit), m_at >= 0
    per_block, group = len(steps) // n_blocks, n_cols // len(steps)
    s, o, x, y, moved_d, moved_m = work[0], work[1], work[2], work[3], moments[4], moments[5]
    expand(lows[row], group, o)
    expand(steps, group, s)
    for j in range(n_cols):
        s[j] *= unit[j]
    _moments(s, o, delta, importance, has_m, x, y, moments)
    for b in range(n_blocks):
        block, first, oo, height = blocks[row, b], b * per_block, np.float32(0.0), np.float32(0.0)
        for g in range(first, first + per_block):
            oo += heights[g] * lows[row, g] * lows[row, g]
            height += heights[g]
        ridge = _RIDGE * steps[first] * steps[first] * height
        half_d, half_m = _pattern(block, d_at), _pattern(block, m_at) if has_m else np.uint32(0)
        ss, sd, so, od = moments[0, b], moments[1, b], moments[2, b], moments[3, b]
        new_d, new_m, moved_d[b], moved_m[b] = _best(ss, so, oo, sd, od, half_d, half_m, ridge)
        _store(new_d, block, d_at)
        if has_m:
            _store(new_m, block, m_at)
        for g in range(first, first + per_block):
            steps[g] *= np.float32(1.0) + moved_d[b]
    expand(moved_d, n_cols // n_blocks, x)
    expand(moved_m, n_cols // n_blocks, y)
    for j in range(n_cols):
        left[j] = delta[j] - (x[j] * s[j] - y[j] * o[j])
