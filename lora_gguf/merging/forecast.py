"""What a merge would keep of an adapter, and how long it would take: the merge itself, carried out on a sample of rows.

Some rows of each tensor go through ``work.merged``, the code that a merge runs, and what it would have written is
thrown away. Their sums, scaled to the whole tensor, are those that the merge would report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lora_gguf.files.base import Base, evenly
from lora_gguf.files.lazy_array import blocks_of
from lora_gguf.merging.chunks import (
    CHUNK_BYTES,
    COPY_BYTES,
    Changed,
    Weigh,
    chunks_of,
    cut,
    n_cores,
    whole,
)
from lora_gguf.merging.retention import Retention, kind_of
from lora_gguf.merging.steps import has_steps, rms, step_rms
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.merging.work import in_threads, merged

SAMPLE_WEIGHTS = 8 << 20  # of all tensors together
MIN_ROWS, MAX_ROWS = 16, 64  # of one tensor
N_PLACES = 8
N_FAR = 3  # layers of a kind that a sample takes of a base on the Hub, where each place costs a request
STARTUP_SECONDS = 1.0  # loading the compiled kernels, reading the headers
STEADY_BYTES = 160 << 20  # the interpreter, numpy, the compiled kernels


def thinned(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Return, of each kind of tensor, those of ``N_FAR`` layers, evenly spaced."""
    groups: dict[tuple[str, str], list[TensorPlan]] = {}
    for tensor in tensors:
        groups.setdefault((kind_of(tensor.target.name), tensor.source.type.name), []).append(tensor)
    return [group[i] for group in groups.values() for i in evenly(len(group), N_FAR)]


def expected(
    base: Base,
    tensors: Sequence[TensorPlan],
    weigh: Weigh | None = None,
    threads: int | None = None,
    near: bool = True,
    done: Callable[[TensorPlan], None] | None = None,
) -> dict[str, Retention]:
    """Return what merging ``tensors`` as planned would report of each, by name, from up to ``MAX_ROWS`` rows of each.

    ``weigh`` is that of ``cut``. Where the base is not ``near``, the rows are from one place. ``done`` is called with
    each tensor when its first rows are done. Raises ``NumericError`` as the merge would.
    """
    n_rows, n_places = rows_each(tensors), N_PLACES if near else 1
    found: dict[str, Retention] = {}

    def work(chunk: Changed) -> np.ndarray:
        return merged(chunk, base.reader_of(chunk.tensor.source.name))[1]

    chunks = (chunk for tensor in tensors for chunk in some_chunks(tensor, n_rows, n_places, weigh))
    for chunk, sums in in_threads(work, chunks, threads):
        name = chunk.tensor.target.name
        if done and name not in found:
            done(chunk.tensor)
        found.setdefault(name, Retention()).add(chunk.n_rows * chunk.tensor.source.n_cols, sums)
    return {tensor.target.name: scaled(found[tensor.target.name], tensor) for tensor in tensors}


