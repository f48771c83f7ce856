"""The best factors of a given rank of a matrix: what an approximate conversion and ``extract`` write.

Small matrices by a full decomposition; large ones by a randomized one (Halko, Martinsson, Tropp, arXiv 0909.4061) with
power iterations, which finds the leading part to within a few tenths of a percent of its energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXACT_UP_TO = 512
OVERSAMPLING, ITERATIONS = 16, 4


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
    """Return the leading ``rank`` singular triples of ``matrix`` (m, n) f32 as factors of equal size; rank at most
    min(m, n)."""
    rank = min(rank, *matrix.shape)
    energy = float(np.square(matrix, dtype=np.float64).sum())
    u, sizes, v = _decompose(matrix, rank)
    root = np.sqrt(sizes)
    a, b = (v * root[:, None]).astype(np.float32), (u * root).astype(np.float32)
    return Factors(np.ascontiguousarray(a), np.ascontiguousarray(b), energy, min(energy, float(np.square(sizes).sum())))


def _decompose(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if min(matrix.shape) <= max(EXACT_UP_TO, 2 * rank):
        u, sizes, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return u[:, :rank], sizes[:rank], v[:rank]
    rng = np.random.default_rng(0)
    basis = matrix @ rng.standard_normal((matrix.shape[1], rank + OVERSAMPLING)).astype(np.float32)
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(basis)[0]
        basis = matrix @ np.linalg.qr(matrix.T @ basis)[0]
    basis = np.linalg.qr(basis)[0]
    u, sizes, v = np.linalg.svd((basis.T @ matrix).astype(np.float64), full_matrices=False)
    return basis.astype(np.float64) @ u[:, :rank], sizes[:rank], v[:rank]
