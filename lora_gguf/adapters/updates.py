"""Updates that are not low rank: DoRA, IA³, OFT, BOFT, large LoHa and LoKr, whole tensors, single rows.

A merge sees one interface, that of ``Update``: what is added to some rows of a tensor, given those rows as they are in
the base. It needs no more than the rows at hand, so a merge streams; and no row depends on which others are at hand.

A vector of the base (a bias, a norm) is a matrix of one row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from lora_gguf.adapters.held import in_memory, n_held
from lora_gguf.adapters.lora import LoraPair, Piece
from lora_gguf.errors import UnsupportedError
from lora_gguf.files.lazy_array import at_hand, contiguous, gathered

MEASURED_ROWS = 4096  # at a time


@dataclass(kw_only=True, eq=False)
class Update:
    """A change of rows ``offset`` to ``offset + shape[0]`` of the tensor ``name``, its leading axes taken as one.

    ``shape`` is (rows, cols) of the part that changes; ``sources`` are the adapter's tensors. As in ``LoraPair``,
    ``name`` is a module path in Hugging Face's layout until ``take`` makes it a GGUF tensor. ``part`` is what of the
    module changes, its weight or its bias; an ``optional`` one is left out where the base has no such tensor.
    ``shared`` says that the embedding's update is the head's too.
    """

    name: str
    shape: tuple[int, int]
    sources: tuple[str, ...] = ()
    offset: int = 0
    part: str = "weight"
    optional: bool = False
    shared: bool = False

    # whether the old weights do not matter, so that the new ones should get a grid of their own
    replaces = False
    kind = ""

    @property
    def n_rows(self) -> int:
        """How many rows it changes."""
        return self.shape[0]

    def touches(self, first: int, n: int) -> np.ndarray:
        """Return which of the tensor's rows ``first`` to ``first + n`` it changes: bool (n,)."""
        row = np.arange(first, first + n) - self.offset
        return (row >= 0) & (row < self.shape[0])

    def change(self, first: int, weights: np.ndarray) -> np.ndarray:
        """Return what to add to ``weights``: f32 (n, cols), rows ``first`` to ``first + n`` of the tensor,
        dequantized.
        """
        out = np.zeros_like(weights, np.float32)
        start, stop = max(first, self.offset), min(first + len(weights), self.offset + self.shape[0])
        if start < stop:
            here = slice(start - first, stop - first)
            out[here] = self.change_of(start - self.offset, np.ascontiguousarray(weights[here], np.float32))
        return out

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        """Return ``change`` for rows ``i`` and on of the part, all of which are in it."""
        raise NotImplementedError

    def take(self, piece: Piece) -> Update:
        """Return the update of ``piece`` alone, under its name and in its layout."""
        raise NotImplementedError

    def loaded(self) -> Update:
        """Return the update with its arrays in memory, but for whole tensors of which some rows can be read."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: in_memory(value, name == "values") for name, value in arrays.items()})

    @property
    def held_bytes(self) -> int:
        """The bytes in memory of what ``loaded`` returns."""
        return sum(n_held(getattr(self, field.name), field.name == "values") for field in fields(self))

    def as_pair(self) -> LoraPair | None:
        """Return the same update as a pair, exact; None where it is not low rank."""
        return None

    def moved(self, piece: Piece, *, turns: bool = False, **fields: Any) -> Update:
        """Return this update with ``fields`` changed, at the piece's place; ``turns`` says that they are for a piece
        that is turned."""
        if piece.transpose and not turns:
            raise UnsupportedError(
                f"{self.name}: {self.kind} on {piece.name}, which GGUF stores transposed: merge it with PEFT"
            )
        n_rows = self.shape[0] if piece.rows is None else len(piece.rows)
        n_cols = self.shape[1] if piece.cols is None else len(piece.cols)
        if piece.transpose:
            n_rows, n_cols = n_cols, n_rows
        offset = (piece.offset or 0) + (piece.slot or 0) * n_rows
        return replace(self, name=piece.name, shape=(n_rows, n_cols), offset=offset, **fields)


def multiply(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Return b @ a in f32, each element summed in one order whatever the number of rows."""
    from lora_gguf.kernels.low_rank import low_rank

    out = np.empty((len(b), a.shape[1]), np.float32)
    low_rank(np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32), out)
    return out


