"""Random numbers inside kernels: a hash of a tensor's key, the row and the column, the same in every order of work."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.lanes import N, fma, splat, to_f32

GOLDEN = np.uint32(0x9E3779B9)
SIXTEEN = np.uint32(N * 0x9E3779B9 & 0xFFFFFFFF)  # columns further
UNIT = np.float32(2.0**-24)


@kernel
def key_of_row(key: Any, row: np.ndarray) -> Any:
    """Return the 32-bit key of one row: a 64-bit finalizer (splitmix64) of the tensor's key and the row's number."""
    x = np.uint64(key) + np.uint64(row + 1) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint32((x ^ (x >> np.uint64(31))) & np.uint64(0xFFFFFFFF))


@kernel
def _bits(row_key: Any, column: Any) -> Any:
    """A whole number in [0, 2**24) as f32: a 32-bit mixing of the row's key and the column (two rounds)."""
    x = np.uint32(row_key + np.uint32(column) * GOLDEN)
    x = np.uint32((x ^ np.uint32(x >> 16)) * np.uint32(0x21F0AAAD))
    x = np.uint32((x ^ np.uint32(x >> 15)) * np.uint32(0x735A2D97))
    return np.float32(np.int32(x >> 8))


@kernel
def uniform(row_key: Any, column: Any) -> Any:
    """Return a number in [0, 1), a multiple of 2**-24."""
    return _bits(row_key, column) * UNIT


@kernel
def offsets(column: Any, base: Any, unit: np.ndarray) -> Any:
    """Return the random offsets of sixteen columns, ``base`` and 0 to 2**24 - 1 of ``unit``; ``column`` holds
    row_key + column * GOLDEN. See ``_bits``.
    """
    x = (column ^ (column >> splat(np.uint32(16)))) * splat(np.uint32(0x21F0AAAD))
    x = (x ^ (x >> splat(np.uint32(15)))) * splat(np.uint32(0x735A2D97))
    return fma(unit, to_f32(x >> splat(np.uint32(8))), base)
