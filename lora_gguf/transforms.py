"""How a Hugging Face weight becomes GGUF tensors: which of its rows and columns go where.

Every linear layout change is a ``Piece``: a gather of rows, a gather of columns, a factor a row, a transpose. On
W = B @ A they act as ``B[rows]``, ``A[:, cols]``, ``B * scale`` and the exchange of A and B, so they are exact.

The operations are functions ``op(index, dims) -> index``: they take the row (or column) numbers of the Hugging Face weight
in their present order and return those that the GGUF tensor has, in its order. A chain of them is one gather.
``dims(key)`` is a hyperparameter of the layer under its GGUF key, without the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lora_gguf.lora import LoraPair

Dims = Callable[[str], int]
Op = Callable[[np.ndarray, Dims], np.ndarray]


@dataclass(frozen=True)
class Piece:
    """A part of a Hugging Face weight that goes to the GGUF tensor ``name``, at ``slot`` of its leading axis if it has one.

    None means all rows, all columns, no factor. ``transpose`` comes last.
    """

    name: str
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    scale: np.ndarray | None = None
    transpose: bool = False
    slot: int | None = None


def cut(pair: LoraPair, piece: Piece) -> LoraPair:
    """The update of ``piece`` alone, in its layout."""
    a = pair.a if piece.cols is None else pair.a[:, piece.cols]
    b = pair.b if piece.rows is None else pair.b[piece.rows]
    if piece.scale is not None:
        b = b * piece.scale[:, None].astype(np.float32)
    if piece.transpose:
        a, b = b.T, a.T
    return LoraPair(piece.name, np.ascontiguousarray(a), np.ascontiguousarray(b), pair.scale, pair.sources)


def rotary(heads: str) -> Op:
    """Rotary halves to rotary pairs: per head, row (s, j) of (2, d/2) goes to (j, s). ``heads`` is the key of their number."""

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        return index.reshape(dims(heads), 2, -1).swapaxes(1, 2).ravel()

    return op


rotary_q = rotary("attention.head_count")
rotary_k = rotary("attention.head_count_kv")
