"""The product of two thin matrices, the same bits on every machine."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import kernel, part
from lora_gguf.kernels.lanes import N, fma, load, splat, store

# rows of a product in work at once: more of them, a power of two of bytes apart, throw each other out of the cache
_ROWS = 24


@part
def _three_rows(b: np.ndarray, tile: np.ndarray, i: int, j: int, delta: np.ndarray) -> None:
    """The columns ``j`` to ``j`` + 32 of the three rows of the product from ``i`` on; ``tile`` (r, 32) are those of the
    right factor.
    """
    b0, b1, b2 = b[i], b[i + 1], b[i + 2]
    y0 = y1 = y2 = z0 = z1 = z2 = splat(np.float32(0.0))
    for k in range(len(tile)):
        left, right = load(tile, (k, 0)), load(tile, (k, N))
        y0, z0 = fma(splat(b0[k]), left, y0), fma(splat(b0[k]), right, z0)
        y1, z1 = fma(splat(b1[k]), left, y1), fma(splat(b1[k]), right, z1)
        y2, z2 = fma(splat(b2[k]), left, y2), fma(splat(b2[k]), right, z2)
    store(y0, delta, (i, j))
    store(y1, delta, (i + 1, j))
    store(y2, delta, (i + 2, j))
    store(z0, delta, (i, j + N))
    store(z1, delta, (i + 1, j + N))
    store(z2, delta, (i + 2, j + N))


def low_rank(b: np.ndarray, a: np.ndarray, delta: np.ndarray) -> None:
    """Compute delta = b @ a in f32: b (rows, r), a (r, cols), delta (rows, cols). The sum over r runs in one order for
    every element, each step rounded once, whatever the chunk and the machine: BLAS does not promise that."""
    _product(b, a, np.empty((len(a), 2 * N), np.float32), delta)


@kernel
def _product(b: np.ndarray, a: np.ndarray, tile: np.ndarray, delta: np.ndarray) -> None:
    n_rows, n_cols = delta.shape
    if n_rows < 3 or n_cols < 2 * N:
        delta[:] = np.float32(0.0)
        for i in range(n_rows):
            for k in range(len(a)):
                for j in range(n_cols):
                    delta[i, j] = fma(b[i, k], a[k, j], delta[i, j])
        return
    for top in range(0, n_rows, _ROWS):
        for column in range(0, n_cols, 2 * N):
            j = min(column, n_cols - 2 * N)  # the last tile may overlap the one before, and so may the last three rows
            for k in range(len(a)):
                store(load(a, (k, j)), tile, (k, 0))
                store(load(a, (k, j + N)), tile, (k, N))
            for i in range(top, min(top + _ROWS, n_rows), 3):
                _three_rows(b, tile, min(i, n_rows - 3), j, delta)
