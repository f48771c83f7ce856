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
def _half_near(old, ratio, up):
    """The f16 pattern just below (or above, ``up``) ``old * (1 + ratio)`` in magnitude."""
    wanted = np.float32(old * (np.float32(1.0) + ratio))
    half = f16_from_f32(wanted)
    below = abs(f32_from_f16(half)) <= abs(wanted)
    if up and below:
        half = np.uint16(half + 1)
    if not up and not below:
        half = np.uint16(half - 1)
    return half


@kernel
def _moments(codes, step, weights, delta, importance, columns, has_m):
    """Σ h·s², Σ h·s·o, Σ h·o², Σ h·s·delta, Σ h·o·delta and Σ h over some ``columns`` of a row."""
    ss = so = oo = sd = od = hh = np.float32(0.0)
    for j in columns:
        h, change = importance[j], delta[j]
        s = step[j] * np.float32(codes[j]) if has_m else weights[j]
        o = s - weights[j]
        hs, ho = h * s, h * o
        ss, so, oo = ss + hs * s, so + hs * o, oo + ho * o
        sd, od, hh = sd + hs * change, od + ho * change, hh + h
    return ss, so, oo, sd, od, hh


@kernel
def _best(ss, so, oo, sd, od, d, m, ridge):
    """The f16 patterns of d and m whose change (1 + x, 1 + y) comes nearest to the update, and their x and y.

    The error is Σ h (delta - x s + y o)²; of the real optimum's neighbours among f16 numbers the best pair is taken.
    """
    best, best_d, best_m = np.float32(0.0), f16_from_f32(d), f16_from_f32(m)
    best_x, best_y = np.float32(0.0), np.float32(0.0)
    inverse = np.float32(1.0) / oo if oo > 0 else np.float32(0.0)
    det = (ss + ridge) - so * so * inverse
    x = (sd - so * od * inverse) / det if det > 0 else np.float32(0.0)
    if d == 0 or not abs(x) < _LARGEST:
        x = np.float32(0.0)
    for i in range(2):
        half_d = _half_near(d, x, i == 1)
        exact_x = f32_from_f16(half_d) / d - np.float32(1.0) if d != 0 else np.float32(0.0)
        y = (so * exact_x - od) * inverse
        if m == 0 or not abs(y) < _LARGEST:
            y = np.float32(0.0)
        for k in range(2):
            half_m = _half_near(m, y, k == 1)
            exact_y = f32_from_f16(half_m) / m - np.float32(1.0) if m != 0 else np.float32(0.0)
            error = ss * exact_x * exact_x - 2 * so * exact_x * exact_y + oo * exact_y * exact_y - 2 * exact_x * sd + 2 * exact_y * od
            if error < best:
                best, best_d, best_m, best_x, best_y = error, half_d, half_m, exact_x, exact_y
    return best_d, best_m, best_x, best_y


@kernel
def refit(blocks, weights, codes, steps, delta, importance, columns, d_at, m_at, shift):
    """Move the grids of ``blocks`` uint8 (rows, row_bytes), in place, towards ``delta`` f32 (rows, cols).

    ``weights`` f32, ``codes`` int8 (rows, cols) and ``steps`` f32 (rows, cols // group) are what the blocks hold.
    ``importance`` is f32 (cols,), ``columns`` int32 (blocks of a row, n): those that the fit looks at. ``d_at`` and ``m_at``
    are the f16 fields' offsets in a block, ``m_at`` -1 where there is no minimum. On return ``steps`` are those of the new
    grid, ``shift`` (rows, cols) is what the grid moved and ``delta`` what is left.
    """
    n_rows, n_groups, n_blocks = len(weights), steps.shape[1], len(columns)
    per_block, block_bytes = n_groups // n_blocks, blocks.shape[1] // n_blocks
    has_m = m_at >= 0
    step = np.empty((n_groups, weights.shape[1] // n_groups), np.float32)
    by_d, by_m = np.empty((n_blocks, weights.shape[1] // n_blocks), np.float32), np.empty((n_blocks, weights.shape[1] // n_blocks), np.float32)
    for i in range(n_rows):
        for g in range(n_groups):
            step[g, :] = steps[i, g]
        for b in range(n_blocks):
            block = blocks[i, b * block_bytes : (b + 1) * block_bytes]
            ss, so, oo, sd, od, hh = _moments(
                codes[i], step.ravel(), weights[i], delta[i], importance, columns[b], has_m
            )
            d, m = _field(block, d_at), _field(block, m_at) if has_m else np.float32(0.0)
            first = steps[i, b * per_block]
            half_d, half_m, x, y = _best(ss, so, oo, sd, od, d, m, _RIDGE * first * first * hh)
            block[d_at], block[d_at + 1] = half_d & 255, half_d >> 8
            if has_m:
                block[m_at], block[m_at + 1] = half_m & 255, half_m >> 8
            by_d[b, :] = x
            by_m[b, :] = y
            for g in range(b * per_block, (b + 1) * per_block):
                steps[i, g] *= np.float32(1.0) + x
        if has_m:
            _shift_both(codes[i], step.ravel(), weights[i], by_d.ravel(), by_m.ravel(), shift[i], delta[i])
        else:
            _shift_scale(weights[i], by_d.ravel(), shift[i], delta[i])


@kernel
def _shift_both(codes, step, weights, by_d, by_m, shift, delta):
    """Move a row whose d grow by the factors 1 + ``by_d``, and m by 1 + ``by_m``; all (cols,), ``step`` overwritten.

    Three loops, since LLVM vectorises none that has to check so many arrays for overlap.
    """
    for j in range(len(delta)):
        step[j] *= np.float32(codes[j])
    for j in range(len(delta)):
        shift[j] = by_d[j] * step[j] - by_m[j] * (step[j] - weights[j])
    for j in range(len(delta)):
        delta[j] -= shift[j]


@kernel
def _shift_scale(weights, by_d, shift, delta):
    for j in range(len(delta)):
        shift[j] = by_d[j] * weights[j]
    for j in range(len(delta)):
        delta[j] -= shift[j]
