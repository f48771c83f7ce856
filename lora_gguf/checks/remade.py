"""A chunk of a merge made again, and what the merged file holds in its place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_gguf.files.base import Base
from lora_gguf.merging.chunks import Changed, Chunk, New
from lora_gguf.merging.rows import merge_rows
from lora_gguf.merging.scratch import scratch
from lora_gguf.merging.work import encoded


@dataclass
class Remade:
    """One chunk made again: how many of its bytes the file has otherwise, how many at least differ from the base's, and
    the merge's own sums.
    """

    n_wrong: int
    n_different: int
    n_weights: int = 0
    sums: np.ndarray | None = None


def make_again(chunk: Chunk, model: Base, result: Base) -> Remade:
    """Carry out a chunk, and compare it with what the merged file holds."""
    tensor, name = chunk.tensor, chunk.tensor.target.name
    source, target = tensor.source, result.tensors[name]
    stored = scratch("stored", (chunk.n_rows, target.row_bytes), np.uint8)
    result.reader_of(name).read_into(target, chunk.first * target.row_bytes, stored)
    if isinstance(chunk, New):
        return Remade(_n_unequal(encoded(chunk), stored), stored.size)
    blocks = scratch("blocks", (chunk.n_rows, source.row_bytes), np.uint8)
    model.reader_of(source.name).read_into(source, chunk.first * source.row_bytes, blocks)
    if not isinstance(chunk, Changed):
        n_different = _n_unequal(blocks, stored)
        return Remade(n_different, n_different)
    n_different = int(not (_are_equal(blocks[:1], stored[:1]) and _are_equal(blocks, stored)))
    blocks, sums = merge_rows(chunk, blocks)
    return Remade(_n_unequal(blocks, stored), n_different, chunk.n_rows * source.n_cols, sums)


def _n_unequal(one: np.ndarray, other: np.ndarray) -> int:
    if _are_equal(one, other):
        return 0
    return int(np.count_nonzero(one != other)) if one.shape == other.shape else other.size


def _are_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays uint8, contiguous, are the same, looked at eight bytes at a time."""
    if one.shape != other.shape:
        return False
    n = one.size // 8 * 8
    pairs = [(array.reshape(-1)[:n].view(np.uint64), array.reshape(-1)[n:]) for array in (one, other)]
    return all(np.array_equal(first, second) for first, second in zip(*pairs, strict=True))
