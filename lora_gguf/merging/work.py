"""Many chunks in threads: each is read, merged and written by one thread on its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from lora_gguf.errors import NumericError, UsageError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufPlaces
from lora_gguf.merging.chunks import Changed, Chunk, New, Range, Weigh, cut, n_cores, weights_within
from lora_gguf.merging.limits import check_address_space
from lora_gguf.merging.options import Resources
from lora_gguf.merging.rows import merge_rows
from lora_gguf.merging.scratch import scratch
from lora_gguf.merging.tensor import NO_IMPORTANCE
from lora_gguf.quants.table import CODECS

AHEAD = 4  # chunks a thread that are in work or done before their results are taken

Item = TypeVar("Item")
Result = TypeVar("Result")


class Done(NamedTuple):
    """What a chunk of the tensor ``name`` was: the bytes of the base that it read, and how many weights were merged,
    with their sums (4,), or none.
    """

    name: str
    n_bytes: int
    n_weights: int = 0
    sums: np.ndarray | None = None


def merge_ranges(
    ranges: Iterable[Range], base: Base, writer: GgufPlaces, weigh: Weigh, resources: Resources
) -> Iterator[Done]:
    """Read, merge and write ``ranges``, and yield what was done, chunk by chunk in order."""

    def work(chunk: Chunk) -> np.ndarray | None:
        return merge_chunk(chunk, base.reader_of(chunk.tensor.source.name), writer)

    ranges = list(ranges)
    n_weights = weights_within(resources.memory, resources.threads, [part.tensor for part in ranges])
    chunks = cut(ranges, weigh, n_weights)
    for chunk, sums in in_threads(work, chunks, resources.threads):
        merges = sums is not None and chunk.tensor.changes
        n_weights = chunk.n_rows * chunk.tensor.source.n_cols if merges else 0
        yield Done(chunk.tensor.target.name, chunk.n_bytes, n_weights, sums if merges else None)


def merge_chunk(chunk: Chunk, reader: GgufReader, writer: GgufPlaces) -> np.ndarray | None:
    """Read a chunk, merge it, write it; the sums of its rows (4,), None where it was copied or is new."""
    target, sums = writer.tensors[chunk.tensor.target.name], None
    if isinstance(chunk, Changed):
        blocks, sums = merged(chunk, reader)
    elif isinstance(chunk, New):
        blocks = encoded(chunk)
    else:
        info = chunk.tensor.source
        writer.copy(target, reader, info, chunk.first * info.row_bytes, chunk.n_bytes)
        return None
    writer.write(target, chunk.first * target.row_bytes, blocks)
    return sums


def merged(chunk: Changed, reader: GgufReader) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a chunk as merged, uint8 (rows, row_bytes), and their sums (4,).

    Raises ``NumericError`` where a scale of the base is broken, or the result is not finite.
    """
    info = chunk.tensor.source
    blocks = scratch("blocks", (chunk.n_rows, info.row_bytes), np.uint8)
    reader.read_into(info, chunk.first * info.row_bytes, blocks)
    broken = chunk.recipe.source.broken(blocks.reshape(-1, info.type.block_bytes))
    if broken.any():
        row = chunk.first + int(broken.argmax()) // (len(broken) // chunk.n_rows)
        raise NumericError(f"{reader.label}: {info.name}: row {row}: a scale is NaN or infinity: the base is damaged")
    blocks, sums = merge_rows(chunk, blocks)
    if not np.isfinite(sums).all():
        raise NumericError(
            f"{reader.label}: {info.name}: rows {chunk.first} to {chunk.first + chunk.n_rows - 1}: NaN, infinity or "
            f"overflow in the merged {chunk.tensor.target.type}: check the base, lower the scale, or choose --type "
            "Q8_0 or BF16"
        )
    return blocks, sums


def encoded(chunk: New) -> np.ndarray:
    """Return the new rows of a chunk as stored in the tensor's type: uint8 (rows, row_bytes)."""
    recipe = chunk.tensor.recipe
    importance = recipe.importance_of(0) if recipe else NO_IMPORTANCE
    return CODECS[chunk.tensor.target.type.name].encoded(chunk.rows, importance)


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], n_threads: int | None
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, work(item)) for each of ``items``, in order, done by ``n_threads`` threads, by default all cores."""
    n_threads = n_cores() if n_threads is None else n_threads
    if n_threads < 1:
        raise UsageError(f"threads: expected at least 1, found {n_threads}")
    check_address_space(n_threads)
    ahead: deque[tuple[Item, Future[Result]]] = deque()
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