@dataclass(kw_only=True, eq=False)
class Dora(Update):
    """DoRA: each row of W + scale * B @ A brought to the length ``magnitude`` (rows,). arXiv 2402.09353, as in PEFT."""

    pair: LoraPair
    magnitude: np.ndarray
    kind = "DoRA"

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        rows = slice(i, i + len(weights))
        moved = weights + multiply(self.pair.b[rows] * np.float32(self.pair.scale), self.pair.a)
        length = np.sqrt(np.square(moved, dtype=np.float64).sum(axis=1))
        factor = np.divide(self.magnitude[rows], length, out=np.zeros_like(length), where=length > 0)
        return (moved * factor[:, None] - weights).astype(np.float32)

    def take(self, piece: Piece) -> Update:
        magnitude = self.magnitude if piece.rows is None else self.magnitude[piece.rows]
        if piece.scale is not None:
            magnitude = magnitude * np.abs(piece.scale)
        if piece.transpose:
            turned = self.pair.take(piece)
            n_rows, n_cols = turned.shape[-2:]
            return DoraOfColumns(
                name=piece.name,
                shape=(n_rows, n_cols),
                sources=self.sources,
                offset=(piece.slot or 0) * n_rows,
                pair=turned,
                magnitude=magnitude,
            )
        return self.moved(piece, pair=self.pair.take(piece), magnitude=magnitude)


@dataclass(kw_only=True, eq=False)
class DoraOfColumns(Update):
    """DoRA of an embedding, or of a weight that a GGUF holds turned: each column of the part brought to its length.

    The ``lengths`` of the columns of W + scale * B @ A run over all of its rows: they are measured before any change.
    """

    pair: LoraPair
    magnitude: np.ndarray
    lengths: np.ndarray | None = None
    kind = "DoRA"

    def moved_weights(self, i: int, weights: np.ndarray) -> np.ndarray:
        return weights + multiply(self.pair.b[i : i + len(weights)] * np.float32(self.pair.scale), self.pair.a)

    def measure(self, rows: Callable[[int, int], np.ndarray]) -> None:
        """Set ``lengths``; ``rows(first, n)`` are the base's, dequantized, counted as the tensor's are."""
        total, pair = np.zeros(self.shape[1]), self.pair
        self.pair = replace(pair, a=np.asarray(pair.a), b=at_hand(pair.b))
        for i in range(0, self.shape[0], MEASURED_ROWS):
            n = min(MEASURED_ROWS, self.shape[0] - i)
            total += np.square(self.moved_weights(i, rows(self.offset + i, n)), dtype=np.float64).sum(axis=0)
        self.lengths, self.pair = np.sqrt(total), pair

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        assert self.lengths is not None, "measure comes first"  # noqa: S101
        factor = np.divide(self.magnitude, self.lengths, out=np.zeros(self.shape[1]), where=self.lengths > 0)
        return (self.moved_weights(i, weights) * factor - weights).astype(np.float32)

    def take(self, piece: Piece) -> Update:
        if piece.rows is not None or piece.transpose:
            raise UnsupportedError(f"{self.name}: DoRA on {piece.name}, whose layout differs: merge it with PEFT")
        magnitude = self.magnitude if piece.cols is None else self.magnitude[piece.cols]
        if piece.scale is not None:
            magnitude = magnitude * abs(float(piece.scale[0]))
        return self.moved(piece, pair=self.pair.take(piece), magnitude=magnitude)


