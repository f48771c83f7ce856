from __future__ import annotations

import numpy as np
import pytest

from tests import codebook_cases
from tests import quant_cases as cases
from tests.common import gemma3_path, smollm2_path, valid_rows

NAMES = ["IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", NAMES)
def test_decode_random_blocks(name):
    cases.assert_decodes_as_libgguf(name, cases.random_blocks(name))


@pytest.mark.parametrize("name", NAMES)
def test_grid(name):
    codebook_cases.assert_grid(name)


@pytest.mark.parametrize("name", NAMES)
def test_encode_hard_rows(name):
    weights = cases.hard_rows()
    for importance in cases.importances(weights.shape[1]):
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_encode_random_weights(name):
    rng = np.random.default_rng(1)
    heavy_tailed = rng.standard_t(2, (32, 1536)).astype(np.float32)
    for weights in (0.02 * rng.standard_normal((67, 1536), np.float32), heavy_tailed):
        for importance in cases.importances(1536):
            cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path, base", [(smollm2_path, "Q4_1"), (gemma3_path, "Q4_K")])
def test_encode_real_weights(name, path, base):
    for blocks in cases.real_blocks(path(), base, max_rows=16):
        weights = cases.decode(base, blocks)
        weights = np.ascontiguousarray(weights[:, : weights.shape[1] // 256 * 256])
        for importance in cases.importances(weights.shape[1])[:3]:
            cases.assert_encodes_as_libgguf(name, weights, importance)
            codebook_cases.assert_as_llama_cpp(name, weights, importance)
        assert valid_rows(name, cases.encode(name, weights))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_encoded_one_by_one(name):
    weights = np.random.default_rng(2).standard_normal((5, 768), np.float32)
    for importance in cases.importances(768)[:2]:
        one_by_one = [cases.encode(name, weights[i : i + 1], importance) for i in range(5)]
        assert np.array_equal(cases.encode(name, weights, importance), np.concatenate(one_by_one))


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_rows(name):
    for importance in cases.importances(512)[:2]:
        codebook_cases.assert_non_finite_rows_stay_alone(name, importance)
