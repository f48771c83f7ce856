"""Which code a weight gets once its block's grid is known, and the update that moves it.

A weight lies on the grid; its update ``delta`` is a small part of the grid's step. The rules differ in the offset that
is added before the floor:

    nearest     0.5: moves only where the update exceeds half a step, and so erases most adapters
    dither      uniform in [0, 1): moves by one step with probability |delta| / step, unbiased (stochastic rounding)

``refit`` comes before either: it moves the grid itself so that the columns that matter most need no rounding.

The random numbers are a hash of (seed, tensor name, row, column): the bytes depend on neither threads nor chunks.
"""

from __future__ import annotations

import hashlib

import numpy as np

from lora_gguf.kernel import kernel, report_kernel
from lora_gguf.quants.half import f32_from_f16

_GOLDEN = np.uint32(0x9E3779B9)
_UNIT = np.float32(2.0**-24)


def tensor_key(seed: int, name: str) -> np.uint64:
    """The key of a tensor's random numbers."""
    return np.uint64(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()[:8], "little"))


@kernel
def _row_key(key, row):
    """The 32-bit key of one row: a 64-bit finalizer (splitmix64) of the tensor's key and the row's number."""
    x = np.uint64(key) + np.uint64(row + 1) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint32((x ^ (x >> np.uint64(31))) & np.uint64(0xFFFFFFFF))


@kernel
def _uniform(row_key, column):
    """A number in [0, 1), a multiple of 2**-24: a 32-bit mixing of the row's key and the column (two rounds)."""
    x = np.uint32(row_key + np.uint32(column) * _GOLDEN)
    x = np.uint32((x ^ np.uint32(x >> 16)) * np.uint32(0x21F0AAAD))
    x = np.uint32((x ^ np.uint32(x >> 15)) * np.uint32(0x735A2D97))
    x = np.uint32(x ^ np.uint32(x >> 15))
    return np.float32(np.int32(x >> 8)) * _UNIT


