"""Let an update survive a new grid: rows get another type, and their base may lie on its grid already.

So do a QAT checkpoint, a model that was dequantized, BF16 weights that become MXFP4. Rounding the sum to nearest finds
the base's own codes again, and erases an update below half a step. A base that lies anywhere between the codes has no
such need: then nearest rounding moves as many weights as it should, and adds less. So it is looked up, row by row, how
many of the base's weights lie near the middle between two codes, where a small update decides: about an eighth of them
lie in the middle eighth, if they lie anywhere; fewer where a quantizer searches for the grid that fits them best. Where
it is far fewer or far more, the update is merged into the base's row as the new type stores it, as into any row of that
type.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.merging.chunks import Changed
from lora_gguf.merging.refit import NO_GRID
from lora_gguf.merging.rounding import Rule, Watched, codebook, round_codes, round_levels
from lora_gguf.quants.codec import Codec, Grid

MIDDLE = 0.125  # of the distance between two codes
FAIR = 0.8, 1.3  # share of the weights in the middle, over MIDDLE
# what a quantizer leaves there, over MIDDLE, of weights that lie anywhere, where that is far below 1: measured on rows
# of normal, Laplace and t distribution, which differ by 0.03 (0.1 in Q2_K) at most
ANYWHERE = {"Q2_K": 0.7, "Q3_K": 0.84, "Q4_K": 0.63, "Q5_K": 0.84, "IQ4_NL": 0.87, "IQ4_XS": 0.87}
LARGE = 0.5  # mean move of a row in steps from which on nearest rounding erases nothing


def round_on(
    chunk: Changed, grid: Grid, codes: np.ndarray, steps: np.ndarray, delta: np.ndarray, spread: float, watched: Watched
) -> None:
    """Move int8 ``codes`` (rows, cols), in place, by ``delta`` f32 (rows, cols) on a grid with ``steps`` (rows,
    groups).
    """
    by, least, most, zero = map(np.float32, (spread, grid.code_min, grid.code_max, grid.zero))
    rule = Rule(by, chunk.recipe.key, chunk.first, least, most, zero)
    if grid.levels is not None:
        round_levels(codes, steps, delta, codebook(*grid.levels), rule, watched)
    else:
        round_codes(codes, steps, delta, rule, watched)


def erased(chunk: Changed, grid: Grid, renewed: np.ndarray, before: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Return in which rows the target type's own quantizer would erase the update: bool (rows,).

    The rows ``renewed`` uint8 (rows, row_bytes) are ``before`` + ``delta``, both f32 (rows, cols), as it stores them.
    """
    target = chunk.recipe.target
    codes, steps = np.empty(delta.shape, np.int8), np.empty((len(delta), delta.shape[1] // grid.group), np.float32)
    grid.unpack(renewed, codes, steps)
    small = np.abs(delta).mean(axis=1) < LARGE * grid.gap * np.abs(steps).mean(axis=1)
    chosen = np.asarray(delta.any(axis=1) & small)
    left = np.where(chosen[:, None], before - target.decoded(renewed), np.float32(0))
    room, unmeasured = np.empty((2, delta.shape[1]), np.float32), np.zeros((len(delta), 1), np.float32)
    round_on(chunk, grid, codes, steps, left, 0.0, Watched(NO_GRID, unmeasured, room, np.zeros(4)))
    return chosen & erases(target, grid, stored(grid, codes, renewed), before)


def on_finer_grid(source: Codec, target: Codec, blocks: np.ndarray) -> np.ndarray:
    """Return the rows ``blocks`` as stored in a type of ``FINER``: uint8 (rows, row_bytes), half the step, twice the
    code.

    A scale whose half is no f16 number is rounded.
    """
    if not (source.grid and target.grid):
        raise ValueError(f"{source.type}, {target.type}: expected types with a grid")
    n_cols = blocks.shape[1] // source.type.block_bytes * source.type.block_size
    codes = np.empty((len(blocks), n_cols), np.int8)
    source.grid.unpack(blocks, codes, np.empty((len(blocks), n_cols // source.grid.group), np.float32))
    head = source.type.block_bytes - source.type.block_size // 2  # the scales, before four bits a code
    halved = np.zeros((len(blocks), target.row_bytes(n_cols)), np.uint8)
    of_block = halved.reshape(-1, target.type.block_bytes)
    of_block[:, :head] = blocks.reshape(-1, source.type.block_bytes)[:, :head]
    d = np.ascontiguousarray(of_block[:, :2]).view(np.float16) * np.float16(0.5)
    of_block[:, :2] = d.view(np.uint8)
    target.grid.pack(codes * np.int8(2), halved)
    return halved


def stored(grid: Grid, codes: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return a copy of the rows ``like`` with ``codes`` in them."""
    blocks = like.copy()
    grid.pack(codes, blocks)
    return blocks


def erases(codec: Codec, grid: Grid, nearest: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return in which rows nearest rounding is no fair judge of small updates: bool (rows,).

    ``nearest`` uint8 (rows, row_bytes) are ``weights`` f32 (rows, cols) as stored.
    """
    codes, steps = (
        np.empty(weights.shape, np.int8),
        np.empty((len(weights), weights.shape[1] // grid.group), np.float32),
    )
    grid.unpack(nearest, codes, steps)
    step = np.repeat(steps, grid.group, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.abs((weights - codec.decoded(nearest)) / step)
        if grid.levels is not None:
            off /= distances(grid.levels, weights / step)
        in_middle = (off > 0.5 - MIDDLE / 2) & (off < 0.5 + MIDDLE / 2)
    share = in_middle.mean(axis=1) / MIDDLE
    return np.asarray((share < FAIR[0] * ANYWHERE.get(codec.type.name, 1.0)) | (share > FAIR[1]))


def distances(levels: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Return how far the two levels are apart between which each of ``units`` lies."""
    above = np.clip(np.searchsorted(levels, units), 1, len(levels) - 1)
    return np.asarray(levels[above] - levels[above - 1])
