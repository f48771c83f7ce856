"""ggml's quantizers of IQ1, IQ2 and IQ3: the fields that the searches find, put in their places.

``iquants.py`` says where they go. Each function is an ``encode`` of the contract in the package's docstring.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_gguf.quants.iq1_search import search_iq1_m, search_iq1_s
from lora_gguf.quants.iquant_grids import lattice
from lora_gguf.quants.iquants_search import RULES, search_iq2_iq3


def _fields(name: str, weights: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, ...]:
    """d u16 (blocks,), scales u8 (blocks, groups), sign bytes u8 (blocks, 32), vectors u16 (blocks, 32; in IQ3 64)."""
    points, rules, n_blocks = lattice(name), RULES[name], weights.size // 256
    d, scales = np.empty(n_blocks, np.uint16), np.empty((n_blocks, 256 // rules.group), np.uint8)
    signs, vectors = np.zeros((n_blocks, 32), np.uint8), np.zeros((n_blocks, 256 // points.dims), np.uint16)
    search_iq2_iq3(weights, importance, points, rules, (d, scales, signs, vectors))
    return d, scales, signs, vectors


def _combined(values: np.ndarray, width: int, count: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Numbers of ``dtype`` made of ``count`` of the ``values`` (blocks, …) of ``width`` bits, the first one lowest."""
    shifted = values.reshape(len(values), -1, count).astype(dtype) << np.arange(0, width * count, width, dtype=dtype)
    return np.bitwise_or.reduce(shifted, axis=2)


def _bytes(values: np.ndarray) -> np.ndarray:
    """The bytes (blocks, …) of ``values`` (blocks, …)."""
    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)


def encode_iq2_xxs(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    d, scales, signs, vectors = _fields("IQ2_XXS", weights, importance)
    words = np.empty((len(d), 8, 2), np.uint32)
    words[..., 0] = _combined(vectors, 8, 4, np.uint32)
    words[..., 1] = _combined(signs & 127, 7, 4, np.uint32) | scales.astype(np.uint32) << 28
    blocks = blocks.reshape(-1, 66)
    blocks[:, :2] = _bytes(d)
    blocks[:, 2:] = _bytes(words)


def encode_iq2_xs(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    d, scales, signs, vectors = _fields("IQ2_XS", weights, importance)
    blocks = blocks.reshape(-1, 74)
    blocks[:, :2] = _bytes(d)
    blocks[:, 2:66] = _bytes(vectors | (signs & 127).astype(np.uint16) << 9)
    blocks[:, 66:] = _combined(scales, 4, 2, np.uint8)


def encode_iq2_s(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    d, scales, signs, vectors = _fields("IQ2_S", weights, importance)
    blocks = blocks.reshape(-1, 82)
    blocks[:, :2] = _bytes(d)
    blocks[:, 2:34] = vectors & 255
    blocks[:, 34:66] = signs
    blocks[:, 66:74] = _combined(vectors >> 8, 2, 4, np.uint8)
    blocks[:, 74:] = _combined(scales, 4, 2, np.uint8)


def encode_iq3_xxs(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    d, scales, signs, vectors = _fields("IQ3_XXS", weights, importance)
    blocks = blocks.reshape(-1, 98)
    blocks[:, :2] = _bytes(d)
    blocks[:, 2:66] = vectors
    blocks[:, 66:] = _bytes(_combined(signs & 127, 7, 4, np.uint32) | scales.astype(np.uint32) << 28)


def encode_iq3_s(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    d, scales, signs, vectors = _fields("IQ3_S", weights, importance)
    blocks = blocks.reshape(-1, 110)
    blocks[:, :2] = _bytes(d)
    blocks[:, 2:66] = vectors & 255
    blocks[:, 66:74] = _combined(vectors >> 8, 1, 8, np.uint8)
    blocks[:, 74:106] = signs
    blocks[:, 106:] = _combined(scales, 4, 2, np.uint8)


def _iq1_fields(
    search: Callable[..., None], n_groups: int, weights: np.ndarray, importance: np.ndarray
) -> tuple[np.ndarray, ...]:
    """d (blocks,), scales (blocks, groups), 1 where the shift is down and vectors (blocks, 32), all u16."""
    n_blocks = weights.size // 256
    d, scales = np.empty(n_blocks, np.uint16), np.empty((n_blocks, n_groups), np.uint16)
    down, vectors = np.zeros((n_blocks, 32), np.uint16), np.zeros((n_blocks, 32), np.uint16)
    search(weights, importance, lattice("IQ1_S"), d, scales, down, vectors)
    return d, scales, down, vectors


def encode_iq1_s(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    d, scales, down, vectors = _iq1_fields(search_iq1_s, 8, weights, importance)
    blocks = blocks.reshape(-1, 50)
    blocks[:, :2] = _bytes(d)
    blocks[:, 2:34] = vectors & 255
    blocks[:, 34:] = _bytes(_combined(vectors >> 8, 3, 4, np.uint16) | scales << 12 | down[:, ::4] << 15)


def encode_iq1_m(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    d, scales, down, vectors = _iq1_fields(search_iq1_m, 16, weights, importance)
    blocks = blocks.reshape(-1, 56)
    blocks[:, :32] = vectors & 255
    blocks[:, 32:48] = _combined(vectors >> 8 | down << 3, 4, 2, np.uint8)
    parts_of_d = (d[:, None] >> np.arange(0, 16, 4, dtype=np.uint16) & 15) << 12
    blocks[:, 48:] = _bytes(_combined(scales, 3, 4, np.uint16) | parts_of_d)
