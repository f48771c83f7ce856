"""The tensors of a merge cut into chunks of rows, each with all that its rows need."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_gguf.adapters.held import n_held
from lora_gguf.adapters.lora import LoraPair
from lora_gguf.files.lazy_array import at_hand
from lora_gguf.kernels.low_rank import low_rank
from lora_gguf.merging.refit import Weighting
from lora_gguf.merging.scratch import scratch
from lora_gguf.merging.tensor import Recipe, TensorPlan

CHUNK_BYTES = 40 << 20  # of memory that a chunk in work takes: so large that Python's part, 0.2 ms, does not count
ROUNDED, RENEWED = 20, 40  # bytes of it for each weight: update, codes; weights and a quantizer's search as well
COPY_BYTES = 16 << 20
WHOLE_B = 4 << 20  # a B of so many bytes is read at once: row by row takes longer
TENSORS_HELD = 2  # the one whose chunks are in work, and the next

# the weighting of each matrix of a tensor
Weigh = Callable[[TensorPlan], Sequence[Weighting]]


@dataclass(frozen=True)
class Range:
    """Rows ``first`` to ``first + n_rows`` of a tensor as it is written, new ones after those of the base."""

    tensor: TensorPlan
    first: int
    n_rows: int

    @property
    def end(self) -> int:
        return self.first + self.n_rows


@dataclass(frozen=True)
class Chunk:
    """Rows ``first`` to ``first + n_rows`` of a tensor; a plain chunk is copied as it is."""

    tensor: TensorPlan
    first: int
    n_rows: int

    @property
    def n_bytes(self) -> int:
        """The bytes that it reads of the base."""
        return self.n_rows * self.tensor.source.row_bytes


@dataclass(frozen=True)
class Changed(Chunk):
    """Rows that a recipe writes anew, all in the matrix (expert) number ``matrix``, whether an adapter changes them or
    only their type.

    ``a`` (R, cols) and ``b`` (n_rows, R) are the factors of their update, R 0 where none of it is low rank;
    ``weighting`` is that of the matrix's columns, None where all count alike.
    """

    recipe: Recipe
    matrix: int
    a: np.ndarray
    b: np.ndarray
    weighting: Weighting | None = None


@dataclass(frozen=True)
class New(Chunk):
    """Rows beyond those of the base, f32 (n_rows, cols)."""

    rows: np.ndarray

    @property
    def n_bytes(self) -> int:
        return 0


def whole(tensor: TensorPlan) -> Range:
    """Return all rows of a tensor."""
    return Range(tensor, 0, tensor.target.n_rows)


def cut(ranges: Iterable[Range], weigh: Weigh | None = None, n_weights: int | None = None) -> Iterator[Chunk]:
    """Yield the chunks of ``ranges``, in order; those that change have about ``n_weights``, whole rows, by default as
    many as take ``CHUNK_BYTES`` in work.

    ``weigh`` is asked for a tensor's weighting when its turn comes.
    """
    for part in ranges:
        source = part.tensor.source
        n_rows = max(1, (n_weights or CHUNK_BYTES // working_bytes(part.tensor)) // max(1, source.n_cols))
        old = replace(part, n_rows=min(part.end, source.n_rows) - part.first)
        if part.tensor.recipe is None:
            yield from _cut_copied(old)
        elif source.n_elements and old.n_rows > 0:
            yield from chunks_of(part.tensor, _runs(old, n_rows), weigh)
        if part.tensor.new_rows is not None:
            yield from _cut_new(part, part.tensor.new_rows, n_rows)


def chunks_of(tensor: TensorPlan, runs: Iterable[tuple[int, int]], weigh: Weigh | None = None) -> Iterator[Changed]:
    """Yield the ``runs`` (first row, number of rows, all in one matrix) of a tensor that has a recipe, as chunks."""
    n_out, n_cols = (1, *tensor.source.shape)[-2:]
    pairs = [held(pair, tensor.source.n_rows // n_out) for pair in tensor.pairs]
    if tensor.updates:
        tensor = replace(tensor, updates=[(update.loaded(), scale) for update, scale in tensor.updates])
    recipe, held_matrix = tensor.wanted, -1
    weightings = weigh(tensor) if weigh and tensor.changes and recipe.weighs_columns else None
    for first, n_rows in runs:
        matrix, row = divmod(first, n_out)
        if matrix != held_matrix:
            a, held_matrix = a_of(pairs, matrix, n_cols), matrix
            b = [(at_hand(pair.b[matrix], WHOLE_B), np.float32(pair.scale)) for pair in pairs]
        factor, weighting = b_of(b, row, min(n_rows, n_out - row)), weightings[matrix] if weightings else None
        yield Changed(tensor, first, len(factor), recipe, matrix, a, factor, weighting)


def _runs(part: Range, n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of a range, at most ``n_rows``, each run in one matrix."""
    n_out, row = (1, *part.tensor.source.shape)[-2], part.first
    while row < part.end:
        n = min(n_rows, part.end - row, n_out - row % n_out)
        yield row, n
        row += n


