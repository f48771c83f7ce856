"""Read the tensors of an adapter file: ``.safetensors``, a sharded index, or PyTorch's ``.bin`` (without torch).

The format is that of https://huggingface.co/docs/safetensors; a header that its library refuses, we refuse, and also
names that occur twice or that a terminal could not print. Sizes are checked against the file before anything is
allocated, and the file is read, never mapped: one that shrinks under us gives an error, not a SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_gguf.errors import MalformedError, UnsupportedError, printable
from lora_gguf.files.input_file import InputFile, Source, impostor
from lora_gguf.files.lazy_array import Stored
from lora_gguf.files.npz_reader import find_npz
from lora_gguf.files.tensor_file import DTYPES, MAX_DIMS, UNSUPPORTED_DTYPES, check_name, damaged
from lora_gguf.files.torch_reader import find_torch

MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file: ``[start, end)`` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return what ``find_weights`` does, all of it read."""
    return {name: np.asarray(array) for name, array in find_weights(path).items()}


def find_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return all tensors of ``path`` by name, in file order; BF16 and F8 widened to f32, other types as they are
    stored. They are read when they are asked for (``LazyArray``), but for what is small or no plain part of a PyTorch
    file.

    ``path`` is a ``.safetensors`` file, a ``*.index.json`` beside its shards, numpy's ``.npz``, or a PyTorch zip
    (``.bin``, ``.pt``).
    Raises ``MalformedError``, ``UnsupportedError`` (a dtype), ``FileError``, ``IntegrityError`` (the file changed).
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _find_sharded(path)
    if path.suffix == ".safetensors":
        return _find_safetensors(path)
    if path.suffix == ".npz":
        return find_npz(path)
    return find_torch(path)


def _find_safetensors(path: Path) -> dict[str, np.ndarray]:
    with InputFile(path) as file:
        entries, data_position = read_header(file)
        return {entry.name: Stored.at(file, data_position + entry.start, entry.dtype, entry.shape) for entry in entries}


def read_header(file: Source) -> tuple[list[Entry], int]:
    """Return the tensors of a safetensors file in file order, and the position of its data; everything is checked."""
    head = file.read(0, min(file.size, 32))
    what = impostor(head)
    if what:
        raise MalformedError(f"{file.label}: {what}")
    if file.size < 8:
        raise damaged(file.label, f"expected a header, found {file.size} bytes")
    n_bytes = struct.unpack_from("<Q", head)[0]
    if n_bytes > min(file.size - 8, MAX_HEADER):
        raise damaged(file.label, f"a header of {n_bytes} bytes: expected at most {min(file.size - 8, MAX_HEADER)}")
    entries = parse_header(file.read(8, n_bytes), file.size - 8 - n_bytes, file.label)
    return entries, 8 + n_bytes


def parse_header(raw: bytes, data_bytes: int, label: str) -> list[Entry]:
    """Return the tensors that ``raw``, the JSON of a safetensors header, lists; they must fill ``data_bytes``
    exactly.
    """
    header = _parse_json(raw, label)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise damaged(label, "__metadata__: expected a map of strings")
    entries = [_entry(name, fields, label) for name, fields in header.items()]
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise damaged(label, f"{entry.name}: expected its data at byte {end}, found {entry.start}")
        end = entry.end
    if end != data_bytes:
        raise damaged(label, f"expected {end} bytes of data, found {data_bytes}")
    unknown = sorted({entry.dtype for entry in entries} - set(DTYPES))
    if unknown:
        raise UnsupportedError(f"{label}: tensors of type {', '.join(unknown)}: save the adapter as F32, F16 or BF16")
    return entries


def _parse_json(raw: bytes, label: str) -> dict:
    def unique(pairs: list) -> dict:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a name occurs twice")
        return fields

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    if not raw.startswith(b"{"):
        raise damaged(label, "the header is not a JSON object")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(header, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise damaged(label, "the header is nested too deeply") from None
    except ValueError as error:
        raise damaged(label, f"the header is not JSON: {printable(error, 80)}") from None
    return header


def _entry(name: str, fields: Any, label: str) -> Entry:
    check_name(name, label)
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise damaged(label, f"{name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise damaged(label, f"{name}: shape or data_offsets are not whole numbers")
    if len(shape) > MAX_DIMS or math.prod(max(dim, 1) for dim in shape) >= 1 << 60:
        raise damaged(label, f"{name}: shape {printable(shape, 60)} overflows")
    if not isinstance(dtype, str) or dtype not in DTYPES.keys() | UNSUPPORTED_DTYPES:
        raise damaged(label, f"{name}: unknown type {printable(dtype, 40)}")
    n_bytes = math.prod(shape) * DTYPES[dtype].stored.itemsize if dtype in DTYPES else offsets[1] - offsets[0]
    if offsets[1] - offsets[0] != n_bytes or n_bytes < 0:
        raise damaged(label, f"{name}: {dtype} {shape} takes {n_bytes} bytes, found {offsets[1] - offsets[0]}")
    return Entry(name, dtype, tuple(shape), *offsets)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _find_sharded(path: Path) -> dict[str, np.ndarray]:
    """The tensors of all shards that the index names; a shard lies beside the index."""
    weights: dict[str, np.ndarray] = {}
    for name in shard_names(path):
        shard = find_weights(path.parent / name)
        twice = weights.keys() & shard.keys()
        if twice:
            raise MalformedError(f"{printable(path.name)}: {min(twice)} is in two shards: download the adapter again")
        weights.update(shard)
    return weights


def shard_names(path: Path) -> list[str]:
    """Return the file names of the shards that a ``*.index.json`` names; none of them leaves the folder."""
    with InputFile(path) as file:
        if file.size > MAX_HEADER:
            raise damaged(file.label, f"an index of {file.size} bytes")
        weight_map = _parse_json(file.read(0, file.size).lstrip(), file.label).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise damaged(file.label, "weight_map: expected a map from tensor to file name")
        names = sorted(set(weight_map.values()))
        for name in names:
            if printable(name) != name or name.startswith(".") or name != os.path.basename(name) or "\\" in name:
                raise damaged(file.label, f"shard '{printable(name)}': expected a plain file name")
            if not name.endswith((".safetensors", ".bin")):
                raise damaged(file.label, f"shard '{name}': expected a .safetensors or .bin file")
        return names
