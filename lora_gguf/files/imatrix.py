"""Importance matrices: E[x²] of each column's input, as llama.cpp's ``llama-imatrix`` measures it, in both its formats.

GGUF (``general.type`` is imatrix): for each tensor NAME two F32 tensors, ``NAME.in_sum2`` (matrices, cols), the sums of
squared inputs, and ``NAME.counts`` (matrices, 1), how many inputs were summed; a stack of experts has a row an expert.
Legacy .dat, little-endian: i32 number of entries; each i32 length and bytes of the name, i32 calls, i32 number of
values, f32 values (means times calls, the experts' one after the other); then i32 chunks, i32 length and bytes of the
dataset.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_gguf.errors import FileError, MalformedError, MismatchError, NumericError, printable
from lora_gguf.files.gguf_reader import MAGIC, MAX_NAME, GgufReader, TensorInfo
from lora_gguf.files.input_file import open_input

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """``importance`` maps a tensor's name to f32 (matrices, cols); in the legacy format a stack is one long row."""

    label: str
    importance: dict[str, np.ndarray]
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    paths: tuple[str | os.PathLike, ...] = ()

    def of(self, tensor: TensorInfo) -> np.ndarray | None:
        """Return the importance of the tensor's columns, (matrices, cols), or None where it was not measured.

        A matrix has one row; a stack (E, out, in) has E. Raises ``MismatchError`` where the sizes differ.
        """
        found = self.importance.get(tensor.name)
        if found is None:
            return None
        shape = (int(np.prod(tensor.shape[:-2])), tensor.n_cols)
        if found.size == shape[0] * shape[1] and (len(found) == 1 or found.shape == shape):
            return found.reshape(shape)
        raise MismatchError(
            f"{self.label}: {tensor.name}: expected {shape[0]} x {shape[1]} values, found "
            f"{' x '.join(map(str, found.shape))}: "
            "is it the importance matrix of another model? --imatrix none merges without one"
        )

    def check(self, tensors: Iterable[TensorInfo]) -> None:
        """Raise ``MismatchError`` where it is not of the model with these ``tensors``."""
        measured = [tensor for tensor in tensors if self.of(tensor) is not None]
        if not measured:
            raise MismatchError(
                f"{self.label}: none of its {len(self.importance)} entries is a tensor of the base: is it the "
                "importance matrix of another model? --imatrix none merges without one"
            )


def read_imatrix(path: str | os.PathLike) -> Imatrix:
    """Return the importance matrix at ``path``, in either format.

    What was never used (a count of zero, as an expert that no input reached) has importance 1. Raises
    ``MalformedError``, ``NumericError`` for values that are not finite or negative, or ``FileError``.
    """
    try:
        with os.fdopen(open_input(path), "rb") as file:
            magic = file.read(len(MAGIC))
            imatrix = None if magic == MAGIC else _read_legacy(_Legacy(file, printable(os.path.basename(path))))
    except OSError as error:
        raise FileError(f"{printable(path)}: cannot read: {error.strerror}: check the path") from error
    if imatrix is None:
        with GgufReader(path) as reader:
            imatrix = _read_gguf(reader)
    if not imatrix.importance:
        raise MalformedError(f"{imatrix.label}: expected an importance matrix, found no entry: measure it again")
    return replace(imatrix, paths=(path,))


def _checked(label: str, name: str, values: np.ndarray) -> np.ndarray:
    if not (np.isfinite(values).all() and values.min(initial=0) >= 0):
        raise NumericError(
            f"{label}: {name}: expected importances of zero or more, found NaN, infinity or less: measure again"
        )
    return values


def _read_gguf(reader: GgufReader) -> Imatrix:
    if reader.get("general.type") != "imatrix":
        found = printable(reader.get("general.type", "none"), 40)
        raise MalformedError(
            f"{reader.label}: general.type: expected imatrix, found {found}: name a file of llama-imatrix"
        )
    importance = {}
    for name in reader.tensors:
        if name.endswith(SUMS):
            entry = name.removesuffix(SUMS)
            sums, counts = _floats(reader, name), _floats(reader, entry + COUNTS)
            if counts.shape != (len(sums), 1):
                raise MalformedError(
                    f"{reader.label}: {entry}{COUNTS}: expected {(len(sums), 1)}, found {counts.shape}: the "
                    "file is damaged"
                )
            counts = _checked(reader.label, entry + COUNTS, counts)
            with np.errstate(all="ignore"):
                means = np.where(counts > 0, sums / counts, np.float32(1))
            importance[entry] = _checked(reader.label, entry, means)
    datasets, n_chunks = reader.get("imatrix.datasets", []), reader.get("imatrix.chunk_count", 0)
    datasets = tuple(map(str, datasets)) if isinstance(datasets, list) else ()
    return Imatrix(reader.label, importance, datasets, n_chunks if isinstance(n_chunks, int) else 0)


def _floats(reader: GgufReader, name: str) -> np.ndarray:
    """An F32 tensor as a matrix."""
    info = reader.tensors.get(name)
    if info is None or info.type.name != "F32" or not info.n_elements:
        found = "nothing" if info is None else f"{info.type} {info.shape}"
        raise MalformedError(f"{reader.label}: {name}: expected F32 values, found {found}: the file is damaged")
    return reader.read(info).view("<f4").astype(np.float32, copy=False)


class _Legacy:
    """The legacy file from its start on; no number in it is believed beyond the file's end."""

    def __init__(self, file: Any, label: str) -> None:
        self.file, self.label = file, label
        self.left = os.fstat(file.fileno()).st_size
        file.seek(0)

    def error(self, what: str) -> MalformedError:
        return MalformedError(f"{self.label}: {what}: not an importance matrix, or a damaged one")

    def take(self, n_bytes: int, what: str) -> bytes:
        if not 0 <= n_bytes <= self.left:
            raise self.error(f"{what}: expected {n_bytes} bytes, {self.left} are left")
        raw = self.file.read(n_bytes)
        self.left -= n_bytes
        if len(raw) != n_bytes:
            raise self.error(f"{what}: the file ends early")
        return raw

    def number(self, what: str) -> int:
        return struct.unpack("<i", self.take(4, what))[0]

    def text(self, what: str, limit: int) -> str:
        length = self.number(f"length of {what}")
        if length > limit:
            raise self.error(f"{what}: {length} bytes long")
        return self.take(length, what).decode("utf-8", "surrogateescape")


def _read_legacy(file: _Legacy) -> Imatrix:
    importance = {}
    for i in range(_positive(file, file.number("number of entries"), "number of entries")):
        name = file.text(f"name of entry {i}", MAX_NAME)
        label = printable(name)
        n_calls, n_values = file.number(f"{label}: calls"), file.number(f"{label}: number of values")
        raw = file.take(4 * _positive(file, n_values, f"{label}: number of values"), label)
        values = np.frombuffer(raw, "<f4").astype(np.float32).reshape(1, -1)
        importance[name] = _checked(file.label, label, values) / np.float32(max(n_calls, 1))
    n_chunks = file.number("number of chunks") if file.left else 0
    datasets = (file.text("dataset", file.left),) if file.left else ()
    return Imatrix(file.label, importance, datasets, n_chunks)


def _positive(file: _Legacy, number: int, what: str) -> int:
    if number < 1:
        raise file.error(f"{what}: expected at least 1, found {number}")
    return number
