"""What happens to the rows of one chunk, from bytes to bytes; ``merge_rows`` is the whole of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lora_gguf.kernels.lanes import N as LANES
from lora_gguf.merging.chunks import Changed, update_of
from lora_gguf.merging.halves import round_bf16, round_f16, tally_rows
from lora_gguf.merging.importance import even_weighting
from lora_gguf.merging.refit import NO_GRID, MovingGrid, reach
from lora_gguf.merging.regrid import erased, on_finer_grid, round_on
from lora_gguf.merging.rounding import OUTSIDE, Watched
from lora_gguf.merging.scratch import copied, scratch
from lora_gguf.merging.tensor import NO_IMPORTANCE, SPREADS
from lora_gguf.quants.codec import Grid, Half

HALVES = {"F16": round_f16, "BF16": round_bf16}


def merge_rows(chunk: Changed, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a chunk's rows with their update added, as stored, and their sums (4,) for ``Retention``.

    ``blocks`` uint8 (rows, row_bytes) are the rows in the base; their memory may be reused. The same bytes come out
    however the tensor is cut into chunks.
    """
    delta = update_of(chunk, blocks)  # decode where an update needs the weights, and add up
    kept, fresh = decide(chunk)
    if kept.all():
        return move(chunk, blocks, delta)  # round the codes on their grid, which may move too; encode, count
    if fresh.all():
        return renew(chunk, blocks, delta)  # decode, add, encode on a grid of its own, count
    result, sums = blocks.copy(), np.zeros(4)
    if fresh.any():
        result[fresh], more = renew(chunk, blocks[fresh], delta[fresh])
        sums += more
    if kept.any():
        moved, more = move(chunk, blocks, delta * kept[:, None])
        result[kept] = moved[kept]
        sums += more
    return result, sums


def decide(chunk: Changed) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows move on their grid, and which are renewed: bool (rows,) twice. The others keep their bytes.

    Renewed is what gets a new type, what an adapter replaces, and what is rounded in a way that knows no grid.
    """
    recipe = chunk.recipe
    if recipe.source is not recipe.target:
        return np.zeros(chunk.n_rows, bool), np.ones(chunk.n_rows, bool)
    changed, replaced = chunk.b.any(axis=1), np.zeros(chunk.n_rows, bool)
    for update, _ in chunk.tensor.updates:
        touched = update.touches(chunk.first, chunk.n_rows)
        changed |= touched
        replaced |= touched & update.replaces
    kept = changed & ~replaced & recipe.keeps_grid
    return kept, changed & ~kept


def move(chunk: Changed, blocks: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows ``blocks`` (changed in place) with ``delta`` added on the grid they lie on, and their sums."""
    codec, sums = chunk.recipe.source, np.zeros(4)
    if codec.half:
        move_halves(chunk, codec.half, blocks.view(np.uint16), delta, sums)
    elif codec.grid:
        move_codes(chunk, codec.grid, blocks, delta, sums)
    else:
        raise ValueError(f"{codec.type} has no grid")
    return blocks, sums


def move_halves(chunk: Changed, half: Half, halves: np.ndarray, delta: np.ndarray, sums: np.ndarray) -> None:
    """Round 16-bit floats in place; ``auto`` dithers the rows whose update is smaller than what the type can tell
    apart, and rounds the others to nearest.
    """
    recipe = chunk.recipe
    round_halves, spreads = HALVES[recipe.source.type.name], np.full(len(delta), SPREADS[recipe.rounding])
    if recipe.rounding == "auto":
        weights = recipe.source.decoded(halves.view(np.uint8))
        unit = np.float32(2.0 ** -(half.bits + 1))
        spreads[np.square(delta).mean(axis=1) > np.square(weights * unit).mean(axis=1)] = 0.0
    for i in range(len(delta)):
        round_halves(halves[i : i + 1], delta[i : i + 1], spreads[i], recipe.key, chunk.first + i, sums)


