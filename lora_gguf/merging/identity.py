"""What an adapter and a base are, whatever they are called: the hashes that a merged file records.

An adapter's hash is of the numbers that a merge adds, in f32 and in the base's layout. So it survives a download, a new
name, and another file format or type that holds the same numbers: safetensors, PyTorch, or an adapter GGUF. A base's is
of its header, which costs nothing to read; that of the whole file is recorded where the Hub's cache knows it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import NumericError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.files.gguf_writer import raw_key_values
from lora_gguf.files.input_file import InputFile
from lora_gguf.files.lazy_array import LazyArray, blocks_of
from lora_gguf.mapping.accounts import Placement

_SHA256 = re.compile(r"[0-9a-f]{64}")


def merge_identity(base: Base, placements: Iterable[Placement]) -> str:
    """Return a hash of the adapters and of what the base says of earlier merges."""
    own = [key for key in base.kv if key.startswith("lora_gguf.")]
    earlier = raw_key_values(base.readers[0], base.kv.keys() - set(own)) if own else []
    found = [adapter_sha256(placement).encode() for placement in placements]
    return hashlib.sha256(b"".join([*found, *earlier])).hexdigest()


def first_row_sha256(base: Base, info: TensorInfo) -> str:
    """Return the sha256 of a tensor's first row as stored, which tells a merged file from its base whatever its
    metadata say; '' for a base on the Hub, where each row costs a request.
    """
    reader = base.reader_of(info.name)
    if not isinstance(reader.source, InputFile) or not info.n_rows:
        return ""
    return hashlib.sha256(reader.read(info, 0, 1)).hexdigest()


def adapter_sha256(placement: Placement) -> str:
    """Return the sha256 of what a placement adds to a base, in hexadecimal digits; it is kept by the placement."""
    placement.sha256 = placement.sha256 or _sha256_of(placement)
    return placement.sha256


def _sha256_of(placement: Placement) -> str:
    digest = hashlib.sha256()
    both: list[LoraPair | Update] = [*placement.pairs, *placement.updates]
    updates = sorted(both, key=lambda update: update.name)
    digest.update(b"(%d" % len(updates))
    for update in updates:
        try:
            _feed(digest, update)
        except OverflowError:
            raise NumericError(
                f"{update.name}: NaN, infinity or overflow in the adapter: it is damaged: download it again, or train "
                "it again"
            ) from None
    _feed(digest, sorted(placement.new_rows.items()))
    _feed(digest, sorted(placement.key_values.items()))
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: Any) -> None:
    """Hash a value and its kind: arrays by shape and content, floats as f32, objects by their fields."""
    if isinstance(value, LoraPair):
        b = value.b if isinstance(value.b, LazyArray) else np.asarray(value.b, np.float32)
        _feed(digest, ("LoRA", value.name, value.a, b * np.float32(value.scale)))
    elif isinstance(value, np.ndarray | LazyArray):
        dtype = np.dtype(np.float32 if value.dtype.kind == "f" else np.int64)
        digest.update(repr((dtype.str, value.shape or (1,))).encode())
        for _, block in blocks_of(value):
            array = np.ascontiguousarray(block, dtype)
            if not np.isfinite(array).all():
                raise OverflowError
            digest.update(array.reshape(-1).view(np.uint8).data)
    elif is_dataclass(value):
        named = [(field.name, getattr(value, field.name)) for field in fields(value) if field.name != "sources"]
        _feed(digest, (type(value).__name__, named))
    elif isinstance(value, (list, tuple)):
        digest.update(b"(%d" % len(value))
        for item in value:
            _feed(digest, item)
    else:
        plain = value.item() if isinstance(value, np.generic) else value
        digest.update(repr(plain).encode("utf-8", "backslashreplace") + b";")


def header_sha256(base: Base) -> str:
    """Return the sha256 of all bytes before the tensors' data, of each shard in turn."""
    digest = hashlib.sha256()
    for reader in base.readers:
        digest.update(reader.source.read(0, min(reader.data_position, reader.size)))
    return digest.hexdigest()


def n_file_bytes(base: Base) -> int:
    """Return the size of all the base's files."""
    return sum(reader.size for reader in base.readers)


def known_sha256(paths: Sequence[Path]) -> list[str]:
    """Return the sha256 of each file where huggingface_hub's cache knows it, by the name of its blob; else nothing."""
    blobs = [Path(os.path.realpath(path)) for path in paths]
    if all(blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) for blob in blobs):
        return [blob.name for blob in blobs]
    return []
