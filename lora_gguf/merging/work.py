"""The merge cut into chunks of rows, each read, changed and written by one thread on its own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.errors import NumericError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter
from lora_gguf.kernels.low_rank import low_rank
from lora_gguf.merging.plan import TensorPlan
from lora_gguf.merging.requantize import NO_IMPORTANCE, recode, scratch
from lora_gguf.quants.table import CODECS

CHUNK_WEIGHTS = 1 << 20  # of a chunk: enough that Python's part in it, 0.2 ms, does not count
WORKING_BYTES = (
    40  # of memory for each weight of a chunk in work: update, weights, codes, what a quantizer's search needs
)
COPY_BYTES = 16 << 20
AHEAD = 4  # chunks a thread that are in work or done before their results are taken


@dataclass(frozen=True)
class Chunk:
    """Rows ``first`` to ``first + n_rows`` of a tensor, in its matrix (expert) number ``matrix``.

    ``a`` (R, cols) and ``b`` (n_rows, R) are the factors of their update, R 0 where only the type changes. ``new`` f32
    (n_rows, cols) are rows beyond those of the base.
    """

    tensor: TensorPlan
    first: int
    n_rows: int
    matrix: int = 0
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    new: np.ndarray | None = None

    @property
    def n_bytes(self) -> int:
        """What it reads of the base."""
        return 0 if self.new is not None else self.n_rows * self.tensor.source.row_bytes


def cut(tensors: Sequence[TensorPlan], n_weights: int | None = None) -> Iterator[Chunk]:
    """The chunks of ``tensors``, in order; those that change have about ``n_weights``, whole rows."""
    n_weights = n_weights or CHUNK_WEIGHTS
    for tensor in tensors:
        yield from _cut_changed(tensor, n_weights) if tensor.recipe else _cut_copied(tensor)
        if tensor.new_rows is not None:
            yield from _cut_new(tensor, n_weights)


def weights_within(memory: int | None, n_threads: int | None) -> int:
    """How many weights a chunk may have so that the chunks in work take at most ``memory`` bytes in all."""
    return (
        CHUNK_WEIGHTS
        if memory is None
        else min(CHUNK_WEIGHTS, max(1, memory // (WORKING_BYTES * (n_threads or n_cores()))))
    )


def _cut_copied(tensor: TensorPlan) -> Iterator[Chunk]:
    n_rows = max(1, COPY_BYTES // max(1, tensor.source.row_bytes))
    for first in range(0, tensor.source.n_rows, n_rows):
        yield Chunk(tensor, first, min(n_rows, tensor.source.n_rows - first))


def _cut_changed(tensor: TensorPlan, n_weights: int) -> Iterator[Chunk]:
    shape = tensor.source.shape
    if not tensor.source.n_elements:
        return
    n_out, n_cols = (1, *shape)[-2:]
    a, b = stack(tensor.pairs, tensor.source.n_rows // n_out, n_out, n_cols)
    n_rows = max(1, n_weights // n_cols)
    for matrix in range(len(a)):
        for row in range(0, n_out, n_rows):
            factor = b[matrix, row : row + n_rows]
            yield Chunk(tensor, matrix * n_out + row, len(factor), matrix, a[matrix], factor)


def _cut_new(tensor: TensorPlan, n_weights: int) -> Iterator[Chunk]:
    n_rows = max(1, n_weights // tensor.source.n_cols)
    for first in range(0, len(tensor.new_rows), n_rows):
        new = np.ascontiguousarray(tensor.new_rows[first : first + n_rows], np.float32)
        yield Chunk(tensor, tensor.source.n_rows + first, len(new), new=new)


def stack(pairs: Sequence[LoraPair], n_matrices: int, n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """All updates of one tensor as one pair of factors, f32: a (E, R, in), and b (E, out, R) with the scales in it."""
    a = [np.asarray(pair.a, np.float32).reshape(n_matrices, -1, n_in) for pair in pairs]
    b = [np.asarray(pair.b, np.float32).reshape(n_matrices, n_out, -1) * np.float32(pair.scale) for pair in pairs]
    none_a, none_b = np.empty((n_matrices, 0, n_in), np.float32), np.empty((n_matrices, n_out, 0), np.float32)
    return np.concatenate([none_a, *a], axis=1), np.concatenate([none_b, *b], axis=2)


def carry_out(chunk: Chunk, reader: GgufReader, writer: GgufWriter) -> tuple[int, np.ndarray] | None:
    """Read a chunk, add its update, write it. Returns its number of weights and its sums; None where it was copied."""
    info, target = chunk.tensor.source, writer.tensors[chunk.tensor.target.name]
    if chunk.new is not None:
        writer.write(target, chunk.first * target.row_bytes, encoded(chunk))
        return None
    if chunk.tensor.recipe is None:
        writer.copy(target, reader, info, chunk.first * info.row_bytes, chunk.n_bytes)
        return None
    blocks = scratch("blocks", (chunk.n_rows, info.row_bytes), np.uint8)
    reader.read_into(info, chunk.first * info.row_bytes, blocks)
    broken = chunk.tensor.recipe.source.broken(blocks.reshape(-1, info.type.block_bytes))
    if broken.any():
        row = int(broken.argmax()) // (len(broken) // len(blocks))
        raise NumericError(
            f"{reader.label}: {info.name}: row {chunk.first + row}: a scale is NaN or infinity: the base is damaged"
        )
    delta = update_of(chunk, blocks)
    blocks, sums = rewritten(chunk, blocks, delta)
    if not np.isfinite(sums).all():
        raise NumericError(
            f"{reader.label}: {info.name}: rows {chunk.first} to {chunk.first + chunk.n_rows - 1}: NaN, infinity or overflow "
            f"in the merged {target.type}: check the base, lower the scale, or choose --type Q8_0 or BF16"
        )
    writer.write(target, chunk.first * target.row_bytes, blocks)
    return delta.size, sums


def encoded(chunk: Chunk) -> np.ndarray:
    """The new rows of a chunk as stored in the tensor's type."""
    quant, recipe = CODECS[chunk.tensor.target.type.name], chunk.tensor.recipe
    blocks = np.empty((chunk.n_rows, quant.type.row_bytes(chunk.new.shape[1])), np.uint8)
    quant.encode(
        chunk.new, NO_IMPORTANCE if recipe is None or recipe.importance is None else recipe.importance[0], blocks
    )
    return blocks


