"""Move a block's grid towards its update before codes are rounded.

A block's weights are ``d * s - m * o``: d and m are two f16 numbers (m is 0 in the types without a minimum), s and o what
the codes and the small integer scales make. Two free numbers for 32 or 256 weights absorb little of an update, but they
can absorb it where it counts: in large language models a few input columns carry most of the activations' energy, and
what rounding adds there is most of the damage. ``refit`` finds the d and m whose change fits the update best, column j
weighted by ``importance`` E[x_j²]; what is left is dithered, so that the whole stays unbiased.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernel import kernel
from lora_gguf.quants.half import f16_from_f32, f32_from_f16

_RIDGE = np.float32(1e-3)
_LARGEST = np.float32(0.5)


@kernel
def _field(block, offset):
    return f32_from_f16(np.uint32(block[offset]) | np.uint32(block[offset + 1]) << 8)


@kernel
def _store(value, block, offset):
    """Write ``value``, which f16 holds exactly."""
    half = f16_from_f32(value)
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
def _expand(values, group, out):
    for g in range(len(values)):
        out[g * group : (g + 1) * group] = values[g]


@kernel
def _moments(unit, steps, lows, delta, importance, has_m, moments):
    """Each block's Σ h·s², Σ h·s·o, Σ h·o², Σ h·s·delta, Σ h·o·delta and Σ h, with s = step * unit and o = low.

    ``unit``, ``delta`` and ``importance`` are (cols,), ``steps`` and ``lows`` (groups,), ``moments`` (6, blocks).
    """
    n_cols = len(unit)
    group = n_cols // len(steps)
    s, hs, x = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    _expand(steps, group, s)
    for j in range(n_cols):
        s[j] *= unit[j]
    for j in range(n_cols):
        hs[j] = importance[j] * s[j]
    for j in range(n_cols):
        x[j] = hs[j] * delta[j]
    _block_sums(x, moments[3])
    for j in range(n_cols):
        x[j] = hs[j] * s[j]
    _block_sums(x, moments[0])
    if has_m:
        o = s
        _expand(lows, group, o)
        for j in range(n_cols):
            hs[j] *= o[j]
        _block_sums(hs, moments[1])
        for j in range(n_cols):
            x[j] = importance[j] * o[j]
        for j in range(n_cols):
            hs[j] = x[j] * delta[j]
        _block_sums(hs, moments[4])
        for j in range(n_cols):
            x[j] *= o[j]
        _block_sums(x, moments[2])


@kernel
def _best(ss, so, oo, sd, od, d, m, ridge):
    """The f16 values of d and m whose change (1 + x, 1 + y) comes nearest to the update, and their x and y.

    The error is Σ h (delta - x s + y o)²; of the real optimum's neighbours among f16 numbers the best pair is taken.
    """
    best, best_d, best_m = np.float32(0.0), d, m
    best_x, best_y = np.float32(0.0), np.float32(0.0)
    inverse = np.float32(1.0) / oo if oo > 0 else np.float32(0.0)
    det = (ss + ridge) - so * so * inverse
    x = (sd - so * od * inverse) / det if det > 0 else np.float32(0.0)
    moves_d = d != 0 and abs(x) < _LARGEST
    below_d = _half_below(d * (np.float32(1.0) + x))
    for i in range(2 if moves_d else 1):
        new_d = f32_from_f16(below_d + np.uint32(i)) if moves_d else d
        x = new_d / d - np.float32(1.0) if moves_d else np.float32(0.0)
        error = ss * x * x - 2 * x * sd
        if m == 0:
            if error < best:
                best, best_d, best_x = error, new_d, x
            continue
        y = (so * x - od) * inverse
        below_m = _half_below(m * (np.float32(1.0) + y)) if abs(y) < _LARGEST else _half_below(m)
        for k in range(2):
            new_m = f32_from_f16(below_m + np.uint32(k))
            y = new_m / m - np.float32(1.0)
            both = error - 2 * so * x * y + oo * y * y + 2 * y * od
            if both < best:
                best, best_d, best_m, best_x, best_y = both, new_d, new_m, x, y
    return best_d, best_m, best_x, best_y


@kernel
def refit(blocks, codes, zero, levels, code_min, steps, lows, delta, importance, n_blocks, d_at, m_at, slopes, drops):
    """Move the grids of ``blocks`` uint8 (rows, row_bytes), in place, towards ``delta`` f32 (rows, cols).

    ``codes`` int8 (rows, cols), ``steps`` and ``lows`` f32 (rows, cols // group) are what the blocks hold, ``levels`` (0,)
    where it is not a codebook. ``importance`` is f32 (cols,). A row has ``n_blocks``; ``d_at`` and ``m_at`` are the f16 fields' offsets
    in a block, ``m_at`` -1 where there is no minimum. On return ``steps`` are those of the new grid; a weight has moved by
    slope * (code - zero) - drop, or by slope * level: ``slopes`` and ``drops`` are shaped as ``steps``.
    """
    n_rows, n_cols = codes.shape
    per_block, block_bytes, has_m = steps.shape[1] // n_blocks, blocks.shape[1] // n_blocks, m_at >= 0
    unit, moments = np.empty(n_cols, np.float32), np.zeros((6, n_blocks), np.float32)
    _block_sums(importance.copy(), moments[5])
    for i in range(n_rows):
        if len(levels):
            for j in range(n_cols):
                unit[j] = levels[codes[i, j] - code_min]
        else:
            for j in range(n_cols):
                unit[j] = np.float32(codes[i, j]) - zero
        _moments(unit, steps[i], lows[i], delta[i], importance, has_m, moments)
        for b in range(n_blocks):
            block, first = blocks[i, b * block_bytes : (b + 1) * block_bytes], b * per_block
            d, m = _field(block, d_at), _field(block, m_at) if has_m else np.float32(0.0)
            ridge = _RIDGE * steps[i, first] * steps[i, first] * moments[5, b]
            ss, so, oo, sd, od = moments[0, b], moments[1, b], moments[2, b], moments[3, b], moments[4, b]
            new_d, new_m, x, y = _best(ss, so, oo, sd, od, d, m, ridge)
            _store(new_d, block, d_at)
            if has_m:
                _store(new_m, block, m_at)
            for g in range(first, first + per_block):
                slopes[i, g], drops[i, g] = x * steps[i, g], y * lows[i, g]
                steps[i, g] *= np.float32(1.0) + x
