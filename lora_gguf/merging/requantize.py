"""One chunk of rows: decode as far as needed, add the update, and encode again."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lora_gguf.merging.refit import Weighting, weighting
from lora_gguf.merging.rounding import round_bf16, round_codes, round_f16, round_levels, tally_rows
from lora_gguf.quants.codec import Codec

NO_IMPORTANCE = np.empty(0, np.float32)
NO_GRID = (
    np.empty((0, 0), np.uint8),
    np.empty((0, 0), np.float32),
    NO_IMPORTANCE,
    NO_IMPORTANCE,
    np.empty(0, np.int64),
    0,
    0,
    -1,
)
FAINT = 0.3  # rms of a row's update in steps of another type below which rounding to nearest may erase it
OUTSIDE = 0.02  # share of a block's weights beyond its range from which on it gets a new grid
# the width of the random offset before the floor; a rounding that is not here finds a new grid
SPREADS = {"auto": 1.0, "dither": 1.0, "nearest": 0.0}
ROUNDINGS = (*SPREADS, "fresh")
HALVES = {"F16": round_f16, "BF16": round_bf16}
_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    """An array that this thread uses again and again under ``name``, with whatever it held: fresh pages cost as much as
    a pass.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = getattr(_local, name, None)
    if buffer is None or len(buffer) < n_bytes:
        buffer = np.empty(n_bytes, np.uint8)
        setattr(_local, name, buffer)
    return buffer[:n_bytes].view(dtype).reshape(shape)


def copied(array: np.ndarray) -> np.ndarray:
    """A copy of an array in memory that this thread uses for one such copy at a time."""
    copy = scratch("copy", array.shape, array.dtype)
    copy[...] = array
    return copy


class Later(Sequence):
    """A sequence that ``make`` makes when it is first looked into, once, whichever thread does."""

    def __init__(self, make: Callable[[], Sequence]):
        self._make, self._lock = make, threading.Lock()

    @functools.cached_property
    def _made(self) -> Sequence:
        return self._make()

    def __len__(self) -> int:
        with self._lock:
            return len(self._made)

    def __getitem__(self, i):
        with self._lock:
            return self._made[i]


@dataclass(frozen=True)
class Recipe:
    """How the rows of a tensor are rewritten: from which type to which, and by which rounding.

    ``importance`` is f32 (matrices, cols), E[x²] of each column of the input as an imatrix has it, or None: the
    quantizers use it. ``weighting`` has as many, of an importance measured or guessed: ``auto`` uses it where it moves
    a grid.
    """

    source: Codec
    target: Codec
    rounding: str
    key: np.uint64
    importance: np.ndarray | None = None
    weighting: Sequence[Weighting] = ()

    @property
    def keeps_grid(self) -> bool:
        gridded = self.source.grid is not None or self.source.half is not None
        return self.rounding in SPREADS and self.source is self.target and gridded

    @property
    def moves_grid(self) -> bool:
        return (
            self.rounding == "auto" and self.keeps_grid and self.source.grid is not None and bool(self.source.scales_at)
        )


