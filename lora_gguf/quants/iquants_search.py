"""The search of ggml's IQ2 and IQ3 quantizers, bit-identical: a scale for each group, each vector put on the grid.

The weights of a group become magnitudes. For each of some scales they are rounded to levels, vectors off the grid move
to the neighbour of least weighted error, and the scale is refined; the best of these is kept, its vectors are put on
the grid once more, and the scales of a block are at last rounded to four bits. All sums are added in ggml's order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.half import f16_from_f32
from lora_gguf.kernels.nearest import nearest_int, nearest_vector
from lora_gguf.quants.iquant_grids import Lattice

OFF_GRID, UNLESS_ON_GRID, ALWAYS = range(3)
M, W, ROOT, Q = range(4)  # rows of ``work``: magnitudes, importances, their roots, values of two sets of vectors
OFF_GRID_BIT = 0x8000


class Rules(NamedTuple):
    """What differs between the types' searches."""

    group: int  # weights that share a scale
    n_tries: int  # the scales tried map the largest magnitude to the top level ± n_tries * try_step
    try_step: np.float32
    negligible: np.float32  # a group whose magnitudes are all below this is skipped
    variance: np.float32 = np.float32(2)  # times the block's mean square, in a weight's importance
    floor: np.float32 = np.float32(0)  # the same where there is no importance
    fudge: np.float32 = np.float32(1)  # times the block's scale
    even_signs: bool = False  # the minuses of eight weights are even in number
    from_fit: bool = False  # the tries start at the best scale without a grid
    polish: int = OFF_GRID  # which vectors are put on the grid again with the refined scale
    shifts: bool = False  # the signs and low bytes that follow a skipped group move up


Scratch = tuple[np.ndarray, np.ndarray]  # levels, and room for errors
_f32 = np.float32
RULES = {
    "IQ2_XXS": Rules(32, 6, _f32(0.1), _f32(1e-15), variance=_f32(1), even_signs=True, from_fit=True, polish=ALWAYS),
    "IQ2_XS": Rules(16, 9, _f32(0.1), _f32(1e-15), variance=_f32(1), even_signs=True),
    "IQ2_S": Rules(16, 9, _f32(0.1), _f32(1e-8), floor=_f32(0.5), fudge=_f32(0.9875)),
    "IQ3_XXS": Rules(32, 15, _f32(0.2), _f32(1e-8), fudge=_f32(1.0125), even_signs=True),
    "IQ3_S": Rules(32, 9, _f32(0.2), _f32(2.0**-149), fudge=_f32(1.033), polish=UNLESS_ON_GRID, shifts=True),
}


@kernel
def _mean_square(x: np.ndarray) -> float:
    total = np.float32(0)
    for v in x:
        total += v * v
    return total / np.float32(len(x))


@kernel
def _weigh(x: np.ndarray, importance: np.ndarray, mean_square: float, rules: Rules, work: np.ndarray) -> None:
    """Each weight's importance in the error, and its root."""
    variance, floor = rules.variance * mean_square, rules.floor * mean_square
    for j in range(len(x)):
        square = x[j] * x[j]
        if len(importance):
            work[W, j] = importance[j] * np.sqrt(variance + square)
        else:
            work[W, j] = floor + square if rules.floor > 0 else square
        work[ROOT, j] = np.sqrt(work[W, j])


