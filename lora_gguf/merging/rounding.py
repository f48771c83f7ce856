"""Which code a weight gets once its block's grid is known, and the update that moves it.

A weight lies on the grid; its update ``delta`` is a small part of the grid's step. The rules differ in the offset that
is added before the floor:

    nearest     0.5: moves only where the update exceeds half a step, and so erases most adapters
    dither      uniform in [0, 1): moves by one step with probability |delta| / step, unbiased (stochastic rounding)

``auto`` chooses by what a type has:

    codes, f16 scales      ``refit_row`` moves the grid so that the columns that matter most need no rounding, codes
                           are dithered, and ``refit_row`` moves the grid to where they fit best. Where the update of a
                           group is as large as its step, the offset narrows: chance would only add noise.
    a codebook, f16 scales the same, but the offset stays
    other scales           as dither: MXFP4, NVFP4
    halves                 nearest in rows whose update is larger than what the type can tell apart, else dither
    a new type             what its own quantizer finds, or the base's nearest codes moved by the update (``regrid``)

``fresh`` is what the type's own quantizer finds for the sum, as llama.cpp's tools do it.

The random numbers are a hash of (seed, what is merged into what, tensor, row, column), whatever the threads and chunks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from lora_gguf.kernels.chance import GOLDEN, SIXTEEN, UNIT, key_of_row, offsets
from lora_gguf.kernels.decorators import kernel, part
from lora_gguf.kernels.lanes import (
    ONE,
    STRIDE,
    N,
    copy,
    floor,
    fma,
    greatest,
    iota,
    is_less,
    is_other,
    least,
    load,
    load_i8,
    magnitude,
    most,
    nonzero,
    pick,
    splat,
    store,
    to_f32,
    to_i8,
    total,
    upper_half,
    where_less,
)  # fmt: skip
from lora_gguf.merging.refit import MovingGrid, refit_row

# the deviation of a group's moves, in steps, at which the offset begins to narrow, and at which it is none
_DOUBTFUL, _CERTAIN = 0.4, np.float32(0.55)
_PER_DOUBT = np.float32(1 / (0.55 - _DOUBTFUL))
_PER_SIZE = np.float32((np.pi / 2) ** 0.5)  # of a normal number: its deviation, per mean magnitude
# a block whose weights lie outside its codes' range by more than this mean square, in steps, gets a new grid
OUTSIDE = np.float32(1 / 12)
_CROWD = 3  # levels in a bucket of a codebook
_EASING = np.float32(0.1)  # mean move of a row in steps from which on its groups are looked at one by one


class Rule(NamedTuple):
    """How codes are rounded: ``spread`` is the width of the random offset, 1 dithers and 0 rounds to nearest; ``key``
    is the tensor's, ``first_row`` the number of the first row in it. A code stands for its distance from ``zero``;
    ``least`` and ``most`` are the codes that there are.
    """

    spread: np.float32
    key: np.uint64
    first_row: int
    least: np.float32
    most: np.float32
    zero: np.float32 = np.float32(0)


class Watched(NamedTuple):
    """What else there is while codes are rounded: the grid that moves; ``outside`` f32 (rows, blocks), zeros, which
    gets what ``_measure_outside`` finds; ``room`` f32 (2, cols) to work in; ``sums`` (4,) f64 of the rows, added to:
    Σ wanted·achieved, Σ wanted², Σ achieved², the number of codes that changed.
    """

    moving: MovingGrid
    outside: np.ndarray
    room: np.ndarray
    sums: np.ndarray


@part
def _count(delta: np.ndarray, left: np.ndarray, outside: np.ndarray, sums: np.ndarray) -> None:
    """Add a row's Σ delta·moved, Σ delta² and Σ moved² to ``sums``, moved being what ``left`` has not; but not
    of blocks that get a new grid.
    """
    both = wanted = got = splat(np.float32(0.0))
    size = len(delta) // len(outside)
    for b in range(len(outside)):
        if outside[b] > OUTSIDE:
            continue
        for j in range(b * size, (b + 1) * size, N):
            whole = load(delta, j)
            moved = whole - load(left, j)
            both, wanted, got = fma(whole, moved, both), fma(whole, whole, wanted), fma(moved, moved, got)
    sums[0] += total(both)
    sums[1] += total(wanted)
    sums[2] += total(got)


@part
def _sizes(delta: np.ndarray, first: Any, end: Any) -> Any:
    """Lanes of sums of the magnitudes of ``delta`` from ``first`` to ``end``."""
    sizes = splat(np.float32(0.0))
    for j in range(first, end, STRIDE):
        sizes = sizes + magnitude(load(delta, j))
    return sizes


@part
def _mean_step(steps: np.ndarray) -> Any:
    total_step = np.float32(0.0)
    for step in steps:
        total_step += abs(step)
    return total_step / np.float32(len(steps))


@part
def _inverse(step: Any) -> Any:
    return np.float32(0.0) if step == 0 else np.float32(1.0) / step


@part
def _width(size: Any, step: Any) -> Any:
    """The width of the random offset that a group of weights needs to move by the mean magnitude ``size`` without bias.

    Were its moves normal, of deviation s in steps, nearest rounding would lose 2 exp(-2 π² s²) of them: 8% at 0.4.
    """
    deviation = magnitude(size * _inverse(step)) * _PER_SIZE
    return most(least((_CERTAIN - deviation) * _PER_DOUBT, np.float32(1.0)), np.float32(0.0))


@part
def _ease(delta: np.ndarray, steps: np.ndarray, widths: np.ndarray) -> None:
    """``_width`` of each group of a row's update, into ``widths`` f32. What the grid took is not counted: a shift of m
    is the same for all weights of a group, and rounding to nearest would lose all of it.
    """
    group = np.uint64(len(delta) // len(steps))
    per_weight = np.float32(1.0) / np.float32(group)  # exact: groups are powers of two
    for g in range(np.uint64(len(steps))):
        widths[g] = total(_sizes(delta, g * group, (g + ONE) * group))
    for g in range(np.uint64(len(steps))):
        widths[g] = _width(widths[g] * per_weight, steps[g])


@part
def _move(codes: np.ndarray, steps: np.ndarray, left: np.ndarray, rule: Rule, widths: np.ndarray, row_key: Any) -> Any:
    """Move a row's int8 ``codes`` by ``left`` f32 (cols,), rounded; ``left`` becomes what they have still to move by.
    ``widths`` are those of the groups' random offsets, in those of the rule, or none.
    Returns the most that one of them has, in steps, and the number of codes that changed.
    """
    group, lowest, highest = np.uint64(len(codes) // len(steps)), splat(rule.least), splat(rule.most)
    spread, eases = rule.spread, len(widths) > 0
    base, unit = splat(np.float32(0.5) - np.float32(0.5) * spread), splat(spread * UNIT)
    column, sixteen = splat(row_key) + iota() * splat(GOLDEN), splat(SIXTEEN)
    changed = farthest = splat(np.float32(0.0))
    for g in range(np.uint64(len(steps))):
        step, inverse = splat(steps[g]), splat(_inverse(steps[g]))
        if eases:
            width = spread * widths[g]
            base, unit = splat(np.float32(0.5) - np.float32(0.5) * width), splat(width * UNIT)
        for j in range(g * group, (g + ONE) * group, STRIDE):
            rest, old = load(left, j), load(codes, j)
            steps_moved = rest * inverse
            new = least(most(old + floor(steps_moved + offsets(column, base, unit)), lowest), highest)
            back = old - new
            store(new, codes, j)
            store(fma(back, step, rest), left, j)
            changed, farthest = changed + nonzero(back), most(magnitude(steps_moved + back), farthest)
            column = column + sixteen
    return greatest(farthest), total(changed)


@kernel
def _measure_outside(left: np.ndarray, steps: np.ndarray, outside: np.ndarray) -> None:
    """How far each block's weights lie beyond the range of their codes: the mean distance², in steps, into ``outside``
    f32 (blocks,). Within the range rounding leaves less than a step.
    """
    group, per_block = np.uint64(len(left) // len(steps)), np.uint64(len(steps) // len(outside))
    one, zero, size = splat(np.float32(1.0)), splat(np.float32(0.0)), np.float32(per_block * group)
    for b in range(np.uint64(len(outside))):
        squares = zero
        for g in range(b * per_block, (b + ONE) * per_block):
            inverse = splat(_inverse(steps[g]))
            for j in range(g * group, (g + ONE) * group, STRIDE):
                beyond = most(magnitude(load(left, j) * inverse) - one, zero)
                squares = fma(beyond, beyond, squares)
        outside[b] = total(squares) * (np.float32(1.0) / size)


@kernel
def round_codes(codes: np.ndarray, steps: np.ndarray, delta: np.ndarray, rule: Rule, watched: Watched) -> None:
    """Move int8 ``codes`` (rows, cols), in place, by ``delta`` (rows, cols) on a grid of ``steps`` (rows, cols //
    group), as ``rule`` says.

    The grid of ``watched`` is what ``refit_row`` moves first and last, where it has blocks; then the offset narrows
    where it may, and it is measured what lies outside.
    """
    movable, outside, room, sums = watched
    refits, left = len(movable.blocks) > 0, room[0]
    n_cols = np.uint64(len(left))
    for i in range(len(codes)):
        copy(delta[i], left)
        widths = room[1][:0]
        if refits:
            refit_row(movable, movable.before, i, codes[i], rule.zero, steps[i], left)
            if total(_sizes(delta[i], np.uint64(0), n_cols)) / np.float32(n_cols) > _EASING * _mean_step(steps[i]):
                widths = room[1]
                _ease(delta[i], steps[i], widths)
        farthest, changed = _move(codes[i], steps[i], left, rule, widths, key_of_row(rule.key, rule.first_row + i))
        sums[3] += changed
        if refits:
            if farthest > np.float32(1.0):
                _measure_outside(left, steps[i], outside[i])
            refit_row(movable, movable.after, i, codes[i], rule.zero, steps[i], left)
        _count(delta[i], left, outside[i], sums)


class Codebook(NamedTuple):
    """At most sixteen whole levels from -128 to 127, ascending, and what tells between which two a number lies.

    ``levels`` int8 (16,) repeat the last one where there are fewer. Numbers times ``zoom``, a power of two, as int8 lie
    in sixteen buckets, by their upper four bits. ``below`` (16,) are the numbers of the last levels before them, the
    first level being before all; in them lie the levels after ``limits`` int8 (3, 16), which are 127 for none, but for
    the last level.
    """

    levels: np.ndarray
    zoom: np.float32
    below: np.ndarray
    limits: np.ndarray


@functools.cache
def codebook(*levels: float) -> Codebook:
    """Return the ``Codebook`` of ``levels``."""
    found, below, limits = np.full(N, levels[-1], np.int8), np.zeros(N, np.int8), np.full((_CROWD, N), 127, np.int8)
    found[: len(levels)] = levels
    zoom = 1 << max(0, int(np.log2(127 / max(map(abs, levels)))))
    inner = zoom * found[1 : len(levels) - 1].astype(int)
    for bucket in range(N):
        start = bucket * 16 if bucket < 8 else bucket * 16 - 256
        within = inner[(inner >= start) & (inner < start + 16)]
        below[bucket], limits[: len(within), bucket] = (inner < start).sum(), within - 1
    return Codebook(found, np.float32(zoom), below, limits)


@part
def _units(codes: np.ndarray, book: Codebook, code_min: Any, unit: np.ndarray) -> None:
    """What a row's int8 ``codes`` stand for, into ``unit`` f32 (cols,)."""
    levels, least_code = load_i8(book.levels, 0), splat(np.int8(code_min))
    for j in range(0, len(codes), N):
        store(to_f32(pick(levels, load_i8(codes, j) - least_code)), unit, j)


