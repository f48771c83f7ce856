"""Arrays that stay in their file until their turn comes, and what is to be made of them then.

A ``LazyArray`` goes wherever numpy takes an array, which reads it. What an adapter's factors go through on their way to
the base's layout (parts, gathers, other shapes, products with vectors) is put off instead, and gives the same numbers
later: the whole array, or only some rows of it where they do not depend on the others. It holds no data: a pickled one
is a place in a file and what is done with it, and reads that file in another process, or refuses it if it has changed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from lora_gguf.errors import IntegrityError
from lora_gguf.files.input_file import FileState, InputFile
from lora_gguf.files.tensor_file import DTYPES

FILES = 16  # that a process holds open
AT_ONCE = 1 << 20  # a file of at most so many bytes is read at once
VECTOR_BYTES = 1 << 20  # and so is a vector
LARGE = 1 << 16  # from so many bytes on a kernel is worth its loading
BLOCK_BYTES = 8 << 20  # that are looked at, at a time


@dataclass(frozen=True, eq=False)
class LazyArray:
    """An array of ``shape`` and ``dtype`` that is not there yet; the base of the others."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def values(self) -> np.ndarray:
        """Return the array."""
        raise NotImplementedError

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        """Return what is at ``index`` of the first axis."""
        return self.values()[index]

    @property
    def by_row(self) -> bool:
        """Whether ``rows`` reads no more than it needs."""
        return False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> Any:
        return self.transpose(*reversed(range(self.ndim)))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values(), dtype)

    def __getitem__(self, key: Any) -> Any:
        keys = full_key(key, self.ndim)
        first, others = keys[0], keys[1:]
        alone = all(is_all(other) for other in others)
        if isinstance(first, int):
            place = range(len(self))[first]
            row = Made.of(operator.getitem, (Rows.of(self, slice(place, place + 1)), 0), self.shape[1:], self.dtype)
            return row if alone else row[others]
        if alone and isinstance(first, slice | np.ndarray):
            return self if is_all(first) else Rows.of(self, first)
        return Made.of(operator.getitem, (self, keys), shape_at(self.shape, keys), self.dtype, is_all(first))

    def reshape(self, *shape: Any) -> Any:
        wanted = known_shape(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape, self.size)
        return self if wanted == self.shape else Made.of(np.reshape, (self, wanted), wanted, self.dtype)

    def ravel(self) -> Any:
        return self.reshape(-1)

    def transpose(self, *axes: int) -> Any:
        shape = tuple(self.shape[axis] for axis in axes)
        return Made.of(np.transpose, (self, axes), shape, self.dtype, axes[:1] == (0,))

    def swapaxes(self, one: int, other: int) -> Any:
        axes = list(range(self.ndim))
        axes[one], axes[other] = axes[other], axes[one]
        return self.transpose(*axes)

    def astype(self, dtype: DTypeLike) -> Any:
        dtype = np.dtype(dtype)
        return self if dtype == self.dtype else Made.of(_as_type, (self, dtype), self.shape, dtype, True)

    def __mul__(self, other: Any) -> Any:
        shape = np.broadcast_shapes(self.shape, np.shape(other))
        return Made.of(
            np.multiply,
            (self, other),
            shape,
            np.result_type(self.dtype, getattr(other, "dtype", other)),
            shape == self.shape,
        )

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return np.asarray(self) + other

    def __sub__(self, other: Any) -> Any:
        return np.asarray(self) - other

    def __matmul__(self, other: Any) -> Any:
        return np.asarray(self) @ other

    def any(self, axis: int | None = None) -> Any:
        return np.asarray(self).any(axis)


