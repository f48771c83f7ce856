"""The best factors of a given rank of a matrix: what an approximate conversion and ``extract`` write.

Small matrices by a full decomposition; large ones by a randomized one (Halko, Martinsson, Tropp, arXiv 0909.4061) with
power iterations, which finds the leading part to within a few tenths of a percent of its energy. The same numbers come
out each time: the random ones have a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXACT_UP_TO = 64
OVERSAMPLING, ITERATIONS = 16, 2
FLAT, MORE_ITERATIONS = 0.9, 4  # where less of the energy is found, the sizes fall slowly, and the basis is still rough
FIRST_RANK, MAX_RANK = 16, 256  # tried where the energy decides


@dataclass(frozen=True)
class Factors:
    """``b`` (m, r) and ``a`` (r, n), f32, with b @ a near a matrix of squared norm ``energy``, of which ``kept`` is in
    them."""

    a: np.ndarray
    b: np.ndarray
    energy: float
    kept: float

    @property
    def share(self) -> float:
        """The share of the energy that is kept, 0 to 1."""
        return self.kept / self.energy if self.energy else 1.0

    @property
    def error(self) -> float:
        """The relative error, in the Frobenius norm."""
        return max(0.0, 1.0 - self.share) ** 0.5


def factor(matrix: np.ndarray, rank: int) -> Factors:
    """Return the leading ``rank`` singular triples of ``matrix`` (m, n) f32 as factors of equal size.

    The rank is at most min(m, n).
    """
    rank = min(rank, *matrix.shape)
    energy = float(np.square(matrix, dtype=np.float64).sum())
    u, sizes, v = _decompose(matrix, rank)
    root = np.sqrt(sizes).astype(np.float32)
    a, b = v.astype(np.float32) * root[:, None], u.astype(np.float32) * root
    return Factors(np.ascontiguousarray(a), np.ascontiguousarray(b), energy, min(energy, float(np.square(sizes).sum())))


def factor_to(matrix: np.ndarray, share: float, most: int = MAX_RANK) -> Factors:
    """Return factors of the least rank that keeps ``share`` of the energy of ``matrix``, or of rank ``most``."""
    limit = min(most, *matrix.shape)
    rank = min(FIRST_RANK, limit)
    found = factor(matrix, rank)
    while found.share < share and rank < limit:
        rank = min(2 * rank, limit)
        found = factor(matrix, rank)
    sizes2 = np.square(np.square(found.a, dtype=np.float64).sum(axis=1))  # each row of a, and column of b, has norm √s
    enough = int(np.searchsorted(np.cumsum(sizes2), share * found.energy)) + 1
    rank = min(enough, rank)
    kept = min(found.energy, float(sizes2[:rank].sum()))
    return Factors(found.a[:rank], np.ascontiguousarray(found.b[:, :rank]), found.energy, kept)


def _decompose(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u (m, rank), the sizes and v (rank, n); exact where the matrix is hardly larger than a sample of it."""
    n_sample = rank + OVERSAMPLING
    if min(matrix.shape) <= max(EXACT_UP_TO, 2 * n_sample):
        u, sizes, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return u[:, :rank], sizes[:rank], v[:rank]
    if matrix.shape[0] < matrix.shape[1]:
        v, sizes, u = _decompose(matrix.T, rank)
        return u.T, sizes, v.T
    rng = np.random.default_rng(0)
    basis = _iterated(matrix, matrix @ rng.standard_normal((matrix.shape[1], n_sample), np.float32), ITERATIONS)
    found = _project(matrix, basis, rank)
    if np.square(found[1]).sum() < FLAT * np.square(matrix, dtype=np.float64).sum():
        found = _project(matrix, _iterated(matrix, basis, MORE_ITERATIONS), rank)
    return found


def _iterated(matrix: np.ndarray, basis: np.ndarray, n: int) -> np.ndarray:
    """Return an orthonormal basis (m, k) of ``basis`` after ``n`` power iterations."""
    for _ in range(n):
        basis = matrix @ np.linalg.qr(matrix.T @ np.linalg.qr(basis)[0])[0]
    return np.linalg.qr(basis)[0]


def _project(matrix: np.ndarray, basis: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the leading ``rank`` triples of a matrix within an orthonormal ``basis``: u, sizes, v."""
    small = (basis.T @ matrix).astype(np.float64)
    squares, turn = np.linalg.eigh(small @ small.T)  # of (rank + 16)², ascending: an SVD of the wide one takes longer
    sizes, turn = np.sqrt(np.maximum(squares[::-1][:rank], 0.0)), turn[:, ::-1][:, :rank]
    v = (turn.T @ small) / np.maximum(sizes, np.finfo(np.float64).tiny)[:, None]
    return basis @ turn.astype(np.float32), sizes, v
