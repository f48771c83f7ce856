from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.quants.table import CODECS
from tests import codebook_cases
from tests import quant_cases as cases
from tests.common import smollm2_path, valid_rows

NAMES = ["TQ1_0", "TQ2_0", "Q1_0", "Q2_0"]
IN_LIBGGUF = NAMES[:3]


@pytest.mark.parametrize("name", IN_LIBGGUF)
def test_decode_random_blocks(name):
    cases.assert_decodes_as_libgguf(name, cases.random_blocks(name))


@pytest.mark.parametrize("name", NAMES)
def test_decode_as_llama_cpp(name):
    blocks = cases.random_blocks(name)
    codebook_cases.assert_same_weights(cases.decode(name, blocks), codebook_cases.llama_cpp_decode(name, blocks))


@pytest.mark.parametrize("name", NAMES)
def test_grid(name):
    codebook_cases.assert_grid(name)


@pytest.mark.parametrize("name", IN_LIBGGUF)
def test_encode_hard_rows(name):
    weights = cases.hard_rows()
    for importance in cases.importances(weights.shape[1]):
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_encode_as_llama_cpp(name):
    weights = np.concatenate([cases.hard_rows(), np.random.default_rng(1).standard_normal((64, 1024), np.float32)])
    for importance in cases.importances(1024)[:2]:
        codebook_cases.assert_as_llama_cpp(name, weights, importance)


@pytest.mark.parametrize("name", NAMES)
def test_encode_real_weights(name):
    for blocks in cases.real_blocks(smollm2_path(), "Q4_1", max_rows=16):
        weights = cases.decode("Q4_1", blocks)
        weights = np.ascontiguousarray(weights[:, : weights.shape[1] // 256 * 256])
        codebook_cases.assert_as_llama_cpp(name, weights)
        assert valid_rows(name, cases.encode(name, weights))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_survive(name):
    weights = np.random.default_rng(2).integers(-1, 2, (8, 1024)).astype(np.float32) * np.float32(0.375)
    assert np.array_equal(cases.decode(name, cases.encode(name, weights)), weights)


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_rows(name):
    codebook_cases.assert_non_finite_rows_stay_alone(name, cases.NO_IMPORTANCE)


def test_ternary_grids_are_ternary():
    assert [(CODECS[name].grid.code_min, CODECS[name].grid.code_max) for name in NAMES] == [
        (-1, 1),
        (-1, 1),
        (0, 1),
        (-1, 2),
    ]
