from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.quants.table import CODECS
from tests import quant_cases as cases
from tests.common import gemma3_path, smollm2_path

NAMES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
REAL = [(smollm2_path, "Q4_1"), (gemma3_path, "Q5_0"), (gemma3_path, "Q8_0")]


@pytest.mark.parametrize("name", NAMES)
def test_decode_random_blocks(name):
    cases.assert_decodes_as_libgguf(name, cases.random_blocks(name))


@pytest.mark.parametrize("path, name", REAL)
def test_decode_real_tensors(path, name):
    for blocks in cases.real_blocks(path(), name):
        cases.assert_decodes_as_libgguf(name, blocks)


@pytest.mark.parametrize("name", NAMES)
def test_grid(name):
    cases.assert_grid_is_that_of_decode(name, cases.random_blocks(name))


@pytest.mark.parametrize("name", NAMES)
def test_encode_hard_rows(name):
    weights = cases.hard_rows()
    for importance in cases.importances(weights.shape[1]):
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_encode_random_weights(name):
    weights = 0.02 * np.random.default_rng(1).standard_normal((67, 1536), np.float32)
    for importance in cases.importances(1536):
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_encode_real_weights(name):
    for blocks in cases.real_blocks(smollm2_path(), "Q4_1"):
        weights = cases.decode("Q4_1", blocks)
        for importance in cases.importances(weights.shape[1])[:3]:
            cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_encoded_one_by_one(name):
    weights = np.random.default_rng(2).standard_normal((5, 96), np.float32)
    for importance in cases.importances(96)[:2]:
        one_by_one = [cases.encode(name, weights[i : i + 1], importance) for i in range(5)]
        assert np.array_equal(cases.encode(name, weights, importance), np.concatenate(one_by_one))


def test_codes_of_the_largest_magnitude():
    weights = np.zeros((1, 32), np.float32)
    weights[0, 3] = -1
    for name, code in [("Q4_0", 0), ("Q4_1", 0), ("Q5_0", 0), ("Q5_1", 0), ("Q8_0", -127)]:
        codes, steps = cases.unpack(name, cases.encode(name, weights))
        assert codes[0, 3] == code and steps.shape == (1, 32 // CODECS[name].grid.group)