def rows_each(tensors: Sequence[TensorPlan]) -> int:
    """Tell how many rows of each tensor the sample takes."""
    n_cols = sum(tensor.source.n_cols for tensor in tensors)
    return min(max(SAMPLE_WEIGHTS // max(n_cols, 1), MIN_ROWS), MAX_ROWS)


def some_chunks(tensor: TensorPlan, n_rows: int, n_places: int, weigh: Weigh | None = None) -> Iterable[Changed]:
    """Return about ``n_rows`` rows of a tensor as chunks, evenly spaced over those that change and over its experts."""
    n_out = (1, *tensor.source.shape)[-2]
    rows = changing_rows(tensor)
    n_places = min(n_places, len(rows))
    n_run = min(max(1, n_rows // n_places), n_out)
    places = rows[((np.arange(n_places) + 0.5) / n_places * len(rows)).astype(int)]
    starts = {(int(place) // n_out, min(int(place) % n_out, n_out - n_run)) for place in places}
    return chunks_of(tensor, ((matrix * n_out + row, n_run) for matrix, row in sorted(starts)), weigh)


def changing_rows(tensor: TensorPlan) -> np.ndarray:
    """Return the rows that the adapters change; all of them where they change none."""
    n_rows = tensor.source.n_rows
    changes = np.zeros(n_rows, bool)
    for pair in tensor.pairs:
        for first, block in blocks_of(pair.b.reshape(n_rows, -1)):
            changes[first : first + len(block)] |= block.any(axis=1)
    for update, _ in tensor.updates:
        changes |= update.touches(0, n_rows)
    return np.flatnonzero(changes) if changes.any() else np.arange(n_rows)


def scales_of(base: Base, tensor: TensorPlan, near: bool = True) -> tuple[float | None, float]:
    """Return from the sampled rows the rms distance between two values that the tensor's type can tell apart, None
    where it has no such steps, and the rms of the weights.
    """
    info, quant = tensor.source, tensor.wanted.source
    reader = base.reader_of(info.name)
    chunks = some_chunks(tensor, MIN_ROWS, N_PLACES if near else 1)
    blocks = np.concatenate([reader.read(info, chunk.first, chunk.n_rows) for chunk in chunks])
    step = step_rms(quant, blocks) if has_steps(quant) else 0.0
    return step if step > 0 else None, rms(quant.decoded(blocks))


def scaled(part: Retention, tensor: TensorPlan) -> Retention:
    """Return the sums of a sample of the rows that change as if it were of the whole tensor."""
    n_weights = len(changing_rows(tensor)) * tensor.source.n_cols
    return Retention(tensor.source.n_elements, part.sums * (n_weights / max(part.n_weights, 1)))


def expected_seconds(
    base: Base, tensors: Sequence[TensorPlan], weigh: Weigh | None = None, threads: int | None = None
) -> float:
    """Return how long a merge of ``tensors`` takes: a chunk of each recipe is timed, and one that is copied.

    The disk's speed in writing is not in it.
    """
    rates: dict[tuple[object, ...], float] = {}
    total = 0.0
    for tensor in tensors:
        key = recipe_key(tensor)
        if key not in rates:
            rates[key] = seconds_a_byte(base, tensor, weigh)
        total += rates[key] * tensor.source.n_bytes
    return STARTUP_SECONDS + total / min(threads or n_cores(), n_cores())


def recipe_key(tensor: TensorPlan) -> tuple[object, ...]:
    """Tell what the speed of a tensor's chunks depends on."""
    if tensor.recipe is None:
        return ()
    updates = tuple(type(update).__name__ for update, _ in tensor.updates)
    rank = sum(pair.rank for pair in tensor.pairs)
    return (
        tensor.source.type.name,
        tensor.target.type.name,
        tensor.recipe.rounding,
        tensor.source.n_cols,
        rank,
        updates,
    )


def seconds_a_byte(base: Base, tensor: TensorPlan, weigh: Weigh | None = None) -> float:
    """Return the time that a byte of the tensor takes one thread, after a first run that warms caches up."""
    reader = base.reader_of(tensor.source.name)
    if tensor.recipe is None:
        n_bytes = min(tensor.source.n_bytes, COPY_BYTES)
        buffer = np.empty(n_bytes, np.uint8)
        return timed(lambda: reader.read_into(tensor.source, 0, buffer)) / max(n_bytes, 1)
    chunk = next(chunk for chunk in cut([whole(tensor)], weigh) if isinstance(chunk, Changed))
    return timed(lambda: merged(chunk, reader)) / max(chunk.n_bytes, 1)


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that ``call`` takes, the better of two runs after a first."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def scratch_bytes(threads: int | None = None) -> int:
    """Estimate how many bytes the threads of a merge hold at once."""
    return (threads or n_cores()) * CHUNK_BYTES
