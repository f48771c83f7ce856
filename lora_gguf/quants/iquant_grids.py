"""The grids of IQ1, IQ2 and IQ3 and, for the search, the neighbours of the points that are not on a grid.

The grids are those of the ``gguf`` package, whose import takes 0.3 s: they are loaded when a type is first used.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from lora_gguf.kernels.decorators import kernel

PACK = 8  # lists of neighbours are padded to a multiple of this, by repeating the last
SHELLS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3}
"""How many distances of neighbours ggml considers."""


class Lattice(NamedTuple):
    """All points of ``n_levels`` levels in ``dims`` dimensions; point Σ level_i · n_levels**i has the number i.

    ``points`` int32 (points, 2): a point's vector and 0, or where it is off the grid, its first neighbour and how many,
    at most ``longest``. ``neighbours`` uint32: the vectors near each point, by distance, then by number; the number is
    in the upper half, the lower half holds the levels, 16 / dims bits each, the first one lowest.
    """

    n_levels: int
    dims: int
    longest: int
    points: np.ndarray
    neighbours: np.ndarray


@cache
def grid(name: str) -> np.ndarray:
    """Return the grid of the type ``name``: f32 (vectors, 8), in IQ3 (vectors, 4)."""
    from gguf import quants

    table = getattr(quants, name)
    table.init_grid()
    return np.ascontiguousarray(table.grid.reshape(table.grid_shape))


@cache
def lattice(name: str) -> Lattice:
    """Return the grid of the type ``name`` with everybody's neighbours, as ggml's quantizer considers them."""
    levels, ranks = np.unique(grid(name), return_inverse=True)
    ranks = ranks.reshape(grid(name).shape)
    n_levels, dims = len(levels), ranks.shape[1]
    coordinates = np.arange(n_levels**dims)[:, None] // n_levels ** np.arange(dims) % n_levels
    points = np.full((len(coordinates), 2), (-1, 0), np.int32)
    points[ranks @ n_levels ** np.arange(dims), 0] = np.arange(len(ranks))
    _count_neighbours(coordinates, ranks, SHELLS[name], points)
    vectors = np.empty(points[:, 1].sum(), np.uint32)
    _list_neighbours(coordinates, ranks, SHELLS[name], points, vectors)
    codes = (ranks << 16 // dims * np.arange(dims)).sum(1).astype(np.uint32)
    return Lattice(n_levels, dims, int(points[:, 1].max()), points, vectors << 16 | codes[vectors])


@kernel
def _distances(point: np.ndarray, ranks: np.ndarray, shells: np.ndarray, distances: np.ndarray) -> int:
    """The squared distance of each vector to ``point``; returns the largest that is within the nearest ``shells``."""
    seen = np.zeros(1024, np.bool_)
    for v in range(len(ranks)):
        distance = 0
        for i in range(len(point)):
            difference = ranks[v, i] - point[i]
            distance += difference * difference
        distances[v] = distance
        seen[distance] = True
    for distance in range(len(seen)):
        shells -= seen[distance]
        if shells == 0:
            return distance
    return len(seen)


@kernel
def _count_neighbours(coordinates: np.ndarray, ranks: np.ndarray, shells: np.ndarray, points: np.ndarray) -> None:
    distances = np.empty(len(ranks), np.int64)
    for p in range(len(points)):
        if points[p, 0] >= 0:
            continue
        limit, count = _distances(coordinates[p], ranks, shells, distances), 0
        for distance in distances:
            count += distance <= limit
        points[p, 1] = (count + PACK - 1) // PACK * PACK


@kernel
def _list_neighbours(
    coordinates: np.ndarray, ranks: np.ndarray, shells: np.ndarray, points: np.ndarray, vectors: np.ndarray
) -> None:
    at = 0
    distances = np.empty(len(ranks), np.int64)
    for p in range(len(points)):
        if points[p, 1] == 0:
            continue
        points[p, 0] = at
        limit = _distances(coordinates[p], ranks, shells, distances)
        for shell in range(limit + 1):
            for v in range(len(ranks)):
                if distances[v] == shell:
                    vectors[at] = v
                    at += 1
        while at < points[p, 0] + points[p, 1]:
            vectors[at] = vectors[at - 1]
            at += 1
