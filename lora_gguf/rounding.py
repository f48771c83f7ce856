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

from lora_gguf.kernel import kernel
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
    n_cols = a.shape[1]
    quads = rank // 4 * 4
    for i in range(n_rows):
        row = delta[i]
        for j in range(n_cols):
            row[j] = np.float32(0.0)
        for k in range(0, quads, 4):
            b0, b1, b2, b3 = b[i, k], b[i, k + 1], b[i, k + 2], b[i, k + 3]
            a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
            for j in range(n_cols):
                row[j] = (((row[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]
        for k in range(quads, rank):
            b0, a0 = b[i, k], a[k]
            for j in range(n_cols):
                row[j] += b0 * a0[j]


@kernel
def _tally(delta, moved, changed, sums):
    """Add a row's Σ delta·moved, Σ delta², Σ moved² and its number of changed codes to ``sums`` (4,), by 16 lanes."""
    n_cols = len(delta)
    lanes = np.zeros((3, 16), np.float32)
    whole = n_cols // 16 * 16
    for start in range(0, whole, 16):
        for lane in range(16):
            wanted, got = delta[start + lane], moved[start + lane]
            lanes[0, lane] += wanted * got
            lanes[1, lane] += wanted * wanted
            lanes[2, lane] += got * got
    for j in range(whole, n_cols):
        lanes[0, 0] += delta[j] * moved[j]
        lanes[1, 0] += delta[j] * delta[j]
        lanes[2, 0] += moved[j] * moved[j]
    for s in range(3):
        for lane in range(16):
            sums[s] += lanes[s, lane]
    sums[3] += changed


@kernel
def _move(codes, step, delta, moved, low, high, spread, row_key):
    """Round one row; ``step`` and ``moved`` are (cols,). Returns how many codes changed."""
    base = np.float32(0.5) - np.float32(0.5) * spread
    changed = 0
    for j in range(len(codes)):
        offset = base + spread * _uniform(row_key, j)
        old = np.float32(codes[j])
        ratio = np.float32(0.0) if step[j] == 0 else delta[j] / step[j]
        new = min(max(old + np.floor(ratio + offset), low), high)
        codes[j] = np.int8(new)
        moved[j] = (new - old) * step[j]
        changed += new != old
    return changed


@kernel
def _tally_with(delta, shift, moved, changed, sums):
    """``_tally`` of a row whose grid moved by ``shift`` (cols,) before its codes did."""
    for j in range(len(moved)):
        moved[j] += shift[j]
        shift[j] += delta[j]
    _tally(shift, moved, changed, sums)


@kernel
def round_codes(codes, steps, delta, shift, code_min, code_max, spread, key, first_row, sums):
    """Move int8 ``codes`` (rows, cols), in place, by ``delta`` (rows, cols) on a grid of ``steps`` (rows, cols // group).

    ``shift`` is what the grid has moved already (rows, cols), or (0, cols); it is overwritten. ``spread`` is the width of
    the random offset: 1 dithers, 0 rounds to nearest. ``sums`` (4,) f64 gains Σ wanted·achieved, Σ wanted², Σ achieved², and
    the number of codes that changed; wanted is delta + shift.
    """
    n_rows, n_cols = codes.shape
    n_groups = steps.shape[1]
    step = np.empty((n_groups, n_cols // n_groups), np.float32)
    moved = np.empty(n_cols, np.float32)
    for i in range(n_rows):
        for g in range(n_groups):
            step[g, :] = steps[i, g]
        changed = _move(
            codes[i], step.ravel(), delta[i], moved, np.float32(code_min), np.float32(code_max), np.float32(spread),
            _row_key(key, first_row + i),
        )  # fmt: skip
        if len(shift):
            _tally_with(delta[i], shift[i], moved, changed, sums)
        else:
            _tally(delta[i], moved, changed, sums)


@kernel
def beyond(codes, steps, delta, code_min, code_max):
    """How many weights of each group the update takes out of the grid's range by more than half a step: uint8 (rows, groups).

    Arguments as for ``round_codes``.
    """
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    low, high = np.float32(code_min) - np.float32(0.5), np.float32(code_max) + np.float32(0.5)
    counts = np.empty(steps.shape, np.uint8)
    for i in range(n_rows):
        for g in range(steps.shape[1]):
            step = steps[i, g]
            inverse = np.float32(0.0) if step == 0 else np.float32(1.0) / step
            counts[i, g] = _beyond(codes[i, g * group : (g + 1) * group], delta[i, g * group : (g + 1) * group], inverse, low, high)
    return counts


@kernel
def _beyond(codes, delta, inverse, low, high):
    n = np.int32(0)
    for j in range(len(codes)):
        wanted = np.float32(codes[j]) + delta[j] * inverse
        n = np.int32(n + np.int32(wanted < low) + np.int32(wanted > high))
    return min(n, 255)


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
def round_levels(codes, steps, delta, shift, levels, code_min, spread, key, first_row, sums):
    """As ``round_codes``, on a codebook: code c stands for ``levels[c - code_min] * step``, levels ascending, f32."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    wanted, low = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    high, moved = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    below = np.empty(n_cols, np.int32)
    spread = np.float32(spread)
    base = np.float32(0.5) - np.float32(0.5) * spread
    for i in range(n_rows):
        row_key = _row_key(key, first_row + i)
        for g in range(steps.shape[1]):
            inverse = np.float32(0.0) if steps[i, g] == 0 else np.float32(1.0) / steps[i, g]
            for j in range(g * group, (g + 1) * group):
                wanted[j] = levels[codes[i, j] - code_min] + delta[i, j] * inverse
        _bracket(wanted, levels, below, low, high)
        changed = 0
        for j in range(n_cols):
            fraction = min(max((wanted[j] - low[j]) / (high[j] - low[j]), np.float32(0.0)), np.float32(1.0))
            up = np.floor(fraction + (base + spread * _uniform(row_key, j)))
            old = np.int32(codes[i, j]) - code_min
            new = old if delta[i, j] == 0 or steps[i, j // group] == 0 else below[j] + np.int32(up)
            codes[i, j] = np.int8(new + code_min)
            moved[j] = (levels[new] - levels[old]) * steps[i, j // group]
            changed += new != old
        if len(shift):
            _tally_with(delta[i], shift[i], moved, changed, sums)
        else:
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