@dataclass(kw_only=True, eq=False)
class Scaled(Update):
    """IA³: W times one factor a row, or one a column. arXiv 2205.05638."""

    row_factors: np.ndarray | None = None
    col_factors: np.ndarray | None = None
    kind = "IA3"

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        if self.col_factors is not None:
            return weights * (self.col_factors - np.float32(1))
        assert self.row_factors is not None  # noqa: S101
        return weights * (self.row_factors[i : i + len(weights), None] - np.float32(1))

    def take(self, piece: Piece) -> Update:
        rows, cols = gathered(self.row_factors, piece.rows), gathered(self.col_factors, piece.cols)
        if piece.transpose:
            rows, cols = cols, rows
        return self.moved(piece, turns=True, row_factors=rows, col_factors=cols)


@dataclass(kw_only=True, eq=False)
class Rotated(Update):
    """OFT and BOFT: W times block-diagonal rotations of its columns, then perhaps a factor a row.

    ``stages`` are applied in turn: (order, blocks): column ``order[j]`` of W is column j of the blocks (n, size, size),
    and becomes W_j @ block_j. No order means that of W; one block stands for all. arXiv 2306.07280, 2311.06243.
    """

    stages: list[tuple[np.ndarray | None, np.ndarray]]
    row_factors: np.ndarray | None = None
    cols: np.ndarray | None = None
    kind = "OFT"

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        turned = weights
        if self.cols is not None:
            turned = np.empty_like(weights)
            turned[:, self.cols] = weights
        for order, blocks in self.stages:
            turned = self.rotate(turned, order, blocks)
        if self.row_factors is not None:
            turned = turned * self.row_factors[i : i + len(weights), None]
        return gathered(turned, self.cols, 1) - weights

    @staticmethod
    def rotate(weights: np.ndarray, order: np.ndarray | None, blocks: np.ndarray) -> np.ndarray:
        out, size = np.empty_like(weights), blocks.shape[1]
        order = np.arange(weights.shape[1]) if order is None else order
        for j, start in enumerate(range(0, weights.shape[1], size)):
            cols = order[start : start + size]
            out[:, cols] = multiply(weights[:, cols], blocks[j % len(blocks)])
        return out

    def take(self, piece: Piece) -> Update:
        return self.moved(piece, row_factors=gathered(self.row_factors, piece.rows), cols=piece.cols)


@dataclass(kw_only=True, eq=False)
class Computed(Update):
    """An added matrix too large or of too high a rank to hold, made row by row.

    Entry (i, j) of LoHa's is the product of those of two pairs; of LoKr's, ``left[i // m, j // n] * right[i % m, j %
    n]`` with (m, n) the shape of ``right``. ``rows`` and ``cols`` are the numbers that the part has in Hugging Face's
    layout.
    """

    scale: float
    rows: np.ndarray
    cols: np.ndarray
    factors: np.ndarray | None = None

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Return whole rows of the matrix in Hugging Face's layout, without the scale."""
        raise NotImplementedError

    def as_pair(self) -> LoraPair:
        """Return the same update as a pair, exact, if of a high rank."""
        raise NotImplementedError

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        added = self.values(self.rows[i : i + len(weights)])[:, self.cols] * np.float32(self.scale)
        return added if self.factors is None else added * self.factors[i : i + len(weights), None]

    def take(self, piece: Piece) -> Update:
        factors = None if piece.scale is None else piece.scale.astype(np.float32)
        return self.moved(
            piece, rows=gathered(self.rows, piece.rows), cols=gathered(self.cols, piece.cols), factors=factors
        )


@dataclass(kw_only=True, eq=False)
class Hadamard(Computed):
    """LoHa: (w1_b @ w1_a) ⊙ (w2_b @ w2_a), each b (rows, r), a (r, cols). arXiv 2108.06098."""

    pairs: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    kind = "LoHa"

    def values(self, rows: np.ndarray) -> np.ndarray:
        (b1, a1), (b2, a2) = self.pairs
        return multiply(b1[rows], a1) * multiply(b2[rows], a2)

    def as_pair(self) -> LoraPair:
        """Return a pair of rank r²: each product of two columns of the b's, with the same of the a's rows
        (Khatri-Rao).
        """
        (b1, a1), (b2, a2) = self.pairs
        b = (b1[:, :, None] * b2[:, None, :]).reshape(len(b1), -1)[self.rows]
        a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1])[:, self.cols]
        return scaled_pair(self, a, b)