def _cut_copied(part: Range) -> Iterator[Chunk]:
    n_rows = max(1, COPY_BYTES // max(1, part.tensor.source.row_bytes))
    for first in range(part.first, part.end, n_rows):
        yield Chunk(part.tensor, first, min(n_rows, part.end - first))


def _cut_new(part: Range, new_rows: np.ndarray, n_rows: int) -> Iterator[New]:
    n_old = part.tensor.source.n_rows
    for first in range(max(part.first, n_old), part.end, n_rows):
        rows = new_rows[first - n_old : min(first + n_rows, part.end) - n_old]
        yield New(part.tensor, first, len(rows), np.ascontiguousarray(rows, np.float32))


def held(pair: LoraPair, n_matrices: int) -> LoraPair:
    """Return a pair with its matrices along one axis; read, unless its file lets one matrix be read alone."""
    a, b = (at_hand(array.reshape(n_matrices, *array.shape[-2:])) for array in (pair.a, pair.b))
    return replace(pair, a=a, b=b)


def a_of(pairs: Sequence[LoraPair], matrix: int, n_in: int) -> np.ndarray:
    """Return the A's of one matrix one below the other, f32 (R, in)."""
    if len(pairs) == 1:
        return np.ascontiguousarray(pairs[0].a[matrix], np.float32)
    return np.concatenate([np.empty((0, n_in), np.float32), *(pair.a[matrix] for pair in pairs)], dtype=np.float32)


def b_of(scaled: Sequence[tuple[np.ndarray, np.float32]], row: int, n_rows: int) -> np.ndarray:
    """Return rows of the B's of one matrix side by side, each times its scale, f32 (n_rows, R)."""
    found = [np.asarray(b[row : row + n_rows], np.float32) * scale for b, scale in scaled]
    return found[0] if len(found) == 1 else np.concatenate([np.empty((n_rows, 0), np.float32), *found], axis=1)


def update_of(chunk: Changed, blocks: np.ndarray) -> np.ndarray:
    """Return what is added to the rows ``blocks`` (uint8, as stored): f32 (rows, cols), memory that is used again."""
    tensor = chunk.tensor
    delta = scratch("delta", (chunk.n_rows, tensor.source.n_cols))
    low_rank(chunk.b, chunk.a, delta)
    if tensor.updates:
        weights = chunk.recipe.source.decoded(blocks)
        for update, scale in tensor.updates:
            delta += np.float32(scale) * update.change(chunk.first, weights)
    return delta


def working_bytes(tensor: TensorPlan) -> int:
    """Return how many bytes of memory each weight of a tensor usually takes while it is in work."""
    return ROUNDED if tensor.recipe and tensor.recipe.keeps_grid and not tensor.updates else RENEWED


def weights_within(memory: int | None, n_threads: int | None, tensors: Iterable[TensorPlan] = ()) -> int | None:
    """Return how many weights a chunk may have so that the chunks in work, and what is held for their ``tensors``, take
    at most ``memory`` bytes in all, or as little as can be; None for no limit.
    """
    if memory is None:
        return None
    left = memory - TENSORS_HELD * max(map(held_bytes, tensors), default=0)
    return max(1, min(CHUNK_BYTES, left // (n_threads or n_cores())) // RENEWED)


def held_bytes(tensor: TensorPlan) -> int:
    """Return the most bytes in memory of what is added to a tensor, while its rows are in work."""
    factors = [factor for pair in tensor.pairs for factor in (pair.a, pair.b)]
    # of those of which a matrix can be read alone one is held, of others all
    pairs = sum(n_held(factor, by_row=True) or 4 * math.prod(factor.shape[-2:]) for factor in factors)
    return pairs + sum(update.held_bytes for update, _ in tensor.updates)


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