@kernel
def _split_signs(x: np.ndarray, even: bool, work: np.ndarray, signs: np.ndarray) -> float:
    """Magnitudes and sign bits of ``x``; to make the minuses even, the least important of eight changes its sign.

    Returns the largest magnitude.
    """
    for k in range(len(x) // 8):
        bits, least, odd = 0, 8 * k, 0
        for j in range(8 * k, 8 * k + 8):
            minus = 0 if x[j] >= 0 else 1
            work[M, j] = -x[j] if minus else x[j]
            bits |= minus << (j - 8 * k)
            odd ^= minus
            least = j if work[W, j] * x[j] * x[j] < work[W, least] * x[least] * x[least] else least
        if even and odd:
            work[M, least] = -work[M, least]
            bits ^= 1 << (least - 8 * k)
        signs[k] = bits
    largest = work[M, 0]
    for j in range(len(x)):
        largest = max(largest, work[M, j])
    return largest


@kernel
def _fit_error(m: np.ndarray, w: np.ndarray, scale: float, inverse: float, top: int) -> float:
    """The weighted square error of ``m`` at levels up to ``top``; without ``top`` a level is a byte, which wraps."""
    error = np.float32(0)
    for j in range(len(m)):
        level = nearest_int(inverse * m[j])
        level = min(level, top) if top else level & 0xFF
        difference = m[j] - scale * np.float32(level)
        error += w[j] * difference * difference
    return error


@kernel
def _fit(m: np.ndarray, w: np.ndarray, top: int) -> float:
    """The scale of levels 0 to ``top`` that fits ``m``: make_qp_quants of ggml, which tries nine scales, then moves
    single levels as long as that helps. Levels are kept in bytes, where -1 is 255."""
    largest = np.float32(0)
    for v in m:
        largest = max(largest, v)
    inverse = np.float32(top) / largest
    error = _fit_error(m, w, np.float32(1) / inverse, inverse, 0)
    for t in (-4, -3, -2, -1, 1, 2, 3, 4):
        guess = (np.float32(0.1) * np.float32(t) + np.float32(top)) / largest
        guess_error = _fit_error(m, w, np.float32(1) / guess, guess, top)
        if guess_error < error:
            error, inverse = guess_error, guess
    lx, ll, levels = np.float32(0), np.float32(0), np.empty(len(m), np.uint8)
    for j in range(len(m)):
        level = min(nearest_int(inverse * m[j]), top)
        levels[j] = level
        lx += w[j] * m[j] * np.float32(level)
        ll += w[j] * np.float32(level) * np.float32(level)
    for sweep in range(5):
        lx, ll, changed = _move_levels(m, w, top, lx, ll, levels)
        if not changed:
            break
    return lx / ll if ll > 0 else np.float32(0)


@kernel
def _move_levels(
    m: np.ndarray, w: np.ndarray, top: int, lx: float, ll: float, levels: np.ndarray
) -> tuple[float, float, bool]:
    """Give each weight in turn the level that suits the others' scale, where the error shrinks."""
    changed = False
    for j in range(len(m)):
        old = np.float32(levels[j])
        new_lx, new_ll = lx - w[j] * m[j] * old, ll - w[j] * old * old
        if not (new_lx > 0 and new_ll > 0):
            continue
        level = min(nearest_int(m[j] * new_ll / new_lx), top)
        if level == levels[j]:
            continue
        new_lx += w[j] * m[j] * np.float32(level)
        new_ll += w[j] * np.float32(level) * np.float32(level)
        if new_lx * new_lx * ll > lx * lx * new_ll:
            levels[j], lx, ll, changed = level, new_lx, new_ll, True
    return lx, ll, changed


@kernel
def _four(work: np.ndarray, row: int, at: int) -> tuple[float, ...]:
    return work[row, at], work[row, at + 1], work[row, at + 2], work[row, at + 3]


@kernel
def _eight(work: np.ndarray, row: int, at: int) -> tuple[float, ...]:
    return _four(work, row, at) + _four(work, row, at + 4)


@kernel
def _sums(work: np.ndarray, row: int) -> tuple[float, float]:
    """The sums of w m q and of w q q."""
    qx, qq = np.float32(0), np.float32(0)
    for j in range(work.shape[1]):
        w, q = work[W, j], work[Q + row, j]
        qx += w * work[M, j] * q
        qq += w * q * q
    return qx, qq


@kernel
def _search(
    lattice: Lattice, rules: Rules, scale: float, start: float, work: np.ndarray, scratch: Scratch, vectors: np.ndarray
) -> tuple[float, int]:
    """A group's scale; its vectors come to lie in the row of ``vectors`` that is also returned.

    Row 0 or 1 of ``vectors``, and of the values 1, 3, 5 … from the row Q of ``work`` on, is the best so far, the other
    is the trial. A vector off the grid moves to a neighbour and gets the bit OFF_GRID_BIT. The last round puts the best
    on the grid again with the refined scale.
    """
    (n_levels, dims, _, points, neighbours), (rounded, errors) = lattice, scratch
    best, kept, top, width = np.float32(0), 0, np.float32(2 * n_levels - 1), 16 // dims
    kept_moved = rules.polish == UNLESS_ON_GRID
    for k in range(vectors.shape[1]):
        vectors[0, k] = 0
    for t in range(-rules.n_tries, rules.n_tries + 2):
        last = t > rules.n_tries
        if last and not (scale > 0 and (kept_moved or rules.polish == ALWAYS)):
            break
        only, row, moved = last and rules.polish == OFF_GRID, kept if last else 1 - kept, False
        inverse = np.float32(1) / scale if last else (top + np.float32(t) * rules.try_step) / start
        trial = scale if last else np.float32(1) / inverse
        for j in range(work.shape[1]):
            level = nearest_int(np.float32(0.5) * (inverse * work[M, j] - np.float32(1)))
            rounded[j] = max(np.int32(0), min(np.int32(n_levels - 1), level))
        for k in range(vectors.shape[1]):
            if only and vectors[row, k] < OFF_GRID_BIT:
                continue
            at, point = dims * k, 0
            for i in range(dims - 1, -1, -1):
                point = point * n_levels + rounded[at + i]
            first, count = np.uint64(points[point, 0]), np.uint64(points[point, 1])
            vectors[row, k] = first
            if count > 0:
                if dims == 8:
                    m, root = _eight(work, M, 8 * k), _eight(work, ROOT, 8 * k)
                    code = nearest_vector(neighbours, (first, count), m, root, trial, None, errors)
                else:
                    m, root = _four(work, M, 4 * k), _four(work, ROOT, 4 * k)
                    code = nearest_vector(neighbours, (first, count), m, root, trial, None, errors)
                vectors[row, k] = code >> 16 | OFF_GRID_BIT
                moved = True
                for i in range(dims):
                    rounded[at + i] = code >> (width * i) & ((1 << width) - 1)
            for i in range(dims):
                work[Q + row, at + i] = np.float32(np.int32(2 * rounded[at + i] + 1))
        qx, qq = _sums(work, row)
        if last:
            scale = qx / qq if qq > 0 else scale
        elif qq > 0 and qx * qx > best * qq:
            scale, kept, kept_moved = qx / qq, row, moved
            best = scale * qx
    return scale, kept


@kernel
def _quantize_scales(scales: np.ndarray, fudge: float, nibbles: np.ndarray) -> int:
    """Round the scales of a block to the nearest of 1, 3, 5 … 31 steps; returns the step as f16."""
    largest = np.float32(0)
    for scale in scales:
        largest = max(largest, scale)
    d = largest / np.float32(31)
    inverse = np.float32(1) / d if d > 0 else np.float32(0)
    for g in range(len(scales)):
        nibble = nearest_int(np.float32(0.5) * (inverse * scales[g] - np.float32(1)))
        nibbles[g] = max(0, min(15, nibble)) if largest > 0 else 0
    return f16_from_f32(d * fudge)


@kernel
def search_iq2_iq3(
    weights: np.ndarray,
    importance: np.ndarray,
    lattice: Lattice,
    rules: Rules,
    fields: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Find the fields of all blocks: d (f16), nibbles (blocks, groups), signs (blocks, 32), vectors (blocks, 256 /
    dims).

    ``signs`` and ``vectors`` are zero on entry. In IQ3_S ggml does not leave room for a group of zeros: the signs and
    the low bytes of the vectors that follow take its place, and the block decodes to something else. So here.
    """
    d, nibbles, signs, vectors = fields
    n_levels, dims, longest = lattice.n_levels, lattice.dims, lattice.longest
    n_cols, group, per_group = weights.shape[1], rules.group, rules.group // dims
    work, rounded, errors = np.empty((5, group), np.float32), np.empty(group, np.int32), np.empty(longest, np.int32)
    trial, group_signs = np.empty((2, per_group), np.uint16), np.empty(group // 8, np.uint8)
    scales = np.empty(256 // group, np.float32)
    for i in range(len(d)):
        x = weights.reshape(-1, 256)[i]
        mean_square, slot = _mean_square(x), 0
        for g in range(256 // group):
            column = (256 * i + group * g) % n_cols
            part = x[group * g : group * (g + 1)]
            _weigh(part, importance[column : column + group], mean_square, rules, work)
            start = _split_signs(part, rules.even_signs, work, group_signs)
            scales[g], is_skipped = 0, start < rules.negligible
            scale = start / np.float32(2 * n_levels - 1)
            if rules.from_fit and not is_skipped:
                scale = _fit(work[M], work[W], n_levels + 1)
                start, is_skipped = scale * np.float32(n_levels), scale <= 0
            if is_skipped:
                slot += not rules.shifts
                continue
            scale, kept = _search(lattice, rules, scale, start, work, (rounded, errors), trial)
            scales[g] = abs(scale)
            for k in range(group // 8):
                signs[i, slot * group // 8 + k] = ~group_signs[k] if scale < 0 else group_signs[k]
            for k in range(per_group):
                vectors[i, slot * per_group + k] |= trial[kept, k] & 0xFF
                vectors[i, g * per_group + k] |= trial[kept, k] & (OFF_GRID_BIT - 0x100)
            slot += 1
        d[i] = _quantize_scales(scales, rules.fudge, nibbles[i])
