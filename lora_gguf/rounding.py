"""Which code a weight gets once its block's grid is known, and the update that moves it.

A weight lies on the grid; its update ``delta`` is a small part of the grid's step. The rules differ in the offset that
is added before the floor:

    nearest     0.5: moves only where the update exceeds half a step, and so erases most adapters
    dither      uniform in [0, 1): moves by one step with probability |delta| / step, unbiased (stochastic rounding)

``refit_row`` comes before either: it moves the grid itself so that the columns that matter most need no rounding.

The random numbers are a hash of (seed, tensor name, row, column): the bytes depend on neither threads nor chunks.
"""

from __future__ import annotations

import hashlib

import numpy as np

from lora_gguf.kernel import kernel, report_kernel
from lora_gguf.quants.half import f32_from_f16
from lora_gguf.refit import expand, refit_row

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
def _bits(row_key, column):
    """A whole number in [0, 2**24) as f32: a 32-bit mixing of the row's key and the column (two rounds)."""
    x = np.uint32(row_key + np.uint32(column) * _GOLDEN)
    x = np.uint32((x ^ np.uint32(x >> 16)) * np.uint32(0x21F0AAAD))
    x = np.uint32((x ^ np.uint32(x >> 15)) * np.uint32(0x735A2D97))
    x = np.uint32(x ^ np.uint32(x >> 15))
    return np.float32(np.int32(x >> 8))


@kernel
def _uniform(row_key, column):
    """A number in [0, 1), a multiple of 2**-24."""
    return _bits(row_key, column) * _UNIT


@kernel
def _eight(row, k):
    return row[k], row[k + 1], row[k + 2], row[k + 3], row[k + 4], row[k + 5], row[k + 6], row[k + 7]


@kernel
def _plus(y, b, x):
    """y + Σ b·x over eight factors, one after the other."""
    half = (((y + b[0] * x[0]) + b[1] * x[1]) + b[2] * x[2]) + b[3] * x[3]
    return (((half + b[4] * x[4]) + b[5] * x[5]) + b[6] * x[6]) + b[7] * x[7]


@kernel
def _plus_eight(b, a, k, delta):
    """Add the product of the factors k to k + 8 to four rows of ``delta`` at once: each of ``a`` is loaded once for all four."""
    d0, d1, d2, d3 = delta[0], delta[1], delta[2], delta[3]
    b0, b1, b2, b3 = _eight(b[0], k), _eight(b[1], k), _eight(b[2], k), _eight(b[3], k)
    a0, a1, a2, a3, a4, a5, a6, a7 = a[k], a[k + 1], a[k + 2], a[k + 3], a[k + 4], a[k + 5], a[k + 6], a[k + 7]
    for j in range(a.shape[1]):
        x = a0[j], a1[j], a2[j], a3[j], a4[j], a5[j], a6[j], a7[j]
        d0[j] = _plus(d0[j], b0, x)
        d1[j] = _plus(d1[j], b1, x)
        d2[j] = _plus(d2[j], b2, x)
        d3[j] = _plus(d3[j], b3, x)


@kernel
def _plus_one(factor, row, out):
    for j in range(len(row)):
        out[j] += factor * row[j]


@kernel
def low_rank(b, a, delta):
    """delta = b @ a in f32: b (rows, r), a (r, cols), delta (rows, cols). The sum over r runs in one order for every
    element, whatever the chunk: BLAS does not promise that."""
    n_rows, rank = b.shape
    by_four, by_eight = n_rows // 4 * 4, rank // 8 * 8
    delta[:] = np.float32(0.0)
    for i in range(0, by_four, 4):
        for k in range(0, by_eight, 8):
            _plus_eight(b[i : i + 4], a, k, delta[i : i + 4])
    for i in range(n_rows):
        for k in range(by_eight if i < by_four else 0, rank):
            _plus_one(b[i, k], a[k], delta[i])


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


@report_kernel
def _tally_codes(delta, left, codes_moved, step, sums):
    """As ``_tally``, for a row whose grid has moved by delta - left and whose codes have by ``codes_moved``."""
    both = wanted = got = changed = np.float32(0.0)
    for j in range(len(delta)):
        moved = codes_moved[j] * step[j] + (delta[j] - left[j])
        both += delta[j] * moved
        wanted += delta[j] * delta[j]
        got += moved * moved
        changed += np.float32(0.0) if codes_moved[j] == 0 else np.float32(1.0)
    sums[0] += both
    sums[1] += wanted
    sums[2] += got
    sums[3] += changed


@kernel
def _expand_inverse(values, group, out):
    for g in range(len(values)):
        out[g * group : (g + 1) * group] = np.float32(0.0) if values[g] == 0 else np.float32(1.0) / values[g]


@kernel
def _in_steps(left, inverse, ratio):
    for j in range(len(ratio)):
        ratio[j] = left[j] * inverse[j]