def recode(
    recipe: Recipe, blocks: np.ndarray, delta: np.ndarray, first_row: int, matrix: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The rows ``blocks`` uint8 (rows, row_bytes) with ``delta`` f32 (rows, cols) added; ``blocks`` may be reused.

    Returns the new rows as stored, and their sums (4,) for ``Retention``. The same bytes come out however the tensor is
    cut into chunks; ``first_row`` is the chunk's place in it, ``matrix`` the expert that it belongs to.
    """
    sums = np.zeros(4)
    if not recipe.keeps_grid:
        return _renew(recipe, blocks, delta, first_row, matrix, sums), sums
    if recipe.source.half:
        halves = blocks.view(np.uint16)
        _move_halves(recipe, halves, delta, first_row, sums)
    else:
        _move_codes(recipe, blocks, delta, first_row, matrix, sums)
    return blocks, sums


def _move_halves(recipe: Recipe, halves, delta, first_row: int, sums) -> None:
    """``auto`` dithers the rows whose update is smaller than what the type can tell apart, and rounds the others to
    nearest.
    """
    move, unit = HALVES[recipe.source.type.name], 2.0 ** -(recipe.source.half.bits + 1)
    spreads = np.full(len(delta), SPREADS[recipe.rounding])
    if recipe.rounding == "auto":
        weights = np.empty_like(delta)
        recipe.source.decode(halves.view(np.uint8), weights)
        spreads[np.square(delta).mean(axis=1) > np.square(weights * np.float32(unit)).mean(axis=1)] = 0.0
    for i in range(len(delta)):
        move(halves[i : i + 1], delta[i : i + 1], spreads[i], recipe.key, first_row + i, sums)


def _move_codes(recipe: Recipe, blocks, delta, first_row: int, matrix: int, sums) -> None:
    quant, spread = recipe.source, np.float32(SPREADS[recipe.rounding])
    codes, steps = (
        scratch("codes", delta.shape, np.int8),
        scratch("steps", (len(delta), delta.shape[1] // quant.grid.group)),
    )
    quant.grid.unpack(blocks, codes, steps)
    refits = recipe.moves_grid
    grid = grid_of(recipe, blocks, steps, matrix) if refits else NO_GRID
    if quant.grid.levels is not None:
        round_levels(
            codes, steps, delta, quant.grid.levels, quant.grid.code_min, spread, recipe.key, first_row, sums, grid
        )
        quant.grid.pack(codes, blocks)
        return
    before, outside = None, NO_GRID[1]
    if refits:
        before, outside = copied(blocks), np.zeros((len(delta), delta.shape[1] // quant.type.block_size), np.float32)
    limits = np.float32(quant.grid.code_min), np.float32(quant.grid.code_max)
    round_codes(
        codes, np.float32(quant.grid.zero), steps, delta, *limits, spread, recipe.key, first_row, sums, grid, outside
    )
    quant.grid.pack(codes, blocks)
    renew = outside > OUTSIDE * quant.type.block_size
    if renew.any():
        sums[:3] = _renew_some(recipe, blocks, before, delta, renew, matrix)[:3]


def grid_of(recipe: Recipe, blocks, steps, matrix: int) -> tuple:
    """The ``grid`` of ``refit_row``."""
    quant, n_cols = recipe.source, steps.shape[1] * recipe.source.grid.group
    lows = scratch("lows", steps.shape)
    if quant.grid.lows:
        quant.grid.lows(blocks, lows)
    else:
        lows[...] = 0
    weighed = recipe.weighting[matrix] if recipe.weighting else weighting_of(quant, np.ones(n_cols, np.float32))
    place = quant.type.block_bytes, *(*quant.scales_at, -1)[:2]
    return blocks, lows, weighed.importance, weighed.heights, weighed.blocks, *place


def weighting_of(quant: Codec, importance: np.ndarray) -> Weighting:
    """The weighting of columns of ``importance`` f32 (cols,) on the grid of a type."""
    return weighting(importance, quant.type.block_size, quant.grid.group, len(quant.scales_at))


def _renew_some(recipe: Recipe, blocks, before, delta, renew, matrix: int) -> np.ndarray:
    """Give the blocks ``renew`` bool (rows, blocks) the grid that the type's own quantizer finds. Returns the sums of
    all rows.
    """
    sums, rows = np.zeros(4), np.flatnonzero(renew.any(axis=1))
    fresh = _renew(recipe, before[rows], delta[rows], 0, matrix, np.zeros(4))
    of_block = (*renew[rows].shape, -1)
    chosen = np.where(renew[rows, :, None], fresh.reshape(of_block), blocks[rows].reshape(of_block))
    blocks[rows] = chosen.reshape(len(rows), -1)
    old, new = np.empty_like(delta), np.empty_like(delta)
    recipe.source.decode(before, old)
    recipe.source.decode(blocks, new)
    tally_rows(old, new, delta, sums)
    return sums


def _renew(recipe: Recipe, blocks, delta, first_row: int, matrix: int, sums) -> np.ndarray:
    """Decode, add, and let the target type's own quantizer find a new grid."""
    before, after = np.empty_like(delta), np.empty_like(delta)
    recipe.source.decode(blocks, before)
    wanted = before + delta
    renewed = np.empty((len(delta), recipe.target.type.row_bytes(delta.shape[1])), np.uint8)
    recipe.target.encode(wanted, NO_IMPORTANCE if recipe.importance is None else recipe.importance[matrix], renewed)
    promoted = recipe.source.grid and recipe.source is not recipe.target
    if promoted and recipe.target.type.name == "Q8_0" and recipe.rounding in ("auto", "dither"):
        _dither_faint(recipe, renewed, wanted, delta, first_row)
    recipe.target.decode(renewed, after)
    tally_rows(before, after, delta, sums)
    return renewed


def _dither_faint(recipe: Recipe, renewed, wanted, delta, first_row: int) -> None:
    """Round by chance the rows whose update Q8_0's steps are too coarse for: the old grid may lie on the new one, as
    IQ4_NL's does.
    """
    quant = recipe.target
    codes, steps = (
        np.empty(delta.shape, np.int8),
        np.empty((len(delta), delta.shape[1] // quant.grid.group), np.float32),
    )
    quant.grid.unpack(renewed, codes, steps)
    step2 = np.einsum("ij,ij->i", steps, steps) / steps.shape[1]
    faint = np.einsum("ij,ij->i", delta, delta) / delta.shape[1] < FAINT * FAINT * step2
    if not faint.any():
        return
    left, limits = np.empty_like(delta), (np.float32(quant.grid.code_min), np.float32(quant.grid.code_max))
    quant.decode(renewed, left)
    np.subtract(wanted, left, out=left)
    left[~faint] = 0
    round_codes(
        codes,
        np.float32(quant.grid.zero),
        steps,
        left,
        *limits,
        np.float32(1),
        recipe.key,
        first_row,
        np.zeros(4),
        NO_GRID,
        NO_GRID[1],
    )
    quant.grid.pack(codes, renewed)
