"""The tensors of a merge cut into chunks of rows, each with all that its rows need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.kernels.low_rank import low_rank
from lora_gguf.merging.refit import Weighting
from lora_gguf.merging.scratch import scratch
from lora_gguf.merging.tensor import Recipe, TensorPlan

CHUNK_WEIGHTS = 1 << 20  # of a chunk: enough that Python's part in it, 0.2 ms, does not count
WORKING_BYTES = 40  # of memory for each weight of a chunk in work: update, weights, codes, a quantizer's search
COPY_BYTES = 16 << 20

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
    """Rows that are rewritten by a recipe, all in the matrix (expert) number ``matrix``.

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
    """Yield the chunks of ``ranges``, in order; those that change have about ``n_weights``, whole rows.

    ``weigh`` is asked for a tensor's weighting when its turn comes.
    """
    n_weights = n_weights or CHUNK_WEIGHTS
    for part in ranges:
        source = part.tensor.source
        n_rows = max(1, n_weights // max(1, source.n_cols))
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
    a, b = stack(tensor.pairs, tensor.source.n_rows // n_out, n_out, n_cols)
    recipe = tensor.wanted
    weightings = weigh(tensor) if weigh and tensor.changes and recipe.moves_grid else None
    for first, n_rows in runs:
        matrix, row = divmod(first, n_out)
        factor, weighting = b[matrix, row : row + n_rows], weightings[matrix] if weightings else None
        yield Changed(tensor, first, len(factor), recipe, matrix, a[matrix], factor, weighting)


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


def stack(pairs: Sequence[LoraPair], n_matrices: int, n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all updates of one tensor as one pair of factors, f32: a (E, R, in), and b (E, out, R) with the scales."""
    a = [np.asarray(pair.a, np.float32).reshape(n_matrices, -1, n_in) for pair in pairs]
    b = [np.asarray(pair.b, np.float32).reshape(n_matrices, n_out, -1) * np.float32(pair.scale) for pair in pairs]
    none_a, none_b = np.empty((n_matrices, 0, n_in), np.float32), np.empty((n_matrices, n_out, 0), np.float32)
    return np.concatenate([none_a, *a], axis=1), np.concatenate([none_b, *b], axis=2)


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


def weights_within(memory: int | None, n_threads: int | None) -> int:
    """Return how many weights a chunk may have so that the chunks in work take at most ``memory`` bytes in all."""
    if memory is None:
        return CHUNK_WEIGHTS
    return min(CHUNK_WEIGHTS, max(1, memory // (WORKING_BYTES * (n_threads or n_cores()))))


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