def move_codes(chunk: Changed, grid: Grid, blocks: np.ndarray, delta: np.ndarray, sums: np.ndarray) -> None:
    """Round codes in place. Under ``auto``, a block that weights leave by far gets a fresh grid after all."""
    codec, before = chunk.recipe.source, copied(blocks) if chunk.recipe.moves_grid else blocks
    codes, steps = scratch("codes", delta.shape, np.int8), scratch("steps", (len(delta), delta.shape[1] // grid.group))
    grid.unpack(blocks, codes, steps)
    moving = moving_grid(chunk, grid, blocks, steps)
    outside = np.zeros((len(delta), delta.shape[1] // codec.type.block_size), np.float32)
    room = scratch("room", (2, delta.shape[1]))
    round_on(chunk, grid, codes, steps, delta, SPREADS[chunk.recipe.rounding], Watched(moving, outside, room, sums))
    grid.pack(codes, blocks)
    left = outside > OUTSIDE
    if left.any():
        sums[:3] += renew_blocks(chunk, blocks, before, delta, left)[:3]


def moving_grid(chunk: Changed, grid: Grid, blocks: np.ndarray, steps: np.ndarray) -> MovingGrid:
    """Return what ``refit_row`` moves: the grid of ``blocks``, or nothing where it stays."""
    recipe = chunk.recipe
    if not recipe.moves_grid:
        return NO_GRID
    codec, lows = recipe.source, scratch("lows", steps.shape)
    grid.read_lows(blocks, lows)
    weighed = chunk.weighting or even_weighting(codec.type.name, steps.shape[1] * grid.group)
    d_at, m_at = (*codec.scales_at, -1)[:2]
    weights = weighed.importance, weighed.heights, weighed.before, weighed.after
    n_blocks = max(len(weighed.before), len(weighed.after))
    work = scratch("work", (10, -(-n_blocks // LANES) * LANES))
    limits = np.float32(grid.breadth), np.float32(reach(grid, recipe.importance is not None))
    return MovingGrid(blocks, lows, *weights, work, codec.type.block_bytes, d_at, m_at, *limits)


def renew(chunk: Changed, blocks: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows with ``delta`` added on another grid than theirs, and their sums.

    It is that which the target type's own quantizer finds, where it erases the update that of the row without it, or
    theirs with the values in between. Where a row has a new type, all rows of the chunk are given: their random numbers
    go by their place in it.
    """
    recipe = chunk.recipe
    before = recipe.source.decoded(blocks)
    by_chance = recipe.source is not recipe.target and recipe.rounding in ("auto", "dither")
    if recipe.refines_grid:
        renewed = refined(chunk, blocks, before + delta)
    elif by_chance and recipe.target.half:
        renewed, _ = move(of_target(chunk), recipe.target.encoded(before, NO_IMPORTANCE), delta)
    else:
        renewed = recipe.target.encoded(before + delta, recipe.importance_of(chunk.matrix))
        if by_chance and recipe.target.grid:
            keep_update(chunk, recipe.target.grid, renewed, before, delta)
    return renewed, tallied(recipe.source.decoded(blocks), recipe.target.decoded(renewed), delta)


def keep_update(chunk: Changed, grid: Grid, renewed: np.ndarray, before: np.ndarray, delta: np.ndarray) -> None:
    """Merge anew, in place, the rows ``renewed`` uint8 (rows, row_bytes) in which the update is erased: into ``before``
    f32 (rows, cols) as stored in the target type. ``dither`` merges all of them so.
    """
    recipe, all_rows = chunk.recipe, chunk.recipe.rounding == "dither"
    chosen = np.asarray(delta.any(axis=1)) if all_rows else erased(chunk, grid, renewed, before, delta)
    if chosen.any():
        merged = renewed.copy()
        merged[chosen] = recipe.target.encoded(before[chosen], recipe.importance_of(chunk.matrix))
        move(of_target(chunk), merged, delta * chosen[:, None])
        renewed[chosen] = merged[chosen]


def refined(chunk: Changed, blocks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the rows ``wanted`` f32 (rows, cols) on the grid of ``blocks``, with the values in between."""
    target = chunk.recipe.target
    finer = on_finer_grid(chunk.recipe.source, target, blocks)
    return move(of_target(chunk), finer, wanted - target.decoded(finer))[0]


def of_target(chunk: Changed) -> Changed:
    """Return a chunk as if its rows had had the type that they get."""
    return replace(chunk, recipe=replace(chunk.recipe, source=chunk.recipe.target))


def renew_blocks(
    chunk: Changed, blocks: np.ndarray, before: np.ndarray, delta: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """Give the blocks ``chosen`` bool (rows, blocks) of the rows ``blocks``, which were ``before``, a fresh grid, in
    place; return their sums (4,).
    """
    recipe, numbers, per_row = chunk.recipe, np.flatnonzero(chosen), chosen.shape[1]
    by_block, of_block = blocks.reshape(chosen.size, -1), delta.reshape(chosen.size, -1)
    weights = recipe.source.decoded(before.reshape(by_block.shape)[numbers])
    change = scratch("change", weights.shape)
    of_block.take(numbers, 0, change, "clip")
    importance = recipe.importance_of(chunk.matrix)
    if importance.size:
        importance = importance.reshape(per_row, -1)[numbers % per_row]
    wanted = np.add(weights, change, scratch("wanted", weights.shape))
    by_block[numbers] = renewed = recipe.target.encoded(wanted, importance)
    return tallied(weights, recipe.target.decoded(renewed), change)


def tallied(before: np.ndarray, after: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Return the sums (4,) of weights that were ``before`` and are ``after``."""
    sums = np.zeros(4)
    tally_rows(before, after, delta, sums)
    return sums
