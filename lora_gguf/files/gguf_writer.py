"""Write a GGUF v3 file: header first, then rows at their place, in any order and from any thread."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_gguf.errors import UsageError
from lora_gguf.files.gguf_reader import ARRAY, DEFAULT_ALIGNMENT, SCALARS, STRING, GgufReader, TensorInfo, padded
from lora_gguf.files.input_file import InputFile
from lora_gguf.files.output import OpenOutput, OutputFile, check_space
from lora_gguf.quants.ggml import GgmlType

VERSION = 3
TYPE_IDS = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "str": 8,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any, type_id: int) -> bytes:
    return _string(value) if type_id == STRING else struct.pack("<" + SCALARS[type_id], value)


def key_value(key: str, value: object, type_name: str) -> bytes:
    """Return one key/value pair as it stands in a file; a list or tuple becomes an array of ``type_name``."""
    type_id = TYPE_IDS[type_name]
    if isinstance(value, (list, tuple)):
        head = struct.pack("<IIQ", ARRAY, type_id, len(value))
        return _string(key) + head + b"".join(_value(item, type_id) for item in value)
    return _string(key) + struct.pack("<I", type_id) + _value(value, type_id)


def raw_key_values(reader: GgufReader, skip: Iterable[str] = ()) -> list[bytes]:
    """Return the key/value pairs of an open file, each as its raw bytes, in order, without the keys in ``skip``."""
    skipped = set(skip)
    return [reader.source.read(kv.start, kv.end - kv.start) for kv in reader.kv.values() if kv.key not in skipped]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: ``shape`` in numpy order."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]


def layout(tensors: Iterable[TensorSpec | TensorInfo], alignment: int) -> list[TensorInfo]:
    """Return the tensors with their offsets: each starts at a multiple of ``alignment``, without gaps."""
    placed, offset = [], 0
    for tensor in tensors:
        placed.append(TensorInfo(tensor.name, tensor.type, tuple(tensor.shape), offset))
        offset += padded(placed[-1].n_bytes, alignment)
    return placed


def _tensor_info(tensor: TensorInfo) -> bytes:
    dims = tuple(reversed(tensor.shape))
    return _string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type.id, tensor.offset)


def header(key_values: Sequence[bytes], tensors: Sequence[TensorInfo], alignment: int) -> bytes:
    """Return the bytes of a file up to its data, padded to ``alignment``."""
    raw = b"".join(
        [
            struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(key_values)),
            *key_values,
            *map(_tensor_info, tensors),
        ]
    )
    return raw.ljust(padded(len(raw), alignment), b"\0")


def planned(
    key_values: Sequence[bytes], tensors: Iterable[TensorSpec | TensorInfo], alignment: int
) -> tuple[list[TensorInfo], bytes, int]:
    """Return the tensors of a file in their places, its bytes up to its data, and its size."""
    placed = layout(tensors, alignment)
    head = header(key_values, placed, alignment)
    return placed, head, len(head) + (placed[-1].offset + padded(placed[-1].n_bytes, alignment) if placed else 0)


def is_written(
    path: str | os.PathLike, key_values: Sequence[bytes], tensors: Iterable[TensorInfo], alignment: int
) -> bool:
    """Return whether a file is there with this metadata, these tensors and so all of their bytes: files come whole."""
    _, head, size = planned(key_values, tensors, alignment)
    if not os.path.isfile(path):
        return False
    with InputFile(path) as file:
        return file.size == size and file.read(0, len(head)) == head


class GgufPlaces:
    """Where the tensors of a GGUF file under way lie in its ``output``: ``tensors`` maps each name to its place after
    ``data_position``.
    """

    def __init__(self, output: OpenOutput, data_position: int, tensors: dict[str, TensorInfo]) -> None:
        self.output, self.data_position, self.tensors = output, data_position, tensors

    def write(self, tensor: TensorInfo, offset: int, buffer: Any) -> None:
        """Write ``buffer`` (contiguous bytes) at ``offset`` bytes into the tensor. Callable from several threads."""
        self.output.write_at(self.data_position + tensor.offset + offset, buffer)

    def copy(
        self, tensor: TensorInfo, reader: GgufReader, source: TensorInfo, offset: int = 0, n_bytes: int | None = None
    ) -> None:
        """Copy a tensor, or ``n_bytes`` of it from ``offset`` on, from an open file as it is."""
        n_bytes = source.n_bytes - offset if n_bytes is None else n_bytes
        self.output.copy_at(
            self.data_position + tensor.offset + offset,
            reader.fd,
            reader.data_position + source.offset + offset,
            n_bytes,
        )


class GgufWriter(GgufPlaces):
    """A GGUF file under way. A context manager: left without ``commit``, nothing remains of it.

    ``key_values`` are raw pairs (``raw_key_values``, ``key_value``); ``alignment`` must be what they say, if they say.
    ``tensors`` maps each name to its place. Raises ``FileError`` before anything is written where the path would lose
    something or the disk has no room.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        key_values: Sequence[bytes],
        tensors: Iterable[TensorSpec | TensorInfo],
        alignment: int = DEFAULT_ALIGNMENT,
        *,
        force: bool = False,
        inputs: Iterable[os.PathLike | str] = (),
    ) -> None:
        placed, self._header, self.size = planned(key_values, tensors, alignment)
        by_name = {tensor.name: tensor for tensor in placed}
        if len(by_name) != len(placed):
            raise UsageError(f"{path}: two tensors have one name")
        self.output: OutputFile = OutputFile(path, force=force, inputs=inputs)
        super().__init__(self.output, len(self._header), by_name)
        check_space(self.output.target, self.size)

    def __enter__(self) -> GgufWriter:
        self.output.__enter__()
        try:
            self.output.resize(self.size)
            self.output.write_at(0, self._header)
        except BaseException:
            self.output.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.output.__exit__(*exc)

    def sync(self) -> None:
        """Make the file durable, but do not put it in place yet."""
        self.output.sync()

    def commit(self) -> None:
        """Make the file durable and put it in place."""
        self.output.commit()
