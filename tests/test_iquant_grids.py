from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.quants.iquant_grids import SHELLS, grid, lattice


@pytest.mark.parametrize("name", list(SHELLS))
def test_neighbours_are_the_nearest_vectors(name):
    """Of some points off the grid, by brute force: all vectors within the first distances, and no others."""
    levels, ranks = np.unique(grid(name), return_inverse=True)
    ranks, points = ranks.reshape(grid(name).shape), lattice(name)
    off_grid = np.flatnonzero(points.points[:, 1])
    assert len(off_grid) + len(ranks) == len(levels) ** points.dims
    for point in off_grid[:: len(off_grid) // 50]:
        coordinates = point // len(levels) ** np.arange(points.dims) % len(levels)
        distances = ((ranks - coordinates) ** 2).sum(1)
        limit = np.unique(distances)[SHELLS[name] - 1]
        first, count = points.points[point]
        vectors = points.neighbours[first : first + count] >> 16
        expected = [v for v in np.lexsort((np.arange(len(ranks)), distances)) if distances[v] <= limit]
        assert vectors[: len(expected)].tolist() == expected
        assert set(vectors[len(expected) :]) <= {expected[-1]}
