"""Several parts of one tensor as one pair: experts stacked, rows of a fused tensor side by side."""

from __future__ import annotations

from functools import partial

import numpy as np

from lora_gguf.adapters.lora import LoraPair, Piece
from lora_gguf.errors import MismatchError
from lora_gguf.files.lazy_array import made, stack

Part = tuple[Piece, LoraPair]


def joined(name: str, parts: list[Part], shape: tuple[int, ...] | None, n_experts: int | None) -> LoraPair:
    """Return one pair of all parts: experts stacked, absent ones zero; rows of a fused tensor side by side, ranks
    added.

    ``shape`` is that of the base's tensor, where it is known. Raises ``MismatchError``.
    """
    piece, pair = parts[0]
    sources = tuple(dict.fromkeys(source for _, part in parts for source in part.sources))
    if piece.slot is not None:
        return stacked(name, parts, sources, shape[0] if shape and len(shape) == 3 else n_experts)
    if piece.offset is None and len(parts) == 1:
        return pair
    if all(part.sources == pair.sources for _, part in parts) and piece.offset is None:
        return added(name, [part for _, part in parts])
    if shape is None or any(other.offset is None for other, _ in parts):
        raise MismatchError("two modules claim it")
    return fused(name, parts, sources, shape)


def added(name: str, pairs: list[LoraPair]) -> LoraPair:
    """Return the sum of parts of one module, which the tensor holds added up: ranks added."""
    a = np.concatenate([pair.a for pair in pairs], axis=-2)
    return LoraPair(name, a, np.concatenate([pair.b for pair in pairs], axis=-1), pairs[0].scale, pairs[0].sources)


def stacked(name: str, parts: list[Part], sources: tuple[str, ...], n: int | None) -> LoraPair:
    """Return experts' pairs as one, (E, r, in) and (E, out, r); smaller ranks are padded with zeros."""
    slots = [piece.slot for piece, _ in parts if piece.slot is not None]
    n = n or max(slots) + 1
    if len(set(slots)) != len(slots) or max(slots) >= n:
        raise MismatchError(f"expected experts 0 to {n - 1}, each once, found {max(slots)} and {len(slots)} in all")
    shapes = {pair.shape for _, pair in parts}
    if len(shapes) > 1:
        raise MismatchError(f"its experts differ in shape: {sorted(shapes)}")
    rank, (n_out, n_in) = max(pair.rank for _, pair in parts), parts[0][1].shape
    scale = common_scale(parts)
    by_slot = {piece.slot: pair for piece, pair in parts}
    found = [by_slot.get(slot) for slot in range(n)]
    a = stack([pair and pair.a for pair in found], (n, rank, n_in))
    b = stack([pair and under_scale(pair, scale) for pair in found], (n, n_out, rank))
    return LoraPair(name, a, b, scale, sources)


def fused(name: str, parts: list[Part], sources: tuple[str, ...], shape: tuple[int, ...]) -> LoraPair:
    """Return pairs of some rows each as one of all rows: A one below the other, B block by block."""
    scale, rank = common_scale(parts), sum(pair.rank for _, pair in parts)
    firsts = [piece.offset or 0 for piece, _ in parts]
    for first, (_, pair) in zip(firsts, parts, strict=True):
        if first + pair.b.shape[-2] > shape[-2] or pair.b.shape[:-2] != shape[:-2]:
            raise MismatchError(f"expected parts of {shape}, found {pair.shape} at row {first}")
    a = made(beside, tuple(pair.a for _, pair in parts), (*shape[:-2], rank, parts[0][1].shape[-1]))
    b_shape = (*shape[:-1], rank)
    b = made(partial(diagonal, b_shape, firsts), tuple(under_scale(pair, scale) for _, pair in parts), b_shape)
    return LoraPair(name, a, b, scale, sources)


def beside(*factors: np.ndarray) -> np.ndarray:
    """Return A's one below the other."""
    return np.concatenate(factors, axis=-2)


def diagonal(shape: tuple[int, ...], firsts: list[int], *factors: np.ndarray) -> np.ndarray:
    """Return B's as one of ``shape``: each from its first row on, in columns of its own, zeros elsewhere."""
    out, column = np.zeros(shape, np.float32), 0
    for first, b in zip(firsts, factors, strict=True):
        out[..., first : first + b.shape[-2], column : column + b.shape[-1]] = b
        column += b.shape[-1]
    return out


def common_scale(parts: list[Part]) -> float:
    """Return the first scale that is not zero."""
    return next((pair.scale for _, pair in parts if pair.scale), 1.0)


def under_scale(pair: LoraPair, scale: float) -> np.ndarray:
    """Return the B of ``pair`` for another scale."""
    return pair.b if pair.scale == scale else (pair.b * np.float64(pair.scale / scale)).astype(np.float32)
