"""Read the tensors of a PyTorch file (``torch.save`` since 1.6: a zip of one pickle and raw storages) without torch."""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_gguf.errors import MalformedError, UnsupportedError, printable
from lora_gguf.files.input_file import InputFile, impostor
from lora_gguf.files.lazy_array import BLOCK_BYTES, Stored
from lora_gguf.files.pickle_reader import Builder, Refusal, load, set_item
from lora_gguf.files.tensor_file import DTYPES, MAX_DIMS, check_name, damaged

ZIP_MAGIC = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
MAX_PICKLE = 64 << 20
# how a file starts that torch.load may know, and we do not -> what it is
FOREIGN = (
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", "a PyTorch file in the format from before version 1.6"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x80", "a bare pickle"),
)


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage of a PyTorch file: ``numel`` items of ``dtype`` in the archive's entry ``data/<key>``."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, eq=False)
class TensorView:
    """A tensor as its storage, ``offset``, ``shape`` and ``stride`` (in items), none of them checked yet."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple
    dtype: str


@dataclass(frozen=True, eq=False)
class Dtype:
    """A dtype by safetensors' name."""

    name: str


@dataclass(frozen=True, eq=False)
class StorageType:
    """The type of a storage: of its items, or ``untyped`` for one of bytes."""

    dtype: str


@dataclass(frozen=True)
class Entry:
    """A stored (never compressed) entry of a zip archive: ``[position, position + n_bytes)`` in the file."""

    name: str
    position: int
    n_bytes: int
    crc: int


def _ordered_dict(args: tuple) -> dict:
    if not args:
        return {}
    if len(args) != 1 or type(args[0]) is not list:
        raise Refusal("an OrderedDict that is not made of pairs")
    result: dict = {}
    for pair in args[0]:
        if type(pair) not in (tuple, list) or len(pair) != 2:
            raise Refusal("an OrderedDict that is not made of pairs")
        set_item(result, *pair)
    return result


def _tensor(args: tuple, dtype: str | None = None) -> TensorView:
    """``_rebuild_tensor`` and ``_v2``: storage, offset, size, stride, requires_grad, hooks, metadata."""
    if not 4 <= len(args) <= 7 or type(args[0]) is not Storage or (len(args) == 7 and args[6]):
        raise Refusal("a tensor that is not a plain view of a storage")
    storage, offset, shape, stride = args[:4]
    if type(shape) is not tuple or type(stride) is not tuple or not _are_sizes((offset, *shape, *stride)):
        raise Refusal("a tensor whose offset, size or stride is not a whole number")
    if (dtype is None) is (storage.dtype == "untyped"):
        raise Refusal("a tensor whose storage has another type")
    return TensorView(storage, offset, shape, stride, dtype or storage.dtype)


def _tensor_v3(args: tuple) -> TensorView:
    """As ``_rebuild_tensor_v2`` with the dtype before the metadata, over a storage of bytes."""
    if not 7 <= len(args) <= 8 or type(args[6]) is not Dtype:
        raise Refusal("a tensor without a known type")
    return _tensor((*args[:6], *args[7:]), args[6].name)


def _parameter(args: tuple) -> TensorView:
    if not args or type(args[0]) is not TensorView:
        raise Refusal("a parameter that is not a tensor")
    return args[0]


def _size(args: tuple) -> tuple:
    if len(args) != 1 or type(args[0]) is not tuple:
        raise Refusal("a torch.Size that is not a tuple")
    return args[0]


