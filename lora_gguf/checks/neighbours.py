"""The two values of a type's grid between which a weight lies."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.merging.refit import reach
from lora_gguf.merging.scratch import scratch
from lora_gguf.quants.codec import Codec

MOST_MOVED = 1.5  # of ``reach``: it goes by a block's mean step
MOST_CUT = 64  # codes of a type whose quantizer cuts weights off
ALIKE = 1e-6  # share of the product of two squares below which what is left of it is rounding


@kernel
def bracket_codes(
    codes: np.ndarray,
    steps: np.ndarray,
    after: np.ndarray,
    wanted: np.ndarray,
    limits: Any,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """Find the grid's two values around ``wanted``, all f32 (rows, cols); ``steps`` is (rows, cols // group)."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    first, last, one = limits[0], limits[1] - np.float32(1), np.float32(1)
    for i in range(n_rows):
        for g in range(steps.shape[1]):
            step = steps[i, g]
            inverse = np.float32(0) if step == 0 else one / step
            for j in range(g * group, (g + 1) * group):
                code = np.float32(codes[i, j])
                place = np.floor(code + (wanted[i, j] - after[i, j]) * inverse)
                place = min(max(place, first), last) - code
                below, above = after[i, j] + place * step, after[i, j] + (place + one) * step
                low[i, j], high[i, j] = min(below, above), max(below, above)


@kernel
def _place(target: np.ndarray, levels: np.ndarray, below: np.ndarray, above: np.ndarray) -> None:
    """For each of ``target`` (n,): the last level that is not above it, but for the highest, and the next level."""
    below[:], above[:] = levels[0], levels[1]
    for c in range(1, len(levels) - 1):
        for j in range(len(target)):
            reached = target[j] >= levels[c]
            below[j] = levels[c] if reached else below[j]
            above[j] = levels[c + 1] if reached else above[j]


