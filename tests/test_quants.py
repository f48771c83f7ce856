"""Every quantized type against libgguf, and against llama.cpp's own library where that is quick: the same weights out of
the same bytes, the same bytes out of the same weights. What only one family has stands at the end.
"""

from __future__ import annotations

import libgguf
import numpy as np
import pytest

from lora_gguf.quants.table import CODECS
from tests import codebook_cases
from tests import quant_cases as cases
from tests.common import gemma3_path, smollm2_path, valid_rows

QUANTIZED = [name for name, codec in CODECS.items() if codec.type.block_size > 1]
IN_LIBGGUF = [name for name in QUANTIZED if name != "Q2_0"]
# ggml takes many seconds to prepare the other lattices; K-quants and the like are the same code in libgguf
IN_LLAMA_CPP = ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "IQ2_XXS", "IQ3_XXS", "IQ3_S"]
GRIDS = [name for name in QUANTIZED if CODECS[name].grid]
REAL = [(smollm2_path, "Q4_1"), (gemma3_path, "Q4_K"), (gemma3_path, "Q6_K")]


def is_searched(name: str) -> bool:
    """Whether the quantizer searches a lattice, which takes long."""
    return name.startswith(("IQ1", "IQ2", "IQ3"))


def importances(name: str, n_cols: int) -> list[np.ndarray]:
    return cases.importances(n_cols)[CODECS[name].needs_importance :]


def normal(name: str, n_rows: int, n_cols: int, seed: int) -> np.ndarray:
    """Random weights of as many rows as their quantizer takes quickly."""
    return np.random.default_rng(seed).standard_normal(
        (n_rows // 6 if is_searched(name) else n_rows, n_cols), np.float32
    )


@pytest.mark.parametrize("name", IN_LIBGGUF)
def test_decode_random_blocks(name):
    cases.assert_decodes_as_libgguf(name, cases.random_blocks(name))


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_decode_as_llama_cpp(name):
    blocks = cases.random_blocks(name)
    codebook_cases.assert_same_weights(cases.decode(name, blocks), codebook_cases.llama_cpp_decode(name, blocks))


@pytest.mark.parametrize("path, name", [*REAL, (gemma3_path, "Q5_0"), (gemma3_path, "Q8_0")])
def test_decode_real_tensors(path, name):
    for blocks in cases.real_blocks(path(), name):
        cases.assert_decodes_as_libgguf(name, blocks)


@pytest.mark.parametrize("name", GRIDS)
def test_grid(name):
    if name in IN_LLAMA_CPP:
        codebook_cases.assert_grid(name)
    else:  # codes count from another value than zero
        cases.assert_grid_is_that_of_decode(name, cases.random_blocks(name))


@pytest.mark.parametrize("name", IN_LIBGGUF)
def test_needs_importance_as_ggml(name):
    assert CODECS[name].needs_importance == libgguf.quantize_requires_imatrix(CODECS[name].type.id)


@pytest.mark.parametrize("name", IN_LIBGGUF)
def test_encode_hard_rows(name):
    weights = cases.hard_rows(768 if is_searched(name) else 1024)
    if is_searched(name):  # the squares of 1e20 overflow: there ggml finds no neighbour and reads outside its grid
        weights = np.ascontiguousarray(weights[np.abs(weights).max(1) < 1e15])
    for importance in importances(name, weights.shape[1]):
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", IN_LIBGGUF)
def test_encode_random_weights(name):
    weights = np.float32(0.02) * normal(name, 67, 1536, 1)
    for importance in importances(name, 1536):
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", IN_LIBGGUF)
def test_encode_heavy_tails(name):
    weights = np.random.default_rng(3).standard_t(2, (8 if is_searched(name) else 32, 1024)).astype(np.float32)
    for importance in importances(name, 1024)[:3]:
        cases.assert_encodes_as_libgguf(name, weights, importance)


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_encode_as_llama_cpp(name):
    weights = normal(name, 64, 1024, 1)
    if not is_searched(name):
        weights = np.concatenate([cases.hard_rows(), weights])
    for importance in importances(name, 1024)[:2]:
        codebook_cases.assert_as_llama_cpp(name, weights, importance)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("path, base", REAL)
def test_encode_real_weights(name, path, base):
    for blocks in cases.real_blocks(path(), base, max_rows=4 if is_searched(name) else 16):
        weights = cases.decode(base, blocks)
        weights = np.ascontiguousarray(weights[:, : weights.shape[1] // 256 * 256])
        for importance in importances(name, weights.shape[1])[:2]:
            if name in IN_LIBGGUF:
                cases.assert_encodes_as_libgguf(name, weights, importance)
            if name in IN_LLAMA_CPP:
                codebook_cases.assert_as_llama_cpp(name, weights, importance)
        assert valid_rows(name, cases.encode(name, weights, importance))


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_are_encoded_one_by_one(name):
    weights = np.random.default_rng(2).standard_normal((5, 768), np.float32)
    weights[1, 100:300] = 0
    for importance in importances(name, 768)[:2]:
        one_by_one = [cases.encode(name, weights[i : i + 1], importance) for i in range(5)]
        assert np.array_equal(cases.encode(name, weights, importance), np.concatenate(one_by_one))


@pytest.mark.parametrize("name", QUANTIZED)
def test_non_finite_rows(name):
    for importance in importances(name, 512)[:2]:
        codebook_cases.assert_non_finite_rows_stay_alone(name, importance)


def test_codes_of_the_largest_magnitude():
    weights = np.zeros((1, 32), np.float32)
    weights[0, 3] = -1
    for name, code in [("Q4_0", 0), ("Q4_1", 0), ("Q5_0", 0), ("Q5_1", 0), ("Q8_0", -127)]:
        codes, steps = cases.unpack(name, cases.encode(name, weights))
        assert codes[0, 3] == code and steps.shape == (1, 32 // CODECS[name].grid.group)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_survive(name):
    weights = np.random.default_rng(2).integers(-1, 2, (8, 1024)).astype(np.float32) * np.float32(0.375)
    assert np.array_equal(cases.decode(name, cases.encode(name, weights)), weights)


def test_ternary_grids_are_ternary():
    ranges = {"TQ1_0": (-1, 1), "TQ2_0": (-1, 1), "Q1_0": (0, 1), "Q2_0": (-1, 2)}
    assert ranges == {name: (CODECS[name].grid.code_min, CODECS[name].grid.code_max) for name in ranges}


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_encode_around_every_power_of_two(name):
    """The shared exponent is a logarithm rounded to f32, so it jumps just below a power of two."""
    offsets = np.concatenate([np.arange(-40, 41), np.arange(-4000, 4000, 101)])
    bits = (np.arange(1, 255)[:, None] << 23) + offsets
    weights = np.zeros((bits.size, 64), np.float32)
    weights[:, 40] = -np.minimum(bits, 0x7F7FFFFF).astype(np.uint32).view(np.float32).ravel()
    weights[:, :8] = weights[:, 40:41] * np.linspace(-1, 0.9, 8, dtype=np.float32)
    cases.assert_encodes_as_libgguf(name, weights)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_encode_ties(name):
    """Weights in the middle between two values of the codebook go to the smaller magnitude."""
    rng = np.random.default_rng(2)
    weights = rng.integers(-200, 201, (2000, 64)) / 16 * 2.0 ** rng.integers(-12, 9, (2000, 1))
    cases.assert_encodes_as_libgguf(name, weights.astype(np.float32))