def rewritten(chunk: Chunk, blocks: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows ``blocks`` with ``delta`` added, as ``recode`` gives them, and their sums.

    Where the type stays, rows that nothing changes keep their bytes, and those that are replaced get a grid of their
    own.
    """
    recipe = chunk.tensor.recipe
    if recipe.source is not recipe.target:
        return recode(recipe, blocks, delta, chunk.first, chunk.matrix)
    changed, replaced = changed_rows(chunk)
    moved = changed & ~replaced if recipe.keeps_grid else np.zeros_like(changed)
    if moved.all():
        return recode(recipe, blocks, delta, chunk.first, chunk.matrix)
    before, sums = blocks.copy(), np.zeros(4)
    if moved.any():
        blocks, sums = recode(recipe, blocks, delta * moved[:, None], chunk.first, chunk.matrix)
        blocks[~moved] = before[~moved]
    anew = changed & ~moved
    if anew.any():
        fresh = replace(recipe, rounding="fresh")
        blocks[anew], more = recode(fresh, before[anew], delta[anew], chunk.first, chunk.matrix)
        sums = sums + more
    return blocks, sums


def changed_rows(chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    """Which of a chunk's rows an adapter changes, and which of them it replaces: bool (n_rows,)."""
    changed, replaced = chunk.b.any(axis=1), np.zeros(chunk.n_rows, bool)
    for update, _ in chunk.tensor.updates:
        touched = update.touches(chunk.first, chunk.n_rows)
        changed |= touched
        replaced |= touched & update.replaces
    return changed, replaced


def update_of(chunk: Chunk, blocks: np.ndarray) -> np.ndarray:
    """What is added to the rows ``blocks`` (uint8, as stored): f32 (rows, cols)."""
    tensor = chunk.tensor
    delta = scratch("delta", (chunk.n_rows, tensor.source.n_cols))
    low_rank(chunk.b, chunk.a, delta)
    if tensor.updates:
        weights = np.empty_like(delta)
        tensor.recipe.source.decode(blocks, weights)
        for update, scale in tensor.updates:
            delta += np.float32(scale) * update.change(chunk.first, weights)
    return delta


def in_threads(work: Callable, items: Iterable, n_threads: int | None) -> Iterator[tuple]:
    """(item, work(item)) for each of ``items``, in order, done by ``n_threads`` threads, by default as many as
    cores.
    """
    n_threads = n_threads or n_cores()
    if n_threads < 1:
        raise UsageError(f"threads: expected at least 1, found {n_threads}")
    ahead: deque = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for item in items:
                ahead.append((item, pool.submit(work, item)))
                if len(ahead) > AHEAD * n_threads:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