@kernel
def low_rank(b, a, delta):
    """delta = b @ a in f32: b (rows, r), a (r, cols), delta (rows, cols). The sum over r runs in one order for every
    element, whatever the chunk: BLAS does not promise that."""
    n_rows, rank = b.shape
    whole = rank // 8 * 8
    for i in range(n_rows):
        row = delta[i]
        row[:] = np.float32(0.0)
        for k in range(0, whole, 8):
            b0, b1, b2, b3 = b[i, k], b[i, k + 1], b[i, k + 2], b[i, k + 3]
            b4, b5, b6, b7 = b[i, k + 4], b[i, k + 5], b[i, k + 6], b[i, k + 7]
            a0, a1, a2, a3, a4, a5, a6, a7 = a[k], a[k + 1], a[k + 2], a[k + 3], a[k + 4], a[k + 5], a[k + 6], a[k + 7]
            for j in range(len(row)):
                half = (((row[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]
                row[j] = (((half + b4 * a4[j]) + b5 * a5[j]) + b6 * a6[j]) + b7 * a7[j]
        for k in range(whole, rank):
            b0, a0 = b[i, k], a[k]
            for j in range(len(row)):
                row[j] += b0 * a0[j]


@report_kernel
def _tally(delta, moved, changed, sums):
    """Add a row's Σ delta·moved, Σ delta², Σ moved² and its number of changed codes to ``sums`` (4,)."""
    both = wanted = got = np.float32(0.0)
    for j in range(len(delta)):
        both += delta[j] * moved[j]
        wanted += delta[j] * delta[j]
        got += moved[j] * moved[j]
    sums[0] += both
    sums[1] += wanted
    sums[2] += got
    sums[3] += changed


@kernel
def _expand(values, group, out):
    for g in range(len(values)):
        out[g * group : (g + 1) * group] = values[g]


@kernel
def _shift(slope, drop, codes, zero):
    """What the grid moved a row by, slope * (code - zero) - drop, into ``slope``."""
    for j in range(len(codes)):
        slope[j] = slope[j] * (np.float32(codes[j]) - zero) - drop[j]


@kernel
def _in_steps(delta, step, ratio):
    for j in range(len(delta)):
        ratio[j] = np.float32(0.0) if step[j] == 0 else delta[j] / step[j]


@kernel
def _left_in_steps(delta, shift, step, ratio):
    for j in range(len(delta)):
        ratio[j] = np.float32(0.0) if step[j] == 0 else (delta[j] - shift[j]) / step[j]


@report_kernel
def _n_outside(codes, ratio, least, most):
    n = np.float32(0.0)
    for j in range(len(codes)):
        wanted = np.float32(codes[j]) + ratio[j]
        n += np.float32(1.0) if wanted < least or wanted > most else np.float32(0.0)
    return n


@kernel
def _move(codes, ratio, low, high, spread, row_key):
    """Round one row's ``ratio``, the update in steps, and apply it to ``codes``; ``ratio`` becomes what the codes moved by."""
    base = np.float32(0.5) - np.float32(0.5) * spread
    for j in range(len(ratio)):
        ratio[j] = np.floor(ratio[j] + (base + spread * _uniform(row_key, j)))
    for j in range(len(codes)):
        old = np.float32(codes[j])
        ratio[j] = min(max(ratio[j], low - old), high - old)
    for j in range(len(codes)):
        codes[j] = np.int8(codes[j] + np.int8(np.int32(ratio[j])))


@report_kernel
def _n_changed(moved):
    n = np.float32(0.0)
    for j in range(len(moved)):
        n += np.float32(0.0) if moved[j] == 0 else np.float32(1.0)
    return n


@kernel
def _times(moved, step):
    for j in range(len(moved)):
        moved[j] *= step[j]


@kernel
def _plus(shift, moved):
    for j in range(len(moved)):
        moved[j] += shift[j]


@kernel
def round_codes(codes, zero, steps, slopes, drops, delta, low, high, spread, key, first_row, sums, outside):
    """Move int8 ``codes`` (rows, cols), in place, by ``delta`` (rows, cols) on a grid of ``steps`` (rows, cols // group).

    What the grid has moved already is ``slopes`` * (code - ``zero``) - ``drops``, both shaped as ``steps``, or (0, 0) where it
    has not. ``low`` and ``high`` are the least and the largest code. ``spread`` is the width of the random offset: 1 dithers,
    0 rounds to nearest. ``sums`` (4,) f64 gains Σ wanted·achieved, Σ wanted², Σ achieved², and the number of codes that changed;
    where the grid moved, ``outside`` int64 (rows,) gets the number of weights that leave its range by more than half a step.
    """
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    step, ratio = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    shift, drop = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    for i in range(n_rows):
        _expand(steps[i], group, step)
        if len(slopes):
            _expand(slopes[i], group, shift)
            _expand(drops[i], group, drop)
            _shift(shift, drop, codes[i], zero)
            _left_in_steps(delta[i], shift, step, ratio)
            outside[i] = _n_outside(codes[i], ratio, low - np.float32(0.5), high + np.float32(0.5))
        else:
            _in_steps(delta[i], step, ratio)
        _move(codes[i], ratio, low, high, spread, _row_key(key, first_row + i))
        changed = _n_changed(ratio)
        _times(ratio, step)
        if len(slopes):
            _plus(shift, ratio)
        _tally(delta[i], ratio, changed, sums)


@kernel
def beyond(codes, zero, steps, slopes, drops, delta, low, high, outside, least):
    """How many weights of each group leave the grid's range by more than half a step: uint8 (rows, groups).

    Rows with at most ``least`` weights ``outside`` are not looked into. Arguments as for ``round_codes``.
    """
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    counts = np.zeros(steps.shape, np.uint8)
    for i in range(n_rows):
        for g in range(steps.shape[1] if outside[i] > least else 0):
            inverse = np.float32(0.0) if steps[i, g] == 0 else np.float32(1.0) / steps[i, g]
            for j in range(g * group, (g + 1) * group):
                code = np.float32(codes[i, j])
                wanted = code + (delta[i, j] - (slopes[i, g] * (code - zero) - drops[i, g])) * inverse
                if counts[i, g] < 255 and (wanted < low - np.float32(0.5) or wanted > high + np.float32(0.5)):
                    counts[i, g] += 1
    return counts


@kernel
def _bracket(wanted, levels, below, low, high):
    """For each of ``wanted`` (cols,): the number, the value and the successor of the last level that is not above it."""
    below[:] = np.int32(0)
    low[:] = levels[0]
    high[:] = levels[1]
    for c in range(1, len(levels) - 1):
        level, following = levels[c], levels[c + 1]
        for j in range(len(wanted)):
            below[j] += np.int32(wanted[j] >= level)
            low[j] = level if wanted[j] >= level else low[j]
            high[j] = following if wanted[j] >= level else high[j]


@kernel
def round_levels(codes, steps, slopes, delta, levels, code_min, spread, key, first_row, sums):
    """As ``round_codes``, on a codebook: code c stands for ``levels[c - code_min] * step``, levels ascending, f32."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    wanted, low = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    high, moved = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    below = np.empty(n_cols, np.int32)
    base = np.float32(0.5) - np.float32(0.5) * spread
    for i in range(n_rows):
        row_key = _row_key(key, first_row + i)
        for g in range(steps.shape[1]):
            inverse = np.float32(0.0) if steps[i, g] == 0 else np.float32(1.0) / steps[i, g]
            slope = slopes[i, g] if len(slopes) else np.float32(0.0)
            for j in range(g * group, (g + 1) * group):
                level = levels[codes[i, j] - code_min]
                moved[j] = slope * level
                wanted[j] = level + (delta[i, j] - moved[j]) * inverse
        _bracket(wanted, levels, below, low, high)
        changed = 0
        for j in range(n_cols):
            fraction = min(max((wanted[j] - low[j]) / (high[j] - low[j]), np.float32(0.0)), np.float32(1.0))
            up = np.floor(fraction + (base + spread * _uniform(row_key, j)))
            old = np.int32(codes[i, j]) - code_min
            new = old if delta[i, j] == moved[j] or steps[i, j // group] == 0 else below[j] + np.int32(up)
            codes[i, j] = np.int8(new + code_min)
            moved[j] += (levels[new] - levels[old]) * steps[i, j // group]
            changed += new != old
        _tally(delta[i], moved, changed, sums)


@kernel
def round_bf16(halves, delta, spread, key, first_row, sums):
    """Move bf16 bit patterns ``halves`` uint16 (rows, cols), in place, by ``delta``; the rest as ``round_codes``."""
    n_rows, n_cols = halves.shape
    moved = np.empty(n_cols, np.float32)
    base = np.float32(0.5) - np.float32(0.5) * np.float32(spread)
    for i in range(n_rows):
        row_key = _row_key(key, first_row + i)
        changed = 0
        for j in range(n_cols):
            old = np.uint32(np.uint32(halves[i, j]) << 16)
            wanted = np.float32(old.view(np.float32) + delta[i, j])
            offset = base + np.float32(spread) * _uniform(row_key, j)
            carried = wanted.view(np.uint32) + np.uint32(offset * np.float32(65536.0))
            new = np.uint32(old if delta[i, j] == 0 else carried & 0xFFFF0000)
            halves[i, j] = np.uint16(new >> 16)
            moved[j] = np.uint32(new).view(np.float32) - old.view(np.float32)
            changed += new != old
        _tally(delta[i], moved, changed, sums)


@kernel
def _f16_offset(wanted, offset):
    """The f16 pattern below or above ``wanted`` in magnitude: the one below, moved up with probability 1 - fraction."""
    bits = np.float32(wanted).view(np.uint32)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    if magnitude < 0x38800000:  # denormal in f16, whose unit is 2**-24
        pattern = np.uint32(np.floor(magnitude.view(np.float32) * np.float32(2.0**24) + offset))
    else:
        pattern = np.uint32((magnitude - 0x38000000 + np.uint32(offset * np.float32(8192.0))) >> 13)
    return np.uint16(min(pattern, np.uint32(0x7C00)) | ((bits >> 16) & 0x8000))


@kernel
def round_f16(halves, delta, spread, key, first_row, sums):
    """As ``round_bf16``, for f16 bit patterns."""
    n_rows, n_cols = halves.shape
    moved = np.empty(n_cols, np.float32)
    base = np.float32(0.5) - np.float32(0.5) * np.float32(spread)
    for i in range(n_rows):
        row_key = _row_key(key, first_row + i)
        changed = 0
        for j in range(n_cols):
            old = halves[i, j]
            value = f32_from_f16(old)
            new = old
            if delta[i, j] != 0:
                new = _f16_offset(np.float32(value + delta[i, j]), base + np.float32(spread) * _uniform(row_key, j))
            halves[i, j] = new
            moved[j] = f32_from_f16(new) - value
            changed += new != old
        _tally(delta[i], moved, changed, sums)


@kernel
def tally_rows(before, after, delta, sums):
    """Add what became of ``delta`` when weights ``before`` turned into ``after`` (all f32, (rows, cols)) to ``sums``."""
    n_rows, n_cols = before.shape
    moved = np.empty(n_cols, np.float32)
    for i in range(n_rows):
        changed = 0
        for j in range(n_cols):
            moved[j] = after[i, j] - before[i, j]
            changed += moved[j] != 0
        _tally(delta[i], moved, changed, sums)