@part
def _bracket(wanted: Any, book: Codebook) -> Any:
    """The number of the last level that is not above ``wanted``, int8, that level and the next; the first two or the
    last two levels beyond them.
    """
    whole = floor(wanted * splat(book.zoom))
    whole = to_i8(least(most(whole, splat(np.float32(-128.0))), splat(np.float32(127.0))))
    bucket, levels = upper_half(whole), load_i8(book.levels, 0)
    number = pick(load_i8(book.below, 0), bucket)
    for k in range(_CROWD):
        number = number - is_less(pick(load_i8(book.limits, (k, 0)), bucket), whole)
    return number, to_f32(pick(levels, number)), to_f32(pick(levels, number + splat(np.int8(1))))


@part
def _move_levels(
    codes: np.ndarray,
    unit: np.ndarray,
    book: Codebook,
    steps: np.ndarray,
    left: np.ndarray,
    rule: Rule,
    row_key: Any,
) -> Any:
    """Move as ``_move`` does, on a codebook; ``unit`` (cols,) is what the codes stand for, before and after. Returns
    the number of codes that changed.
    """
    group, zero, one, least_code = (
        len(codes) // len(steps),
        splat(np.float32(0.0)),
        splat(np.float32(1.0)),
        splat(np.int8(rule.least)),
    )
    base, width = splat(np.float32(0.5) - np.float32(0.5) * rule.spread), splat(rule.spread * UNIT)
    column, sixteen = splat(row_key) + iota() * splat(GOLDEN), splat(SIXTEEN)
    changed = zero
    for g in range(len(steps)):
        step, inverse = splat(steps[g]), splat(_inverse(steps[g]))
        others = splat(np.int8(0))
        for j in range(g * group, (g + 1) * group, N):
            rest, old, value = load(left, j), load_i8(codes, j), load(unit, j)
            wanted = rest * inverse
            goal, size = value + wanted, magnitude(wanted)
            number, low, high = _bracket(goal, book)
            up = floor(most(least((goal - low) / (high - low), one), zero) + offsets(column, base, width))
            new = number - is_less(zero, up) + least_code
            new = old ^ ((new ^ old) & is_less(zero, size))
            new_value = where_less(zero, up, high, low)
            store(new, codes, j)
            store(new_value, unit, j)
            store(fma(value - new_value, step, rest), left, j)
            others, column = others - is_other(new, old), column + sixteen
        changed = changed + to_f32(others)
    return total(changed)


@kernel
def round_levels(
    codes: np.ndarray, steps: np.ndarray, delta: np.ndarray, book: Codebook, rule: Rule, watched: Watched
) -> None:
    """Round as ``round_codes`` does, on a codebook: code c stands for ``levels[c - least] * step``."""
    movable, outside, room, sums = watched
    refits, left, unit = len(movable.blocks) > 0, room[0], room[1]
    for i in range(len(codes)):
        copy(delta[i], left)
        _units(codes[i], book, rule.least, unit)
        if refits:
            refit_row(movable, movable.before, i, unit, np.float32(0.0), steps[i], left)
        row_key = key_of_row(rule.key, rule.first_row + i)
        sums[3] += _move_levels(codes[i], unit, book, steps[i], left, rule, row_key)
        if refits:
            refit_row(movable, movable.after, i, unit, np.float32(0.0), steps[i], left)
        _count(delta[i], left, outside[i], sums)