def _as_type(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype == np.float16 and dtype == np.float32 and array.nbytes >= LARGE:
        from lora_gguf.quants.floats import decode_f16  # three times as fast as numpy

        wide = np.empty(array.shape, np.float32)
        decode_f16(array.reshape(1, -1).view(np.uint8), wide.reshape(1, -1))
        return wide
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


@dataclass(frozen=True, eq=False)
class Stored(LazyArray):
    """An array as it lies in a file, from ``position`` on, in ``kind``, which is one of ``DTYPES``."""

    state: FileState
    position: int
    kind: str

    @classmethod
    def at(cls, file: InputFile, position: int, kind: str, shape: Sequence[int]) -> Any:
        """Return the array at ``position``, read where it is small; the caller has checked its bytes against the file's
        size.
        """
        stored = DTYPES[kind]
        dtype = np.dtype(np.float32) if stored.widen else stored.stored
        found = cls(tuple(shape), dtype, file.state, position, kind)
        is_small = file.size <= AT_ONCE or (len(shape) < 2 and found.nbytes <= VECTOR_BYTES)
        return found.read_from(file) if is_small or not found.size else found

    @property
    def by_row(self) -> bool:
        return True

    def values(self) -> np.ndarray:
        return self.read_from(_opened(self.state))

    def read_from(self, file: InputFile) -> np.ndarray:
        """Return the array, out of its file that is open. Raises ``IntegrityError`` where that changes meanwhile."""
        stored = DTYPES[self.kind]
        if self.nbytes > BLOCK_BYTES and self.dtype != stored.stored and len(self) > 1:
            wide, n = np.empty(self.shape, self.dtype), max(1, BLOCK_BYTES * len(self) // self.nbytes)
            for first in range(0, len(self), n):
                wide[first : first + n] = self[first : first + n].read_from(file)
            return wide
        array = file.read_array(self.position, stored.stored, self.shape)
        file.check_unchanged()
        return _as_type(stored.widen(array) if stored.widen else array, self.dtype)

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            return np.asarray(self[index])
        if not len(index):
            return self[:0].values()
        first, end = int(index.min()), int(index.max()) + 1
        if end - first <= 4 * len(index):
            return self[first:end].values()[index - first]
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
        return np.concatenate([self[int(run[0]) : int(run[-1]) + 1].values() for run in runs])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and 0 <= key < self.shape[0]:
            return self[key : key + 1].reshape(self.shape[1:])
        if isinstance(key, slice) and key.step in (None, 1):
            first, end, _ = key.indices(self.shape[0])
            row = math.prod(self.shape[1:]) * DTYPES[self.kind].stored.itemsize
            return replace(self, shape=(max(0, end - first), *self.shape[1:]), position=self.position + first * row)
        return super().__getitem__(key)

    def reshape(self, *shape: Any) -> Any:
        wanted = known_shape(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape, self.size)
        return replace(self, shape=wanted)

    def astype(self, dtype: DTypeLike) -> Any:
        return replace(self, dtype=np.dtype(dtype))


@lru_cache(maxsize=FILES)
def _opened(state: FileState) -> InputFile:
    """Return the file, opened once. Raises ``IntegrityError`` where it is no longer what it was."""
    file = InputFile(state.path)
    if file.state != state:
        raise IntegrityError(f"{file.label}: changed after the merge was planned: run again when nothing writes to it")
    return file


def close_files() -> None:
    """Close the files that arrays were read from and that nobody is reading."""
    _opened.cache_clear()


@dataclass(frozen=True, eq=False)
class Rows(LazyArray):
    """Some of the first axis of another array."""

    source: LazyArray
    index: np.ndarray

    @classmethod
    def of(cls, source: LazyArray, index: slice | np.ndarray) -> Rows:
        """Return the rows at ``index``, which may be a mask."""
        chosen = np.arange(len(source))[index]
        return cls((len(chosen), *source.shape[1:]), source.dtype, source, chosen)

    @property
    def by_row(self) -> bool:
        return self.source.by_row

    def values(self) -> np.ndarray:
        return self.source.rows(self.index)

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        return self.source.rows(self.index[index])


@dataclass(frozen=True, eq=False)
class Made(LazyArray):
    """What ``function`` makes of ``parts``, of which some are arrays that are not there yet.

    Where it is ``row_wise``, each row comes of the same rows of the parts.
    """

    function: Callable[..., np.ndarray]
    parts: tuple[Any, ...]
    row_wise: bool = False

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        parts: tuple[Any, ...],
        shape: Sequence[int],
        dtype: Any,
        row_wise: bool = False,
    ) -> Any:
        """Return the array that will be made."""
        return cls(tuple(shape), np.dtype(dtype), function, parts, row_wise)

    @property
    def by_row(self) -> bool:
        return self.row_wise and all(part.by_row for part in self.parts if isinstance(part, LazyArray))

    def values(self) -> np.ndarray:
        return self.function(*(part.values() if isinstance(part, LazyArray) else part for part in self.parts))

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        return self.function(*(self._part(part, index) for part in self.parts)) if self.by_row else self.values()[index]

    def _part(self, part: Any, index: slice | np.ndarray) -> Any:
        if isinstance(part, LazyArray):
            return part.rows(index)
        same_rows = isinstance(part, np.ndarray) and part.ndim == self.ndim and len(part) == len(self)
        return part[index] if same_rows else part


@dataclass(frozen=True, eq=False)
class Stack(LazyArray):
    """Matrices one after the other, each with zeros up to the size of the largest; None is all zeros."""

    matrices: tuple[Any, ...]

    @property
    def by_row(self) -> bool:
        return True

    def values(self) -> np.ndarray:
        return self.rows(slice(None))

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        out = np.zeros((len(chosen), *self.shape[1:]), self.dtype)
        for place, i in zip(out, chosen, strict=True):
            if (matrix := self.matrices[i]) is not None:
                place[: matrix.shape[0], : matrix.shape[1]] = matrix
        return out


def stack(matrices: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """Return ``matrices`` as one array f32 of ``shape``, at once where all of them are there."""
    found = Stack(shape, np.dtype(np.float32), tuple(matrices))
    return found if any(isinstance(matrix, LazyArray) for matrix in matrices) else found.values()


def is_all(key: Any) -> bool:
    """Return whether a key of one axis leaves it as it is."""
    return isinstance(key, slice) and key == slice(None)


def full_key(key: Any, ndim: int) -> tuple[Any, ...]:
    """Return ``key`` with an entry for each axis, ``...`` written out."""
    keys = key if isinstance(key, tuple) else (key,)
    n_axes = sum(entry is not None and entry is not Ellipsis for entry in keys)
    at = next((i for i, entry in enumerate(keys) if entry is Ellipsis), len(keys))
    return (*keys[:at], *[slice(None)] * (ndim - n_axes), *keys[at + 1 :])


def shape_at(shape: tuple[int, ...], keys: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the shape of an array of ``shape`` at ``keys``, at most one of which is an array."""
    found, axes = list[int](), iter(shape)
    for key in keys:
        if key is None:
            found.append(1)
        elif isinstance(key, int):
            next(axes)
        elif isinstance(key, slice):
            found.append(len(range(*key.indices(next(axes)))))
        else:
            found.append(len(np.arange(next(axes))[key]))
    return tuple(found)


def known_shape(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Return ``shape`` with what -1 stands for."""
    known = math.prod(n for n in shape if n >= 0)
    found = tuple(n if n >= 0 else size // max(known, 1) for n in shape)
    if math.prod(found) != size:
        raise ValueError(f"cannot reshape array of size {size} into shape {tuple(shape)}")
    return found


def made(function: Callable[..., Any], parts: tuple[Any, ...], shape: Sequence[int], row_wise: bool = False) -> Any:
    """Return ``function(*parts)``, f32 of ``shape``: at once where all parts are there, else when it is asked for."""
    if not any(isinstance(part, LazyArray) for part in parts):
        return function(*parts)
    return Made.of(function, parts, shape, np.float32, row_wise)


def contiguous(array: Any) -> Any:
    """Return ``array`` as C has it in memory."""
    if not isinstance(array, LazyArray):
        return np.ascontiguousarray(array)
    return (
        array if isinstance(array, Stored) else Made.of(np.ascontiguousarray, (array,), array.shape, array.dtype, True)
    )


def gathered(array: Any, index: np.ndarray | None, axis: int = 0) -> Any:
    """Return what is at ``index`` of an axis; all of it for None, and None of None."""
    if array is None or index is None:
        return array
    if not isinstance(array, LazyArray):
        return np.take(array, index, axis)
    return array[index] if axis == 0 else array[(slice(None),) * axis + (index,)]


def at_hand(array: Any, n_bytes: int = 0) -> Any:
    """Return an array that is there, unless it has more than ``n_bytes`` and some rows of it can be read alone."""
    stays = not isinstance(array, LazyArray) or (array.by_row and array.nbytes > n_bytes)
    return array if stays else np.asarray(array)


def as_stored(array: Any) -> Any:
    """Return an array of f16 in a file as such, not widened: finite where it is finite in f32. Others as they are."""
    return array.astype(np.float16) if isinstance(array, Stored) and array.kind == "F16" else array


def blocks_of(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, rows) of an array: all of them, or some at a time where it is large and can be read so."""
    if not isinstance(array, LazyArray) or not array.by_row or array.nbytes <= BLOCK_BYTES:
        yield 0, np.asarray(array)
        return
    n = max(1, BLOCK_BYTES * len(array) // array.nbytes)
    for first in range(0, len(array), n):
        yield first, array.rows(slice(first, first + n))
