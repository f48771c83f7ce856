"""Read a GGUF file: header, raw key/value spans, tensor table; rows by ``pread``.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the limits are those of libggml's
own reader: what it refuses, we refuse. Nothing is allocated by a number in the file before it is checked against the
file's size, and the data is never mapped: a file that shrinks under us gives an error, not a SIGBUS.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_gguf.errors import MalformedError, UnsupportedError, printable
from lora_gguf.files.input_file import InputFile, Source, impostor
from lora_gguf.quants.ggml import TYPES, GgmlType

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_STRING = 1 << 30
MAX_KEY = (1 << 16) - 1
MAX_ARRAY = 1 << 30
MAX_NAME = 64
MAX_DIMS = 4
STRING, ARRAY = 8, 9
# value type id -> struct format; the two others are STRING and ARRAY
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class KeyValue:
    """Where a key/value pair lies: ``[start, end)`` in the file, its value from ``value`` on, of type ``type``."""

    key: str
    type: int
    start: int
    value: int
    end: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file: ``shape`` in numpy order, ``offset`` from the data start, both as the header says."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def n_cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_elements(self) -> int:
        n = 1
        for dim in self.shape:
            n *= dim
        return n

    @property
    def n_rows(self) -> int:
        return self.n_elements // self.n_cols if self.n_cols else 0

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.n_cols)

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes


def padded(n_bytes: int, alignment: int) -> int:
    """Return ``n_bytes`` rounded up to a multiple of ``alignment``."""
    return -(-n_bytes // alignment) * alignment


class _Cursor:
    """A position in a file, with a window of it in memory; every read is checked against the file's size."""

    def __init__(self, source: Source) -> None:
        self.source, self.size, self.label = source, source.size, source.label
        self.window, self.window_start, self.position = b"", 0, 0

    def error(self, what: str) -> MalformedError:
        return MalformedError(f"{self.label}: {what} (at byte {self.position}): the file is damaged or not a GGUF")

    def require(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.size - self.position:
            raise self.error(f"{what}: expected {n_bytes} more bytes, found {self.size - self.position}")

    def fill(self, n_bytes: int, what: str) -> int:
        """Make ``n_bytes`` from the position on present in the window; return where in the window they start."""
        at = self.position - self.window_start
        if at < 0 or at + n_bytes > len(self.window):
            self.require(n_bytes, what)
            length = min(max(n_bytes, self.source.window), self.size - self.position)
            self.window, self.window_start, at = self.source.read(self.position, length), self.position, 0
        return at

    def unpack(self, layout: str, what: str) -> Any:
        n_bytes = struct.calcsize("<" + layout)
        at = self.fill(n_bytes, what)
        self.position += n_bytes
        return struct.unpack_from("<" + layout, self.window, at)[0]

    def skip(self, n_bytes: int, what: str) -> None:
        self.require(n_bytes, what)
        self.position += n_bytes

    def string(self, what: str, limit: int) -> str:
        length = self.length(what, limit)
        at = self.fill(length, what)
        self.position += length
        return self.window[at : at + length].decode("utf-8", "surrogateescape")

    def length(self, what: str, limit: int) -> int:
        length = self.unpack("Q", what)
        if length > limit:
            raise self.error(f"{what}: a string of {length} bytes: expected at most {limit}")
        return length

    def skip_strings(self, count: int, what: str) -> None:
        """Skip ``count`` strings; the loop stays inside the window, so 262k tokens take some 30 ms."""
        unpack = _U64.unpack_from
        while count:
            at = self.fill(8, what)
            window, end = self.window, len(self.window) - 8
            start = at
            while count and at <= end:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.position += at - start
            if self.position > self.size:
                raise self.error(f"{what}: a string runs past the end of the file")


class GgufReader:
    """A GGUF file, open for reading: one of this machine by its path, or any ``Source``. Use as a context manager.

    ``kv`` maps each key to its span, in file order; ``tensors`` maps each name to its ``TensorInfo``, in file order.
    Raises ``MalformedError`` for a file that libggml would refuse, ``FileError`` where it can't be read.
    """

    def __init__(self, path: str | os.PathLike | Source) -> None:
        self.source = path if isinstance(path, Source) else InputFile(path)
        self.label, self.size = self.source.label, self.source.size
        self.path = Path(self.label if isinstance(path, Source) else path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GgufReader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.source.close()

    @property
    def fd(self) -> int:
        """The descriptor of a file of this machine, to copy from."""
        assert isinstance(self.source, InputFile)  # noqa: S101
        return self.source.fd

    def _read_header(self) -> None:
        cursor = _Cursor(self.source)
        self._read_preamble(cursor)
        self._read_key_values(cursor)
        self._read_tensor_table(cursor)

    def _read_preamble(self, cursor: _Cursor) -> None:
        head = self.source.read(0, min(self.size, 32))
        if not head.startswith(MAGIC):
            start = printable(head[:4].decode("latin-1")) or "nothing"
            what = impostor(head) or f"not a GGUF file: expected it to start with GGUF, found {start}: check the path"
            raise MalformedError(f"{self.label}: {what}")
        cursor.position = 4
        self.version = cursor.unpack("I", "version")
        if self.version and self.version & 0xFFFF == 0:
            raise UnsupportedError(
                f"{self.label}: a big-endian GGUF: convert it to little-endian with gguf-convert-endian"
            )
        if self.version not in (2, 3):
            raise MalformedError(f"{self.label}: GGUF version {self.version}: expected 2 or 3")
        self.n_tensors = cursor.unpack("Q", "tensor count")
        self.n_kv = cursor.unpack("Q", "key/value count")

    def _read_key_values(self, cursor: _Cursor) -> None:
        self.kv: dict[str, KeyValue] = {}
        for _ in range(self.n_kv):
            start = cursor.position
            key = cursor.string("a key", MAX_KEY)
            if not key or "\0" in key:
                raise cursor.error(f"key '{printable(key)}' is empty or holds a NUL")
            if key in self.kv:
                raise cursor.error(f"key {printable(key)} occurs twice")
            type_id = cursor.unpack("I", f"type of {printable(key)}")
            value = cursor.position
            self._skip_value(cursor, type_id, printable(key))
            self.kv[key] = KeyValue(key, type_id, start, value, cursor.position)
        self.alignment = self._alignment(cursor)

    def _skip_value(self, cursor: _Cursor, type_id: int, key: str) -> None:
        if type_id in SCALARS:
            cursor.skip(struct.calcsize("<" + SCALARS[type_id]), key)
        elif type_id == STRING:
            cursor.skip(cursor.length(key, MAX_STRING), key)
        elif type_id == ARRAY:
            item, count = cursor.unpack("I", key), cursor.unpack("Q", key)
            if count > MAX_ARRAY:
                raise cursor.error(f"{key}: an array of {count} values")
            if item == STRING:
                cursor.skip_strings(count, key)
            elif item in SCALARS:
                cursor.skip(count * struct.calcsize("<" + SCALARS[item]), key)
            else:
                raise cursor.error(f"{key}: an array of type {item}")
        else:
            raise cursor.error(f"{key}: unknown value type {type_id}")

    def _alignment(self, cursor: _Cursor) -> int:
        entry = self.kv.get("general.alignment")
        if entry is None:
            return DEFAULT_ALIGNMENT
        if entry.type != 4:
            raise cursor.error("general.alignment: expected a u32")
        alignment = self.get("general.alignment")
        if alignment == 0 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment: expected a power of two, found {alignment}")
        return alignment

    def _read_tensor_table(self, cursor: _Cursor) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        expected = 0
        for _ in range(self.n_tensors):
            info = self._read_tensor_info(cursor)
            if info.offset != expected:
                raise cursor.error(f"{info.name}: expected offset {expected}, found {info.offset}")
            expected += padded(info.n_bytes, self.alignment)
            if expected >= 1 << 63:
                raise cursor.error(f"{info.name}: the tensors are larger than any file")
            self.tensors[info.name] = info
        self.table_end = cursor.position
        self.data_position = padded(self.table_end, self.alignment)
        for info in self.tensors.values():
            end = self.data_position + info.offset + info.n_bytes
            if end > self.size:
                raise MalformedError(
                    f"{self.label}: {info.name}: its data ends at byte {end}, found a file of {self.size}: "
                    "the file is truncated, download it again"
                )

    def _read_tensor_info(self, cursor: _Cursor) -> TensorInfo:
        name = cursor.string("a tensor name", MAX_NAME - 1)
        label = printable(name)
        if not name or label != name:
            raise cursor.error(f"tensor name '{label}' is empty or not printable")
        if name in self.tensors:
            raise cursor.error(f"tensor {label} occurs twice")
        n_dims = cursor.unpack("I", label)
        if n_dims > MAX_DIMS:
            raise cursor.error(f"{label}: {n_dims} dimensions: expected at most {MAX_DIMS}")
        dims = [cursor.unpack("q", label) for _ in range(n_dims)]
        type_id, offset = cursor.unpack("I", label), cursor.unpack("Q", label)
        if type_id not in TYPES:
            raise cursor.error(f"{label}: unknown tensor type {type_id}")
        info = TensorInfo(name, TYPES[type_id], tuple(reversed(dims)), offset)
        self._check_dims(cursor, info, dims)
        return info

    def _check_dims(self, cursor: _Cursor, info: TensorInfo, dims: list[int]) -> None:
        product = 1
        for dim in dims:
            if dim < 0:
                raise cursor.error(f"{info.name}: dimension {dim}")
            product *= max(dim, 1)
        if product >= 1 << 63 or product * info.type.block_bytes >= 1 << 63:
            raise cursor.error(f"{info.name}: shape {info.shape} overflows")
        if info.n_cols % info.type.block_size:
            raise cursor.error(
                f"{info.name}: rows of {info.n_cols}: expected a multiple of {info.type.block_size} ({info.type})"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of ``key``: a number, a bool, a str, or a list of them; ``default`` where the key is
        missing.
        """
        entry = self.kv.get(key)
        if entry is None:
            return default
        return decode_value(self.source.read(entry.value, entry.end - entry.value), entry.type)

    def length(self, key: str) -> int:
        """Return how many values the array ``key`` has, none of them read; 0 where the key is missing or no array."""
        entry = self.kv.get(key)
        return struct.unpack("<IQ", self.source.read(entry.value, 12))[1] if entry and entry.type == ARRAY else 0

    @cached_property
    def architecture(self) -> str:
        """``general.architecture``; an empty string where the file does not say."""
        value = self.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    def hparam(self, name: str, default: Any = None) -> Any:
        """Return the value of ``{architecture}.{name}``."""
        return self.get(f"{self.architecture}.{name}", default)

    def read_into(self, info: TensorInfo, offset: int, buffer: Any) -> None:
        """Fill ``buffer`` (writable, contiguous) with the tensor's bytes from ``offset`` (bytes from its start) on."""
        self.source.read_into(self.data_position + info.offset + offset, buffer, info.name)

    def read(self, info: TensorInfo, first_row: int = 0, n_rows: int | None = None) -> Any:
        """Return rows ``first_row`` to ``first_row + n_rows`` as stored: uint8, shape (n_rows, row_bytes)."""
        import numpy as np

        n_rows = info.n_rows - first_row if n_rows is None else n_rows
        rows = np.empty((n_rows, info.row_bytes), np.uint8)
        self.read_into(info, first_row * info.row_bytes, rows)
        return rows

    def check_unchanged(self) -> None:
        """Raise ``IntegrityError`` if the file was written to since it was opened."""
        self.source.check_unchanged()


def decode_value(raw: bytes, type_id: int) -> Any:
    """Return the value in ``raw``, the bytes of one value as they stand in a file whose header was read without
    error.
    """
    if type_id in SCALARS:
        return struct.unpack("<" + SCALARS[type_id], raw)[0]
    if type_id == STRING:
        return raw[8:].decode("utf-8", "surrogateescape")
    item, count = struct.unpack_from("<IQ", raw)
    if item != STRING:
        return list(struct.unpack_from(f"<{count}{SCALARS[item]}", raw, 12))
    values, at = [], 12
    for _ in range(count):
        length = _U64.unpack_from(raw, at)[0]
        values.append(raw[at + 8 : at + 8 + length].decode("utf-8", "surrogateescape"))
        at += 8 + length
    return values