@kernel
def bracket_levels(
    codes: np.ndarray,
    steps: np.ndarray,
    after: np.ndarray,
    wanted: np.ndarray,
    book: Any,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """Find as ``bracket_codes`` does on a codebook, ``book`` (levels, code_min): c is ``levels[c - code_min]``."""
    levels, code_min = book
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    target, level = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    below, above = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    for i in range(n_rows):
        for j in range(n_cols):
            step = steps[i, j // group]
            level[j] = levels[codes[i, j] - code_min]
            target[j] = level[j] if step == 0 else level[j] + (wanted[i, j] - after[i, j]) / step
        _place(target, levels, below, above)
        for j in range(n_cols):
            step = steps[i, j // group]
            one, other = after[i, j] + (below[j] - level[j]) * step, after[i, j] + (above[j] - level[j]) * step
            low[i, j], high[i, j] = min(one, other), max(one, other)


def bracket_floats(
    type_name: str, before: np.ndarray, delta: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the two values of a float type around ``wanted``, wider by what a product of half-precision factors may be
    off.

    For F32 two that are a unit of bf16 apart, through which a merge may have gone.
    """
    if type_name == "F32":
        half = np.maximum(np.abs(before), np.abs(wanted)) * np.float32(2.0**-8)
        inner, outer = wanted - half, wanted + half
    else:
        unit = np.uint32(1 << {"F16": 13, "BF16": 16}[type_name])
        bits = np.ascontiguousarray(wanted).view(np.uint32) & ~(unit - np.uint32(1))
        inner, outer = bits.view(np.float32), (bits + unit).view(np.float32)
    if type_name == "F16":
        fine = np.abs(wanted) < 2.0**-14  # denormal in f16, whose unit is 2**-24
        truncated = np.trunc(wanted * np.float32(2.0**24)) * np.float32(2.0**-24)
        inner = np.where(fine, truncated, inner)
        outer = np.where(fine, truncated + np.copysign(np.float32(2.0**-24), wanted), outer)
    margin = np.abs(delta) * np.float32(2.0**-8)
    return np.minimum(inner, outer) - margin, np.maximum(inner, outer) + margin


def brackets(
    codec: Codec, blocks: np.ndarray, weights: tuple[np.ndarray, np.ndarray, np.ndarray], widest: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return ``low`` and ``high`` around base + update on the grid of ``blocks``, all f32 (rows, cols); ``weights`` are
    those before and after, and the update.

    Where they are more than ``widest`` (rows, cols) apart, it is that far around what was wanted. None where the type's
    weights are not coded one by one.
    """
    before, after, delta = weights
    wanted = np.add(before, delta, out=scratch("wanted", delta.shape))
    if codec.type.name in ("F32", "F16", "BF16"):
        return bracket_floats(codec.type.name, before, delta, wanted)
    if codec.grid is None or widest is None:
        return None
    codes, steps = unpacked(codec, blocks, wanted.shape)
    low, high = scratch("low", wanted.shape), scratch("high", wanted.shape)
    if codec.grid.levels is None:
        limits = np.float32(codec.grid.code_min), np.float32(codec.grid.code_max)
        bracket_codes(codes, steps, after, wanted, limits, low, high)
    else:
        book = codec.grid.levels, codec.grid.code_min
        bracket_levels(codes, steps, after, wanted, book, low, high)
    too_wide = high - low > widest
    if too_wide.any():
        low[too_wide] = (wanted - widest / 2)[too_wide]
        high[too_wide] = (wanted + widest / 2)[too_wide]
    return low, high


def unpacked(codec: Codec, blocks: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes int8 (rows, cols) and steps f32 (rows, groups) of ``blocks``."""
    codes, steps = (
        scratch("codes", shape, np.int8),
        np.empty((shape[0], shape[1] // codec.known_grid.group), np.float32),
    )
    codec.known_grid.unpack(blocks, codes, steps)
    return codes, steps


def own_steps(
    quants: tuple[Codec, Codec], stored: np.ndarray, fresh: np.ndarray, before: np.ndarray, delta: np.ndarray
) -> np.ndarray | None:
    """Tell how wide each weight's step may be, f32 (rows, cols), whatever the merged block says: as in the base's grid
    (``stored``), or in that of base + update (``fresh``), whichever is wider.

    For floats it is a unit of bf16, through which a merge may have gone. None where a type has no steps.
    """
    source, target = quants
    if target.type.block_size == 1:
        size = np.maximum(np.abs(before), np.abs(before + delta)) + np.abs(delta)
        size += np.sqrt(np.square(delta).mean(1, keepdims=True))  # what factors in halves may be off
        return size * np.float32(2.0**-7) + np.float32(2.0**-24 if target.type.name == "F16" else 1e-38)
    if target.grid is None:
        return None
    steps = _widest_steps(target, fresh, delta.shape)
    return np.maximum(steps, _widest_steps(target, stored, delta.shape)) if source is target else steps


def _widest_steps(codec: Codec, blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The distance of two neighbours at each weight: at least what one unit of the block's small scales, at most four
    bits wide, makes of its largest step.
    """
    steps = np.abs(unpacked(codec, blocks, shape)[1])
    if codec.known_grid.levels is not None:
        steps = steps * np.float32(np.diff(codec.known_grid.levels.astype(np.float32)).max())
    by_block = steps.reshape(len(steps), -1, codec.type.block_size // codec.known_grid.group)
    by_block = np.maximum(by_block, by_block.max(2, keepdims=True) / np.float32(15))
    return np.repeat(by_block.reshape(steps.shape), codec.known_grid.group, axis=1)


def but_for_scales(
    codec: Codec, blocks: np.ndarray, after: np.ndarray, error: np.ndarray, steps: np.ndarray | None
) -> np.ndarray:
    """Return ``error`` without what moving the f16 scales of each block explains of it, all f32 (rows, cols), by least
    squares.

    ``after`` are the weights of ``blocks``. All of it where that would take a weight farther than a merge may, which
    may have known an importance matrix, by its step in ``steps`` (rows, cols); and in a type that has no such scales.
    """
    if steps is None or not codec.grid or not codec.scales_at:
        return error
    shape, of_block = after.shape, (*after.shape[:1], -1, codec.type.block_size)
    lows = np.empty((shape[0], shape[1] // codec.grid.group), np.float32)
    codec.grid.read_lows(blocks, lows)
    low = np.repeat(lows, codec.grid.group, axis=1).reshape(of_block)
    scaled, wanted = after.reshape(of_block) + low, error.reshape(of_block)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ss, sl, ll, se, le = (
            np.einsum("ijk,ijk->ij", *pair, dtype=np.float64)[..., None]
            for pair in ((scaled, scaled), (scaled, low), (low, low), (scaled, wanted), (low, wanted))
        )
        det = ss * ll - sl * sl
        both = det > ALIKE * ss * ll
        x = np.where(both, (se * ll - le * sl) / det, se / ss).astype(np.float32)
        y = np.where(both, (ss * le - sl * se) / det, 0).astype(np.float32)
        found = x * scaled + y * low
        limit = np.float32(MOST_MOVED * reach(codec.grid, measured=True) / codec.grid.gap) * steps.reshape(of_block)
        fair = (np.abs(found) <= limit).all(axis=2, keepdims=True)
    return np.asarray(error - np.where(fair, found, np.float32(0)).reshape(shape))


def farthest(codec: Codec, error: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    """Tell how far a weight may be from base + update at most, f32 (rows, cols): a few steps, and a few times the
    largest ``error`` that the type's own quantizer leaves in the block.
    """
    size = codec.type.block_size
    largest = np.abs(error).reshape(len(error), -1, size).max(2)
    spread = np.repeat(largest, size, axis=1) * np.float32(4)
    return spread if steps is None else spread + 4 * steps


def cut_off(
    codec: Codec,
    weights: tuple[np.ndarray, np.ndarray],
    neighbours: tuple[np.ndarray, np.ndarray],
    steps: np.ndarray,
) -> np.ndarray:
    """Tell which weights lie at the end of a sensible grid that they were to lie beyond: bool (rows, cols). A block's
    own quantizer leaves them there where an importance matrix says that they count little; not at 8 bits. ``weights``
    are those that were wanted and those after.
    """
    (wanted, after), (low, high) = weights, neighbours
    if not codec.scales_at or codec.known_grid.code_max - codec.known_grid.code_min > MOST_CUT:
        return np.zeros(wanted.shape, bool)
    gap = high - low
    beyond = ((wanted > high) & (np.abs(after - high) <= gap / 2)) | ((wanted < low) & (np.abs(after - low) <= gap / 2))
    return np.asarray(beyond & (gap >= steps / 2) & (np.abs(wanted - after) <= np.abs(wanted) / 2))
