"""Look at the tensors of a merged file: made again, chunk by chunk, or compared with what rounding may do to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lora_gguf.adapters.updates import Dora
from lora_gguf.checks.comparison import Compared, compare_rows, erased, off_share, present, too_noisy
from lora_gguf.checks.findings import Check
from lora_gguf.checks.remade import make_again
from lora_gguf.checks.routes import Rows, encoded_as, n_unexplained
from lora_gguf.errors import UnsupportedError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.merging.chunks import CHUNK_BYTES, RENEWED, Changed, Chunk, New, cut, update_of, whole
from lora_gguf.merging.importance import weigher
from lora_gguf.merging.plan import Plan
from lora_gguf.merging.tensor import NO_IMPORTANCE, TensorPlan
from lora_gguf.merging.work import encoded, in_threads
from lora_gguf.progress import Progress
from lora_gguf.quants.table import CODECS

INVISIBLE = 2.0**-24  # of the weights: half a unit in the last place of f32
SLICES = (1, 16, 64)  # rows that are looked at together: a row, a few, a head


@dataclass
class Inspected:
    """What a chunk of rows holds: how many bytes differ from the base's, how many blocks no way of rounding gives, and
    the comparison of its weights, where there was one to make.
    """

    n_different: int
    n_unexplained: int = 0
    found: Compared | None = None


def remade(plan: Plan, models: tuple[Base, Base], threads: int | None, progress: Progress | None) -> dict[str, Check]:
    """Make all tensors of a merge again; one check for each, in order. ``models`` are the base and the merged file."""
    model, result = models
    present = [tensor for tensor in plan.tensors if fits(tensor.target, result)]
    checks = {tensor.target.name: _check_of(tensor, result) for tensor in present}
    chunks = cut(map(whole, present), weigher(model))
    for chunk, made in in_threads(lambda chunk: make_again(chunk, model, result), chunks, threads):
        checks[chunk.tensor.target.name].add_made(made)
        if progress:
            progress(chunk.n_bytes, model.n_bytes, chunk.tensor.target.name)
    return checks


def compared(
    plan: Plan, models: tuple[Base, Base], imatrix: Imatrix | None, threads: int | None, progress: Progress | None
) -> dict[str, Check]:
    """Compare all tensors with what they should hold; as ``remade``."""
    model, result = models
    present = [tensor for tensor in plan.tensors if fits(tensor.target, result)]
    for tensor in present:
        for info in (tensor.source, result.tensors[tensor.target.name]):
            if info.type.name not in CODECS and (tensor.changes or info.type != tensor.source.type):
                raise UnsupportedError(f"{info.name}: type {info.type} cannot be read")
    checks = {tensor.target.name: _check_of(tensor, result) for tensor in present}
    for chunk, seen in in_threads(lambda chunk: inspect(chunk, models, imatrix), cut(map(whole, present)), threads):
        matrix = chunk.matrix if isinstance(chunk, Changed) else 0
        _add(checks[chunk.tensor.target.name], matrix, seen)
        if progress:
            progress(chunk.n_bytes, model.n_bytes, chunk.tensor.target.name)
    return checks


def fits(target: TensorInfo, result: Base) -> bool:
    """Tell whether the merged file has the tensor in this shape."""
    found = result.tensors.get(target.name)
    return found is not None and found.shape == target.shape


def _check_of(tensor: TensorPlan, result: Base) -> Check:
    name = tensor.target.name
    return Check(name, tensor.source.type.name, result.tensors[name].type.name, tensor.changes)


def _add(check: Check, matrix: int, seen: Inspected) -> None:
    check.n_different += seen.n_different
    check.n_unexplained += seen.n_unexplained
    if seen.found is None:
        return
    whole = seen.found.whole
    check.comparison += whole
    check.matrices[matrix] = check.matrices[matrix] + whole if matrix in check.matrices else whole
    bare = np.zeros(len(seen.found.rows), bool)
    for n_rows in SLICES:
        cells = seen.found.cells(n_rows)
        check.n_odd += int((off_share(cells, mixed=True) | too_noisy(cells, moved=True)).sum())
        without = erased(cells)
        check.n_erased += int(without.sum())
        bare |= np.repeat(without, n_rows)[: len(bare)]
    bare &= ~present(seen.found.rows)
    check.n_bare, check.n_rows = check.n_bare + int(bare.sum()), check.n_rows + len(bare)
    check.rest += replace(seen.found, rows=seen.found.rows[~bare]).whole if bare.any() else whole
    if bare.any():
        check.bare += replace(seen.found, rows=seen.found.rows[bare]).whole


def inspect(chunk: Chunk, models: tuple[Base, Base], imatrix: Imatrix | None) -> Inspected:
    """Compare a chunk of rows. Equal bytes of a tensor that no adapter touches need no comparison; of another type, all
    bytes count as different.
    """
    (model, result), name, source = models, chunk.tensor.target.name, chunk.tensor.source
    target = result.tensors[name]
    after = result.reader_of(name).read(target, chunk.first, chunk.n_rows)
    if isinstance(chunk, New):
        return _inspect_new(chunk, target, after)
    before = model.reader_of(source.name).read(source, chunk.first, chunk.n_rows)
    same_type = source.type == target.type
    n_different = int(np.count_nonzero(before != after)) if same_type else after.size
    changes = isinstance(chunk, Changed) and chunk.tensor.changes
    if not changes and (not n_different or source.type.name not in CODECS):
        return Inspected(n_different, n_different)
    importance = _importance(chunk, imatrix)
    seen = Inspected(n_different)
    update = update_of(chunk, before).copy() if isinstance(chunk, Changed) and changes else None
    if update is not None and not n_different and cancelled(update, before, source):
        update = None
    parts = []
    for rows in row_slices(chunk.n_rows, source.n_cols):
        delta = np.zeros((rows.stop - rows.start, source.n_cols), np.float32) if update is None else update[rows]
        part, unexplained = _judge(chunk, (before[rows], after[rows]), delta, result, importance)
        parts.append(part)
        seen.n_unexplained += unexplained
    seen.found = replace(parts[0], rows=np.concatenate([part.rows for part in parts]))
    return seen


def cancelled(update: np.ndarray, stored: np.ndarray, source: TensorInfo) -> bool:
    """Tell whether an update is no more than what sums in f32 leave of ones that cancel: nothing that a file shows."""
    codec = CODECS[source.type.name]
    return float(np.abs(update).max(initial=0)) <= INVISIBLE * float(np.abs(codec.decoded(stored)).max(initial=0))


def _judge(
    chunk: Chunk, stored: tuple[np.ndarray, np.ndarray], delta: np.ndarray, result: Base, importance: np.ndarray
) -> tuple[Compared, int]:
    codecs = CODECS[chunk.tensor.source.type.name], CODECS[result.tensors[chunk.tensor.target.name].type.name]
    weights = codecs[0].decoded(stored[0])
    fresh = encoded_as(codecs[1], weights + delta, importance)
    unexplained = n_unexplained(codecs[1], Rows(weights, delta, stored[1]), importance, fresh)
    scaled = any(isinstance(update, Dora) for update, _ in chunk.tensor.updates)
    return compare_rows(codecs, stored, delta, fresh, scaled=scaled), unexplained


def _inspect_new(chunk: New, target: TensorInfo, after: np.ndarray) -> Inspected:
    """``inspect`` for rows that the base lacks: they should be what the type's own quantizer makes of the adapter's."""
    wanted = encoded(replace(chunk, tensor=replace(chunk.tensor, target=target)))
    n_different, codec = int(np.count_nonzero(wanted != after)), CODECS[target.type.name]
    if not n_different:
        return Inspected(n_different)
    delta = np.zeros_like(chunk.rows)
    n_blocks = after.size // codec.type.block_bytes
    return Inspected(n_different, n_blocks, compare_rows((codec, codec), (wanted, after), delta, wanted))


def _importance(chunk: Chunk, imatrix: Imatrix | None) -> np.ndarray:
    """What the importance matrix says of the chunk's columns; nothing of the copied rows of several matrices."""
    measured = imatrix.of(chunk.tensor.source) if imatrix else None
    if measured is None or (len(measured) > 1 and not isinstance(chunk, Changed)):
        return NO_IMPORTANCE
    return np.ascontiguousarray(measured[chunk.matrix if isinstance(chunk, Changed) else 0])


def row_slices(n_rows: int, n_cols: int) -> list[slice]:
    """Cut ``n_rows`` into pieces of about a chunk's weights, larger ones where a merge copies the tensor."""
    n = max(1, CHUNK_BYTES // RENEWED // n_cols)
    return [slice(first, min(first + n, n_rows)) for first in range(0, n_rows, n)]
