"""Rows that get a new grid keep their update, whether the base lies on that grid already or not."""

import numpy as np
import pytest
from libgguf import dequantize_rows, quantize_rows

from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS
from tests.chunk_cases import merged, recipe

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
ROWS, COLS = 96, 1024


def decoded(type_name, blocks):
    return np.asarray(dequantize_rows(blocks, BY_NAME[type_name].id, n_per_row=COLS)).reshape(len(blocks), COLS)


def case(grid, size=0.03, seed=0):
    """Weights on the grid of a type, or on none, as F32 rows, and an update of ``size`` times their deviation."""
    rng = np.random.default_rng(seed)
    weights = (rng.normal(size=(ROWS, COLS)) * 0.02).astype(np.float32)
    if grid:
        weights = decoded(
            grid, np.frombuffer(bytes(quantize_rows(weights, BY_NAME[grid].id)), np.uint8).reshape(ROWS, -1)
        )
    delta = (rng.normal(size=weights.shape) * 0.02 * size).astype(np.float32)
    return np.ascontiguousarray(weights, np.float32), delta


def kept(target, weights, delta, rounding="auto", seed=0):
    blocks, sums = merged(recipe("F32", rounding, target, seed), weights.view(np.uint8), delta)
    moved = decoded(target, blocks).astype(np.float64) - weights
    share = (moved * delta).sum() / (delta.astype(np.float64) ** 2).sum()
    assert np.isclose(sums[0] / sums[1], share, atol=1e-3)
    return share


@pytest.mark.parametrize("target", TYPES)
def test_an_update_below_the_step_survives_the_grid_that_the_base_lies_on(target):
    size = 0.004 if target in ("Q8_0", "Q6_K") else 0.02
    weights, delta = case(target, size)
    assert kept(target, weights, delta, "nearest") < 0.5
    for rounding in ("auto", "dither"):
        share = np.mean([kept(target, weights, delta, rounding, seed) for seed in range(3)])
        assert abs(share - (1 - beyond(target, weights, delta))) < 0.1


def beyond(target, weights, delta):
    """The share of the update's energy that points beyond the first or the last code: no rounding can keep it. It is a
    sixth in Q2_K, which has four codes.
    """
    codec, grid = CODECS[target], CODECS[target].grid
    blocks = codec.encoded(weights, np.empty(0, np.float32))
    codes, steps = (
        np.empty(weights.shape, np.int8),
        np.empty((len(weights), weights.shape[1] // grid.group), np.float32),
    )
    grid.unpack(blocks, codes, steps)
    up = delta * np.repeat(steps, grid.group, 1) > 0
    out = np.where(up, codes == grid.code_max, codes == grid.code_min)
    return np.square(delta[out], dtype=np.float64).sum() / np.square(delta, dtype=np.float64).sum()


@pytest.mark.parametrize(
    ("source", "target"), [("Q4_0", "Q4_1"), ("Q4_1", "Q4_K"), ("Q4_0", "IQ4_NL"), ("Q4_K", "Q5_K")]
)
def test_it_survives_a_grid_that_is_another_types(source, target):
    weights, delta = case(source, 0.02)
    assert abs(np.mean([kept(target, weights, delta, seed=seed) for seed in range(3)]) - 1) < 0.15


@pytest.mark.parametrize("target", [name for name in TYPES if name != "Q2_K"])
def test_a_base_on_no_grid_gets_what_the_quantizer_finds(target):
    weights, delta = case(None)
    auto, fresh = (merged(recipe("F32", way, target), weights.view(np.uint8), delta)[0] for way in ("auto", "fresh"))
    assert (auto == fresh).all(axis=1).mean() > 0.95


@pytest.mark.parametrize("target", TYPES)
def test_an_update_of_a_base_on_no_grid_survives(target):
    weights, delta = case(None, 0.02)
    assert np.mean([kept(target, weights, delta, seed=seed) for seed in range(3)]) > 0.85


@pytest.mark.parametrize("target", ["Q4_0", "IQ4_NL"])
def test_large_updates_and_rows_without_one_get_what_the_quantizer_finds(target):
    weights, delta = case(target, 2.0)
    delta[::2] = 0
    auto, fresh = (merged(recipe("F32", way, target), weights.view(np.uint8), delta)[0] for way in ("auto", "fresh"))
    assert (auto == fresh).all()


@pytest.mark.parametrize("target", ["Q4_1", "MXFP4", "Q6_K"])
def test_the_bytes_do_not_depend_on_chunks(target):
    weights, delta = case(target)
    how, raw = recipe("F32", target=target), weights.view(np.uint8)
    whole, _ = merged(how, raw, delta)
    parts = [merged(how, raw[i : i + 7], delta[i : i + 7], i)[0] for i in range(0, ROWS, 7)]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize(("target", "dtype"), [("BF16", None), ("F16", np.float16)])
def test_a_small_update_survives_half_precision(target, dtype):
    weights, delta = case(None, 1e-4)
    weights = (
        weights.astype(dtype).astype(np.float32) if dtype else (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)
    )
    value = (
        (lambda b: b.view(np.float16).astype(np.float32))
        if dtype
        else (lambda b: (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    )
    shares = []
    for seed in range(4):
        blocks, _ = merged(recipe("F32", "auto", target, seed), weights.view(np.uint8), delta)
        moved = value(blocks).astype(np.float64) - weights
        shares.append((moved * delta).sum() / (delta.astype(np.float64) ** 2).sum())
    assert abs(np.mean(shares) - 1) < 0.15
