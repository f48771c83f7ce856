"""What the tests of the quantized types share: hard weights, real ones, and libgguf as the judge."""

from __future__ import annotations

import libgguf
import numpy as np

from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.quants.table import CODECS

NO_IMPORTANCE = np.empty(0, np.float32)
_TINY_DECADES = (-40, -38, -30, -25, -20, -16, -15, -14, -12, -9, -8, -7, -3)
_HUGE_DECADES = (2, 4, 5, 6, 6.5, 7, 8, 10, 20)


def hard_rows(n_cols: int = 1024) -> np.ndarray:
    """f32 (rows, n_cols): zeros of both signs, outliers, constants, denormals, f16 overflow, one sign only, ties."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(n_cols)
    zero, mixed_zero, outliers = np.zeros(n_cols), np.zeros(n_cols), np.zeros(n_cols)
    mixed_zero[::2] = -0.0
    outliers[[5, 700]] = 3, -2
    faint_parts = normal.copy()
    faint_parts[32:64] *= 1e-6
    faint_parts[300:340] = 0
    faint_parts[512:768] *= 1e-9
    sparse = normal * (rng.random(n_cols) > 0.99)
    rows = [zero, -zero, mixed_zero, outliers, zero + 1.25, zero - 0.3, faint_parts, sparse]
    rows += [normal * 10.0**decade for decade in _TINY_DECADES + _HUGE_DECADES]
    rows += [np.abs(normal), -np.abs(normal), 1000 + 1e-3 * normal, -1000 + 1e-3 * normal, 0.01 * normal - 65504]
    rows += [-1 - 1e-7 * rng.integers(0, 3, n_cols), -1000 - 1e-4 * rng.random(n_cols), rng.standard_cauchy(n_cols)]
    rows += [0.5 * rng.integers(-8, 8, n_cols), 0.5 * rng.integers(-2, 3, n_cols)]
    rows += [np.resize(cycle, n_cols) for cycle in ([1, -1], [-1, 1], [0.5, -1, 1, 2, -2])]
    rows += [normal * 10.0 ** rng.integers(-12, 5, n_cols)]
    return np.array(rows).astype(np.float32)


def importances(n_cols: int) -> list[np.ndarray]:
    """No importance matrix, and five: even, skewed over decades, all one, half of it zero, all zero."""
    rng = np.random.default_rng(8)
    skewed, halved = 1e3 * rng.random(n_cols) ** 8, rng.random(n_cols) > 0.5
    made = [rng.random(n_cols) + 0.1, skewed, np.ones(n_cols), halved, np.zeros(n_cols)]
    return [NO_IMPORTANCE] + [importance.astype(np.float32) for importance in made]


def random_blocks(name: str, n_rows: int = 24, n_cols: int = 2048) -> np.ndarray:
    """Any bytes, so scales are also negative, denormal, infinite and NaN."""
    return np.random.default_rng(9).integers(0, 256, (n_rows, CODECS[name].type.row_bytes(n_cols)), np.uint8)


def real_blocks(path, name: str, max_rows: int = 64):
    """The first rows, as the file has them, of some tensors of type ``name``: uint8 (rows, row_bytes)."""
    with GgufReader(path) as reader:
        tensors = [info for info in reader.tensors.values() if info.type.name == name]
        assert tensors, f"{path}: no tensor of type {name}"
        for info in tensors[:: max(1, len(tensors) // 4)]:
            n_rows = min(max_rows, info.n_rows)
            yield np.array(np.frombuffer(reader.read(info, 0, n_rows), np.uint8)).reshape(n_rows, info.row_bytes)


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    quant = CODECS[name]
    n_cols = blocks.shape[1] // quant.type.block_bytes * quant.type.block_size
    out = np.full((len(blocks), n_cols), np.nan, np.float32)
    quant.decode(blocks, out)
    return out


def encode(name: str, weights: np.ndarray, importance: np.ndarray = NO_IMPORTANCE) -> np.ndarray:
    """Into memory that was not zero before."""
    blocks = np.full((len(weights), CODECS[name].type.row_bytes(weights.shape[1])), 0xA5, np.uint8)
    CODECS[name].encode(weights, importance, blocks)
    return blocks


def unpack(name: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, steps)"""
    quant = CODECS[name]
    n_cols = blocks.shape[1] // quant.type.block_bytes * quant.type.block_size
    codes, steps = (
        np.empty((len(blocks), n_cols), np.int8),
        np.empty((len(blocks), n_cols // quant.grid.group), np.float32),
    )
    quant.grid.unpack(blocks, codes, steps)
    return codes, steps


def assert_decodes_as_libgguf(name: str, blocks: np.ndarray) -> None:
    """Bit for bit; of NaNs only that they are."""
    ours, theirs = decode(name, blocks), libgguf.dequantize_rows(blocks, CODECS[name].type.id)
    differ = (ours.view(np.uint32) != theirs.view(np.uint32)) & ~(np.isnan(ours) & np.isnan(theirs))
    assert not differ.any(), f"{name}: {differ.sum()} of {differ.size} weights, the first at {np.argwhere(differ)[0]}"


def assert_encodes_as_libgguf(name: str, weights: np.ndarray, importance: np.ndarray = NO_IMPORTANCE) -> None:
    imatrix = importance if importance.size else None
    theirs = libgguf.quantize_rows(weights, CODECS[name].type.id, imatrix=imatrix)
    differ = encode(name, weights, importance) != theirs
    assert not differ.any(), f"{name}: rows {np.flatnonzero(differ.any(1))}, the first at byte {np.argwhere(differ)[0]}"


def assert_grid_is_that_of_decode(name: str, blocks: np.ndarray) -> None:
    """A code one higher moves its weight by the group's step and nothing else; unpack then pack is the identity."""
    quant = CODECS[name]
    codes, steps = unpack(name, blocks)
    assert codes.min() == quant.grid.code_min and codes.max() == quant.grid.code_max
    repacked = blocks.copy()
    quant.grid.pack(codes, repacked)
    assert np.array_equal(repacked, blocks)
    is_raised = (np.random.default_rng(10).random(codes.shape) < 0.5) & (codes < quant.grid.code_max)
    quant.grid.pack((codes + is_raised).astype(np.int8), repacked)
    before, after = decode(name, blocks).astype(np.float64), decode(name, repacked).astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.abs(after - before - np.repeat(steps, quant.grid.group, axis=1) * is_raised)
        is_finite = np.isfinite(before) & np.isfinite(after)
        assert is_finite.mean() > 0.5
        assert (off <= 1e-6 * (np.abs(before) + np.abs(after)))[is_finite].all()