@kernel
def _n_large(ratio):
    """How many of the ratios exceed half a step."""
    n = np.int32(0)
    for j in range(len(ratio)):
        n += np.int32(abs(ratio[j]) > np.float32(0.5))
    return n


@kernel
def _count_outside(codes, ratio, least, most, outside):
    """How many codes of each block leave the range when they move by ``ratio``, into ``outside`` f32 (blocks,)."""
    size = len(codes) // len(outside)
    for b in range(len(outside)):
        n = np.int32(0)
        for j in range(b * size, (b + 1) * size):
            wanted = np.float32(codes[j]) + ratio[j]
            n += np.int32((wanted < least) | (wanted > most))
        outside[b] = n


@kernel
def _move(codes, ratio, low, high, spread, row_key):
    """Round one row's ``ratio``, the update in steps, and apply it to ``codes``; ``ratio`` becomes what the codes moved by."""
    base, unit = np.float32(0.5) - np.float32(0.5) * spread, spread * _UNIT
    for j in range(len(ratio)):
        ratio[j] = np.floor(ratio[j] + (base + unit * _bits(row_key, j)))
    for j in range(len(codes)):
        old = np.float32(codes[j])
        new = min(max(old + ratio[j], low), high)
        ratio[j] = new - old
        codes[j] = np.int8(np.int32(new))


@kernel
def _count(codes, zero, unit):
    for j in range(len(codes)):
        unit[j] = np.float32(codes[j]) - zero


@kernel
def round_codes(codes, zero, steps, delta, low, high, spread, key, first_row, sums, grid, outside):
    """Move int8 ``codes`` (rows, cols), in place, by ``delta`` (rows, cols) on a grid of ``steps`` (rows, cols // group).

    ``low`` and ``high`` are the least and the largest code. ``spread`` is the width of the random offset: 1 dithers, 0 rounds
    to nearest. ``sums`` (4,) f64 gains Σ wanted·achieved, Σ wanted², Σ achieved², and the number of codes that changed.
    ``grid`` is what ``refit_row`` moves first, where it has blocks; then ``outside`` f32 (rows, blocks) gets the number of
    weights that leave the new range by more than half a step.
    """
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    refits, moments, work = len(grid[0]) > 0, np.zeros((6, grid[0].shape[1]), np.float32), np.empty((8, n_cols), np.float32)
    step, ratio, unit, rest = work[4], work[5], work[6], work[7]
    for i in range(n_rows):
        left = delta[i]
        if refits:
            _count(codes[i], zero, unit)
            refit_row(grid, i, unit, steps[i], delta[i], rest, work, moments)
            left = rest
        _expand_inverse(steps[i], group, step)
        _in_steps(left, step, ratio)
        if refits and _n_large(ratio):
            _count_outside(codes[i], ratio, low - np.float32(0.5), high + np.float32(0.5), outside[i])
        _move(codes[i], ratio, low, high, spread, _row_key(key, first_row + i))
        expand(steps[i], group, step)
        _tally_codes(delta[i], left, ratio, step, sums)


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
def _look_up(codes, levels, code_min, unit):
    for j in range(len(codes)):
        unit[j] = levels[codes[j] - code_min]


@kernel
def round_levels(codes, steps, delta, levels, code_min, spread, key, first_row, sums, grid):
    """As ``round_codes``, on a codebook: code c stands for ``levels[c - code_min] * step``, levels ascending, f32."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    refits, moments, work = len(grid[0]) > 0, np.zeros((6, grid[0].shape[1]), np.float32), np.empty((11, n_cols), np.float32)
    unit, step, rest, wanted, low, high, moved = work[4], work[5], work[6], work[7], work[8], work[9], work[10]
    below = np.empty(n_cols, np.int32)
    base = np.float32(0.5) - np.float32(0.5) * spread
    for i in range(n_rows):
        left, row_key = delta[i], _row_key(key, first_row + i)
        _look_up(codes[i], levels, code_min, unit)
        if refits:
            refit_row(grid, i, unit, steps[i], delta[i], rest, work, moments)
            left = rest
        _expand_inverse(steps[i], group, step)
        for j in range(n_cols):
            wanted[j] = unit[j] + left[j] * step[j]
        _bracket(wanted, levels, below, low, high)
        expand(steps[i], group, step)
        changed = 0
        for j in range(n_cols):
            fraction = min(max((wanted[j] - low[j]) / (high[j] - low[j]), np.float32(0.0)), np.float32(1.0))
            up = np.floor(fraction + (base + spread * _uniform(row_key, j)))
            old = np.int32(codes[i, j]) - code_min
            new = old if left[j] == 0 or step[j] == 0 else below[j] + np.int32(up)
            codes[i, j] = np.int8(new + code_min)
            moved[j] = delta[i, j] - left[j] + (levels[new] - unit[j]) * step[j]
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
