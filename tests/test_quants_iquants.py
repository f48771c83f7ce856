from __future__ import annotations

import libgguf
import numpy as np
import pytest

from lora_gguf.quants.iquant_grids import SHELLS, grid, lattice
from lora_gguf.quants.table import CODECS
from tests import codebook_cases
from tests import quant_cases as cases
from tests.common import gemma3_path, smollm2_path, valid_rows

NAMES = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]


def importances(name: str, n_cols: int) -> list[np.ndarray]:
    return cases.importances(n_cols)[CODECS[name].needs_importance :]


@pytest.mark.parametrize("name", NAMES)
def test_decode_random_blocks(name):
    cases.assert_decodes_as_libgguf(name, cases.random_blocks(name))


@pytest.mark.parametrize("name", NAMES)
def test_needs_importance_as_ggml(name):
    assert CODECS[name].needs_importance == libgguf.quantize_requires_imatrix(CODECS[name].type.id)


@pytest.mark.parametrize("name", NAMES)
def test_encode_hard_rows(name):
    """But for 1e20, whose squares overflow: there ggml finds no neighbour and reads outside its grid."""
    weights = cases.hard_rows(768)
    weights = np.ascontiguousarray(weights[np.abs(weights).max(1) < 1e15])
    for importance in importances(name, weights.shape[1]):
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_encode_random_weights(name):
    rng = np.random.default_rng(1)
    for weights in (0.02 * rng.standard_normal((11, 768), np.float32), rng.standard_t(2, (8, 768)).astype(np.float32)):
        for importance in importances(name, 768):
            cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path, base", [(smollm2_path, "Q4_1"), (gemma3_path, "Q4_K")])
def test_encode_real_weights(name, path, base):
    for blocks in cases.real_blocks(path(), base, max_rows=4):
        weights = cases.decode(base, blocks)
        weights = np.ascontiguousarray(weights[:, : weights.shape[1] // 256 * 256])
        for importance in importances(name, weights.shape[1])[:2]:
            cases.assert_encodes_as_libgguf(name, weights, importance)
        assert valid_rows(name, cases.encode(name, weights, importance))


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS", "IQ3_S"])
def test_encode_as_llama_cpp(name):
    """The others take ggml many seconds to prepare; IQ1_M's sums are added in another order in newer llama.cpp."""
    weights = np.random.default_rng(2).standard_normal((8, 1024), np.float32)
    for importance in importances(name, 1024)[:2]:
        codebook_cases.assert_as_llama_cpp(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_encoded_one_by_one(name):
    weights = np.random.default_rng(3).standard_normal((3, 512), np.float32)
    weights[1, 100:300] = 0
    for importance in importances(name, 512)[:2]:
        one_by_one = [cases.encode(name, weights[i : i + 1], importance) for i in range(3)]
        assert np.array_equal(cases.encode(name, weights, importance), np.concatenate(one_by_one))


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_rows(name):
    for importance in importances(name, 512)[:2]:
        codebook_cases.assert_non_finite_rows_stay_alone(name, importance)


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
