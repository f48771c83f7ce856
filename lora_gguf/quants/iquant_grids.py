"""The grids of IQ1, IQ2 and IQ3 and, for the search, the neighbours of the points that are not on a grid.

The grids are those of the ``gguf`` package, whose import takes 0.3 s: they are loaded when a type is first used.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from lora_gguf.kernel import kernel

PACK = 8  # lists of neighbours are padded to a multiple of this, by repeating the last
SHELLS = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3}
"""How many distances of neighbours ggml considers."""


class Lattice(NamedTuple):
    """All points of ``n_levels`` levels in ``dims`` dimensions; point Σ level_i · n_levels**i has the number i.

    A vector's code holds, for each level from the lowest bits on, 2 * level + 1 in ``width`` bits.
    """

    n_levels: int
    dims: int
    width: int
    first: np.ndarray  # int32 (points,): a point's vector, or where it is off the grid, its first pack of neighbours
    packs: np.ndarray  # int32 (points,): how many packs of neighbours, 0 on the grid
    vectors: np.ndarray  # uint16 (all packs, PACK): the neighbours' vectors, by distance, then by vector
    codes: np.ndarray  # uint32 (all packs, PACK): their codes
    grid: np.ndarray  # uint32 (vectors,): the codes of the grid's vectors


@cache
def grid(name: str) -> np.ndarray:
    """The grid of the type ``name``: f32 (vectors, 8), in IQ3 (vectors, 4)."""
    from gguf import quants

    table = getattr(quants, name)
    table.init_grid()
    return np.ascontiguousarray(table.grid.reshape(table.grid_shape))


@cache
def lattice(name: str) -> Lattice:
    """The grid of the type ``name`` with everybody's neighbours, as ggml's quantizer considers them."""
    levels, ranks = np.unique(grid(name), return_inverse=True)
    ranks = ranks.reshape(grid(name).shape)
    n_levels, dims, width = len(levels), ranks.shape[1], len(levels).bit_length() + (len(levels) < 8)
    points = np.arange(n_levels**dims)[:, None] // n_levels ** np.arange(dims) % n_levels
    first = np.full(len(points), -1, np.int32)
    first[ranks @ n_levels ** np.arange(dims)] = np.arange(len(ranks))
    counts = np.zeros(len(points), np.int32)
    _count_neighbours(points, ranks, SHELLS[name], first, counts)
    packs = (counts + PACK - 1) // PACK
    vectors = np.empty((packs.sum(), PACK), np.uint16)
    _list_neighbours(points, ranks, SHELLS[name], first, packs, vectors)
    codes = ((2 * ranks + 1) @ (1 << width * np.arange(dims))).astype(np.uint32)
    return Lattice(n_levels, dims, width, first, packs, vectors, codes[vectors], codes)


@kernel
def _distances(point, ranks, shells, distances):
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
def _count_neighbours(points, ranks, shells, first, counts):
    distances = np.empty(len(ranks), np.int64)
    for p in range(len(points)):
        if first[p] < 0:
            limit = _distances(points[p], ranks, shells, distances)
            for distance in distances:
                counts[p] += distance <= limit


@kernel
def _list_neighbours(points, ranks, shells, first, packs, vectors):
    flat, at = vectors.reshape(-1), 0
    distances = np.empty(len(ranks), np.int64)
    for p in range(len(points)):
        if first[p] >= 0:
            continue
        first[p] = at // PACK
        limit = _distances(points[p], ranks, shells, distances)
        for shell in range(limit + 1):
            for v in range(len(ranks)):
                if distances[v] == shell:
                    flat[at] = v
                    at += 1
        while at < (first[p] + packs[p]) * PACK:
            flat[at] = flat[at - 1]
            at += 1
