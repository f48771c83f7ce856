"""The rotations of OFT and BOFT, from what their factors hold."""

from __future__ import annotations

import math

import numpy as np


def cayley(skew: np.ndarray) -> np.ndarray:
    """Return the rotations (I - S)(I + S)^-1 of skew-symmetric matrices (n, size, size), in f64."""
    skew = skew.astype(np.float64)
    eye = np.eye(skew.shape[-1])
    return np.linalg.solve((eye + skew).swapaxes(-1, -2), (eye - skew).swapaxes(-1, -2)).swapaxes(-1, -2)


def neumann(skew: np.ndarray, n_terms: int) -> np.ndarray:
    """Return OFT's approximation of ``cayley``: I + 2S + 2S² + …, the last power once; PEFT's counts 3 and 4 both end
    with S³."""
    skew = skew.astype(np.float64)
    total, power = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy(), skew
    last = n_terms - 1 if n_terms < 3 else max(3, n_terms - 1)
    for i in range(1, last + 1):
        total += power if i == last and n_terms > 2 else 2 * power
        power = power @ skew
    return total


def oft_blocks(
    triangles: np.ndarray, size: int, eps: float | None, n_terms: int | None, of_embedding: bool
) -> np.ndarray:
    """Return the rotations of OFT, f32 (n, size, size): constrained where there is an ``eps``, by so many terms of a
    series or exact.
    """
    rows, cols = np.triu_indices(size, 1)
    skew = np.zeros((len(triangles), size, size))
    skew[:, rows, cols] = triangles
    skew -= skew.swapaxes(1, 2)
    if eps is not None:
        limit = eps / math.sqrt(len(skew))
        length = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew = np.where(length <= limit, skew, skew * limit / np.maximum(length, 1e-300))
    turns = cayley(skew) if n_terms is None else neumann(skew, n_terms)
    return (turns if of_embedding else turns.swapaxes(1, 2)).astype(np.float32)


def boft_blocks(r: np.ndarray) -> np.ndarray:
    """Return the rotations of BOFT, f32 (stages, n, size, size)."""
    return cayley((r - r.swapaxes(2, 3)) / 2).swapaxes(2, 3).astype(np.float32)


def butterfly(n: int, n_blocks: int, half: int, n_stages: int) -> np.ndarray | None:
    """Return the order of ``n`` columns in one stage of BOFT: in each of ``n_blocks``, pieces of ``half``, even ones
    first.
    """
    if n_stages == 0:
        return None
    pieces = np.arange(n).reshape(n_blocks, -1, half)
    return np.argsort(np.concatenate([pieces[:, ::2], pieces[:, 1::2]], axis=1).ravel())
