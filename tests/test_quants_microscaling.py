from __future__ import annotations

import numpy as np
import pytest

from tests import codebook_cases
from tests import quant_cases as cases
from tests.common import gemma3_path, smollm2_path, valid_rows

NAMES = ["MXFP4", "NVFP4"]


@pytest.mark.parametrize("name", NAMES)
def test_decode_random_blocks(name):
    blocks = cases.random_blocks(name)
    cases.assert_decodes_as_libgguf(name, blocks)
    codebook_cases.assert_same_weights(cases.decode(name, blocks), codebook_cases.llama_cpp_decode(name, blocks))


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
    heavy_tailed = rng.standard_t(2, (32, 1024)).astype(np.float32)
    for weights in (0.02 * rng.standard_normal((67, 1536), np.float32), heavy_tailed):
        cases.assert_encodes_as_libgguf(name, weights)
        codebook_cases.assert_as_llama_cpp(name, weights)


@pytest.mark.parametrize("name", NAMES)
def test_encode_around_every_power_of_two(name):
    """The shared exponent is a logarithm rounded to f32, so it jumps just below a power of two."""
    offsets = np.concatenate([np.arange(-40, 41), np.arange(-4000, 4000, 101)])
    bits = (np.arange(1, 255)[:, None] << 23) + offsets
    weights = np.zeros((bits.size, 64), np.float32)
    weights[:, 40] = -np.minimum(bits, 0x7F7FFFFF).astype(np.uint32).view(np.float32).ravel()
    weights[:, :8] = weights[:, 40:41] * np.linspace(-1, 0.9, 8, dtype=np.float32)
    cases.assert_encodes_as_libgguf(name, weights)


@pytest.mark.parametrize("name", NAMES)
def test_encode_ties(name):
    """Weights in the middle between two values of the codebook go to the smaller magnitude."""
    rng = np.random.default_rng(2)
    weights = rng.integers(-200, 201, (2000, 64)) / 16 * 2.0 ** rng.integers(-12, 9, (2000, 1))
    cases.assert_encodes_as_libgguf(name, weights.astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path, base", [(smollm2_path, "Q4_1"), (gemma3_path, "Q4_K")])
def test_encode_real_weights(name, path, base):
    for blocks in cases.real_blocks(path(), base, max_rows=16):
        weights = cases.decode(base, blocks)
        cases.assert_encodes_as_libgguf(name, weights)
        assert valid_rows(name, cases.encode(name, weights))


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_rows(name):
    codebook_cases.assert_non_finite_rows_stay_alone(name, cases.NO_IMPORTANCE)