@dataclass(kw_only=True, eq=False)
class Kronecker(Computed):
    """LoKr: the Kronecker product of ``left`` and ``right``. arXiv 2309.14859."""

    left: np.ndarray
    right: np.ndarray
    kind = "LoKr"

    def values(self, rows: np.ndarray) -> np.ndarray:
        m, _n = self.right.shape
        return (self.left[rows // m][:, :, None] * self.right[rows % m][:, None, :]).reshape(len(rows), -1)

    def as_pair(self) -> LoraPair:
        """Return a pair of the product of both ranks: the Kronecker products of the two matrices' factors."""
        (b1, a1), (b2, a2) = thin(self.left), thin(self.right)
        return scaled_pair(self, np.kron(a1, a2)[:, self.cols], np.kron(b1, b2)[self.rows])


def thin(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return b, a with b @ a = ``matrix`` and as few columns of b as its rank asks for."""
    u, sizes, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rank = max(1, int((sizes > sizes[0] * 1e-7).sum()))
    if rank == min(matrix.shape):
        return (matrix, np.eye(rank)) if matrix.shape[1] == rank else (np.eye(rank), matrix)
    return u[:, :rank] * sizes[:rank], v[:rank]


def scaled_pair(update: Computed, a: np.ndarray, b: np.ndarray) -> LoraPair:
    b = b if update.factors is None else b * update.factors[:, None]
    a, b = (np.ascontiguousarray(factor, np.float32) for factor in (a, b))
    return LoraPair(update.name, a, b, update.scale, update.sources)


@dataclass(kw_only=True, eq=False)
class Added(Update):
    """A whole matrix added: biases that were trained beside B, mergekit's leftovers. ``values`` has the shape of the
    part."""

    values: np.ndarray
    kind = "added tensor"

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        return self.values[i : i + len(weights)]

    def take(self, piece: Piece) -> Update:
        return self.moved(piece, turns=True, values=placed(self.values, piece))


@dataclass(kw_only=True, eq=False)
class Replaced(Update):
    """Rows that were trained whole: ``modules_to_save``, norms, ``trainable_token_indices``.

    ``values`` has the shape of the part, or holds only its rows ``only``.
    """

    values: np.ndarray
    only: np.ndarray | None = None
    kind = "replaced tensor"
    replaces = True

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.only is None else len(self.only)

    def touches(self, first: int, n: int) -> np.ndarray:
        if self.only is None:
            return super().touches(first, n)
        return np.isin(np.arange(first, first + n) - self.offset, self.only)

    def change_of(self, i: int, weights: np.ndarray) -> np.ndarray:
        if self.only is None:
            return self.values[i : i + len(weights)] - weights
        out = np.zeros_like(weights)
        here = np.flatnonzero((self.only >= i) & (self.only < i + len(weights)))
        out[self.only[here] - i] = self.values[here] - weights[self.only[here] - i]
        return out

    def take(self, piece: Piece) -> Update:
        if self.only is not None:
            if piece.rows is not None or piece.cols is not None or piece.scale is not None:
                raise UnsupportedError(
                    f"{self.name}: single rows of {piece.name}, whose layout differs: merge it with PEFT"
                )
            return self.moved(piece)
        return self.moved(piece, turns=True, values=placed(self.values, piece))


def placed(values: np.ndarray, piece: Piece) -> np.ndarray:
    """Return ``values`` with the gathers and factors of ``piece``, turned where it is."""
    moved = gathered(gathered(values, piece.rows), piece.cols, 1)
    moved = moved if piece.scale is None else moved * piece.scale[:, None].astype(np.float32)
    return contiguous(moved.T) if piece.transpose else moved