def _storage(pid: object) -> Storage:
    """A persistent id: ``("storage", type, key, device, numel)``."""
    if type(pid) is not tuple or len(pid) != 5 or type(pid[0]) is not str or pid[0] != "storage":
        raise Refusal("a reference to something that is no storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if type(kind) is not StorageType or type(key) is not str or not _are_sizes((numel,)):
        raise Refusal("a storage without type, key or size")
    return Storage(kind.dtype, key, numel)


def _are_sizes(values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


# PyTorch's names of storages and of dtypes -> safetensors' name
STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
TORCH_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
# all that a pickle may name
NAMES = {
    "collections OrderedDict": Builder(_ordered_dict),
    "torch._utils _rebuild_tensor": Builder(_tensor),
    "torch._utils _rebuild_tensor_v2": Builder(_tensor),
    "torch._utils _rebuild_tensor_v3": Builder(_tensor_v3),
    "torch._utils _rebuild_parameter": Builder(_parameter),
    "torch Size": Builder(_size),
    "torch.storage UntypedStorage": StorageType("untyped"),
    **{f"torch {name}Storage": StorageType(dtype) for name, dtype in STORAGES.items()},
    **{f"torch {name}": Dtype(dtype) for name, dtype in TORCH_DTYPES.items()},
}


def read_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return what ``find_torch`` does, all of it read."""
    return {name: np.asarray(array) for name, array in find_torch(path).items()}


def find_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return all tensors of a ``.bin`` by name, in the pickle's order; BF16 and F8 widened to f32, other types as
    stored. Those that lie in one piece are read when they are asked for.

    Raises ``MalformedError`` for whatever is not a plain dict of tensors, ``UnsupportedError`` for older formats.
    """
    with InputFile(path) as file:
        entries = _archive(file)
        if read_entry(file, entries["byteorder"]) != b"little" if "byteorder" in entries else False:
            raise UnsupportedError(
                f"{file.label}: a file of a big-endian machine: save the adapter as .safetensors there"
            )
        if entries["data.pkl"].n_bytes > MAX_PICKLE:
            raise damaged(file.label, f"a pickle of {entries['data.pkl'].n_bytes} bytes: expected at most {MAX_PICKLE}")
        views = load(read_entry(file, entries["data.pkl"]), NAMES, _storage, file.label)
        _check_views(file, views)
        return _find_views(file, entries, views)


def read_entry(file: InputFile, entry: Entry) -> bytes:
    """Return the bytes of an entry, their CRC checked (0 stands for none: ``torch.save`` can leave it out)."""
    _check_crc(file, entry)
    return file.read(entry.position, entry.n_bytes)


def _archive(file: InputFile) -> dict[str, Entry]:
    """The entries by name without the archive's top folder; each lies in the file, stored, apart from all others."""
    _check_magic(file)
    try:
        with open(file.fd, "rb", closefd=False) as raw, zipfile.ZipFile(raw) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        struct.error,
        ValueError,
        OverflowError,
        EOFError,
        OSError,
    ) as error:
        raise damaged(file.label, f"not a zip archive: {printable(error, 80)}") from None
    pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1]
    if len(pickles) != 1 or len({info.filename for info in infos}) != len(infos):
        raise damaged(file.label, f"expected one data.pkl and no name twice, found {len(pickles)}")
    folder = pickles[0][: -len("data.pkl")]
    if f"{folder}constants.pkl" in {info.filename for info in infos}:
        raise UnsupportedError(f"{file.label}: a TorchScript program, not weights: save the adapter's state dict")
    entries: dict[str, Entry] = {}
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        entries[info.filename[len(folder) :]] = _entry(file, info, folder, end)
        end = info.header_offset
    if end:
        raise damaged(file.label, f"{end} bytes before its first entry")
    return entries


