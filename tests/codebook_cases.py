"""What the tests of the codebook, ternary and grid types share: the grid against ``decode``, and llama.cpp as a
judge.
"""

from __future__ import annotations

import ctypes

import numpy as np

from lora_gguf.quants.table import CODECS
from tests import quant_cases as cases
from tests.common import ggml


def values_of(name: str, codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The weights that the contract promises for codes and steps."""
    quant = CODECS[name]
    units = codes.astype(np.float32) if quant.grid.levels is None else quant.grid.levels[codes - quant.grid.code_min]
    with np.errstate(invalid="ignore", over="ignore"):
        return units * np.repeat(steps, quant.grid.group, axis=1)


def assert_same_weights(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal, of NaNs only that they are, of zeros whatever sign."""
    assert np.array_equal(ours, theirs, equal_nan=True), f"{(ours != theirs).sum()} of {ours.size} weights differ"


def assert_grid(name: str) -> None:
    """Codes and steps are the weights; pack undoes unpack on any bytes, and writes any code and nothing else."""
    quant, blocks = CODECS[name], cases.random_blocks(name)
    codes, steps = cases.unpack(name, blocks)
    assert_same_weights(values_of(name, codes, steps), cases.decode(name, blocks))
    packed = blocks.copy()
    quant.grid.pack(codes, packed)
    assert np.array_equal(packed, blocks)
    wanted = (
        np.random.default_rng(11).integers(quant.grid.code_min, quant.grid.code_max + 1, codes.shape).astype(np.int8)
    )
    quant.grid.pack(wanted, packed)
    found, kept = cases.unpack(name, packed)
    assert np.array_equal(found, wanted)
    assert np.array_equal(kept.view(np.uint32), steps.view(np.uint32))
    assert_same_weights(values_of(name, wanted, steps), cases.decode(name, packed))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def llama_cpp_decode(name: str, blocks: np.ndarray) -> np.ndarray:
    type_ = CODECS[name].type
    out = np.empty((len(blocks), blocks.shape[1] // type_.block_bytes * type_.block_size), np.float32)
    getattr(ggml(), f"dequantize_row_{name.lower()}")(_pointer(blocks), _pointer(out), ctypes.c_int64(out.size))
    return out


def llama_cpp_encode(name: str, weights: np.ndarray, importance: np.ndarray = cases.NO_IMPORTANCE) -> np.ndarray:
    type_, (n_rows, n_cols) = CODECS[name].type, weights.shape
    blocks = np.empty((n_rows, type_.row_bytes(n_cols)), np.uint8)
    sizes = ctypes.c_int64(0), ctypes.c_int64(n_rows), ctypes.c_int64(n_cols)
    imatrix = _pointer(importance) if importance.size else None
    ggml().ggml_quantize_chunk(type_.id, _pointer(weights), _pointer(blocks), *sizes, imatrix)
    return blocks


def assert_as_llama_cpp(name: str, weights: np.ndarray, importance: np.ndarray = cases.NO_IMPORTANCE) -> None:
    differ = cases.encode(name, weights, importance) != llama_cpp_encode(name, weights, importance)
    assert not differ.any(), f"{name}: rows {np.flatnonzero(differ.any(1))}, the first at byte {np.argwhere(differ)[0]}"


def assert_non_finite_rows_stay_alone(name: str, importance: np.ndarray) -> None:
    """NaN and infinity neither crash the kernel nor spoil another row."""
    weights = np.random.default_rng(12).standard_normal((6, importance.size or 512), np.float32)
    clean = cases.encode(name, weights, importance)
    spoiled = weights.copy()
    spoiled[1, ::7], spoiled[3, 5], spoiled[4] = np.nan, np.inf, -np.inf
    blocks = cases.encode(name, spoiled, importance)
    assert np.array_equal(blocks[[0, 2, 5]], clean[[0, 2, 5]])
