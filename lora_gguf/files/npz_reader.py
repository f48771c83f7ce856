"""Find the arrays of an ``.npz`` (``numpy.savez``, ``mlx.core.savez``): a zip of stored ``.npy`` files.

No pickle is ever opened: an array of objects is refused.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from typing import Any

import numpy as np

from lora_gguf.errors import UnsupportedError
from lora_gguf.files.input_file import InputFile
from lora_gguf.files.lazy_array import BLOCK_BYTES, Stored
from lora_gguf.files.tensor_file import DTYPES, MAX_DIMS, check_name, damaged

MAX_NPY_HEADER = 1 << 16
KINDS = {dtype.stored: kind for kind, dtype in DTYPES.items() if dtype.widen is None}
LOCAL_HEADER = 30  # bytes of an entry's own header; the lengths of its name and of what else follows end it


class _View(io.RawIOBase):
    """An ``InputFile`` as the seekable stream that ``zipfile`` reads."""

    def __init__(self, file: InputFile):
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        n = max(0, min(len(buffer), self.file.size - self.position))
        if n:
            self.file.read_into(self.position, memoryview(buffer)[:n])
        self.position += n
        return n


def find_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return all arrays of ``path`` by name, in file order, read when they are asked for (``LazyArray``) where they are
    large; BF16 (stored as void of two bytes) widened to f32. All of the file is checked.

    Raises ``MalformedError``, ``UnsupportedError`` (a compressed or object array), ``FileError``.
    """
    with InputFile(path) as file:
        try:
            with zipfile.ZipFile(io.BufferedReader(_View(file))) as archive:
                entries = archive.infolist()
                found = {entry.filename.removesuffix(".npy"): _array(archive, entry, file) for entry in entries}
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, KeyError, SyntaxError) as error:
            raise damaged(file.label, f"not an archive of arrays ({type(error).__name__})") from None
        if len(found) != len(entries):
            raise damaged(file.label, "a name occurs twice")
        return found


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: InputFile) -> Any:
    check_name(entry.filename, file.label)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UnsupportedError(
            f"{file.label}: {entry.filename} is compressed: save the adapter with savez, or as safetensors"
        )
    if entry.file_size > file.size:
        raise damaged(file.label, f"{entry.filename}: {entry.file_size} bytes in a file of {file.size}")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read_header(stream, max_header_size=MAX_NPY_HEADER)
        first = stream.tell()
        n_bytes = first + sum(iter(lambda: len(stream.read(BLOCK_BYTES)), 0))  # the end of the stream checks its CRC
    is_bf16 = dtype.kind == "V" and dtype.itemsize == 2 and not dtype.fields
    kind = "BF16" if is_bf16 else KINDS.get(dtype.newbyteorder("<"))
    if kind is None or dtype.byteorder == ">":
        raise UnsupportedError(
            f"{file.label}: {entry.filename}: an array of {dtype}: save the adapter as F32, F16 or BF16"
        )
    if len(shape) > MAX_DIMS or min(shape, default=0) < 0 or first + math.prod(shape) * dtype.itemsize > n_bytes:
        raise damaged(file.label, f"{entry.filename}: shape {shape} does not fit into {n_bytes} bytes")
    n_name, n_extra = struct.unpack("<HH", file.read(entry.header_offset + LOCAL_HEADER - 4, 4))
    position = entry.header_offset + LOCAL_HEADER + n_name + n_extra + first
    return Stored.at(file, position, kind, shape[::-1]).T if by_column else Stored.at(file, position, kind, shape)