def _check_magic(file: InputFile) -> None:
    head = file.read(0, min(file.size, 512))
    if head.startswith(ZIP_MAGIC):
        return
    what = next((text for magic, text in FOREIGN if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive, the format of PyTorch before version 0.1.10"
    if what:
        raise UnsupportedError(f"{file.label}: {what}: load it with torch and save it with safetensors.torch.save_file")
    raise MalformedError(
        f"{file.label}: {impostor(head) or 'not a PyTorch file: expected a zip archive: download it again'}"
    )


def _entry(file: InputFile, info: zipfile.ZipInfo, folder: str, end: int) -> Entry:
    """Check one entry of the directory; its data must end before ``end``, where the next one begins."""
    name = printable(info.filename, 80)
    parts = info.filename.split("/")
    if not info.filename.startswith(folder) or name != info.filename or ".." in parts or "" in parts or "\\" in name:
        raise damaged(file.label, f"entry '{name}': expected a plain name within {printable(folder, 60)}")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & ~0x808:
        raise damaged(file.label, f"entry {name}: compressed or encrypted: expected it as stored")
    if info.external_attr >> 28 not in (0, 8):
        raise damaged(file.label, f"entry {name}: a link or device")
    if not 0 <= info.header_offset <= end - LOCAL_HEADER.size:
        raise damaged(file.label, f"entry {name}: its header lies within another entry or outside the file")
    magic, _, flags, method, _, _, _, _, _, n_name, n_extra = LOCAL_HEADER.unpack(
        file.read(info.header_offset, LOCAL_HEADER.size)
    )
    position = info.header_offset + LOCAL_HEADER.size + n_name + n_extra
    if position + info.file_size > end:
        raise damaged(file.label, f"entry {name}: {info.file_size} bytes at {position} overlap what begins at {end}")
    local_name = file.read(info.header_offset + LOCAL_HEADER.size, n_name)
    if (
        magic != ZIP_MAGIC
        or method != info.compress_type
        or flags & ~0x808
        or local_name != info.filename.encode("utf-8")
    ):
        raise damaged(file.label, f"entry {name}: its own header differs from the directory's")
    return Entry(name, position, info.file_size, info.CRC)


def _check_views(file: InputFile, views: Any) -> None:
    """``views`` is a dict of tensors, each within its storage, together no more than the file could hold four times."""
    if type(views) is not dict:
        raise MalformedError(
            f"{file.label}: expected a dict of tensors, found {type(views).__name__}: save the adapter's state dict"
        )
    total = 0
    for name, view in views.items():
        check_name(name, file.label)
        if type(view) is not TensorView:
            raise MalformedError(
                f"{file.label}: {name}: expected a tensor, found {type(view).__name__}: save only the adapter's tensors"
            )
        _check_view(file, name, view)
        total += math.prod(view.shape) * DTYPES[view.dtype].stored.itemsize
    if total > 4 * file.size:
        raise damaged(file.label, f"its tensors overlap: {total} bytes in a file of {file.size}")


def _check_view(file: InputFile, name: str, view: TensorView) -> None:
    if len(view.shape) != len(view.stride) or len(view.shape) > MAX_DIMS:
        raise damaged(file.label, f"{name}: {len(view.shape)} sizes and {len(view.stride)} strides")
    if math.prod(max(size, 1) for size in view.shape) >= 1 << 60:
        raise damaged(file.label, f"{name}: its shape overflows")
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride, strict=True))
    itemsize = DTYPES[view.dtype].stored.itemsize
    unit = 1 if view.storage.dtype == "untyped" else itemsize
    if all(view.shape) and (last + 1) * itemsize > view.storage.numel * unit:
        raise damaged(
            file.label, f"{name}: reaches item {last} of a storage of {view.storage.numel * unit // itemsize}"
        )


def _find_views(file: InputFile, entries: dict[str, Entry], views: dict[str, TensorView]) -> dict[str, np.ndarray]:
    """Each storage is checked once, for all of its tensors; the result has the order of ``views``."""
    by_key: dict[str, list[str]] = {}
    for name, view in views.items():
        by_key.setdefault(view.storage.key, []).append(name)
    weights: dict[str, Any] = dict.fromkeys(views)
    for key, names in by_key.items():
        entry = entries.get(f"data/{key}")
        if entry is None:
            raise damaged(file.label, f"{names[0]}: its storage {printable(key, 40)} is missing")
        for name in names:
            storage = views[name].storage
            n_bytes = storage.numel * (1 if storage.dtype == "untyped" else DTYPES[storage.dtype].stored.itemsize)
            if n_bytes != entry.n_bytes:
                raise damaged(file.label, f"{name}: expected a storage of {n_bytes} bytes, found {entry.n_bytes}")
        _check_crc(file, entry)
        for name in names:
            view = views[name]
            position = entry.position + view.offset * DTYPES[view.dtype].stored.itemsize
            lies = all(view.shape) and _in_one_piece(view)
            weights[name] = (
                Stored.at(file, position, view.dtype, view.shape) if lies else _array(read_entry(file, entry), view)
            )
    return weights


def _check_crc(file: InputFile, entry: Entry) -> None:
    crc = 0
    for start in range(0, entry.n_bytes, BLOCK_BYTES) if entry.crc else ():
        crc = zlib.crc32(file.read(entry.position + start, min(BLOCK_BYTES, entry.n_bytes - start)), crc)
    if crc != entry.crc:
        raise damaged(file.label, f"{entry.name}: expected CRC {entry.crc:08x}, found {crc:08x}")


def _in_one_piece(view: TensorView) -> bool:
    """Return whether the items lie one after the other, as C has them."""
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _array(raw: bytes, view: TensorView) -> np.ndarray:
    dtype = DTYPES[view.dtype]
    if not all(view.shape):
        return np.empty(view.shape, np.float32 if dtype.widen else dtype.stored)
    items = np.frombuffer(raw, dtype.stored, len(raw) // dtype.stored.itemsize)[view.offset :]
    strides = [stride * dtype.stored.itemsize for stride in view.stride]
    array = np.lib.stride_tricks.as_strided(items, view.shape, strides)
    return dtype.widen(array) if dtype.widen else array.copy()
