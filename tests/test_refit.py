"""Moving a block's grid towards its update: against a least-squares solver, and what it must not break."""

from dataclasses import replace

import numpy as np
import pytest
from libgguf import dequantize_rows, quantize_rows

from lora_gguf.merging.importance import weighting_of
from lora_gguf.merging.refit import reach, refit_row
from lora_gguf.merging.rows import moving_grid
from lora_gguf.merging.tensor import tensor_key
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS
from tests.chunk_cases import chunk_of, merged, recipe

KEY = tensor_key(0, "t")
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def blocks_of(type_name, rows=8, cols=512, seed=0, size=0.02, mean=0.0):
    """Quantized rows, what they decode to, and an update of ``size`` times the weights."""
    rng = np.random.default_rng(seed)
    weights = (rng.normal(size=(rows, cols)) * 0.02 + mean).astype(np.float32)
    blocks = np.frombuffer(bytes(quantize_rows(weights, BY_NAME[type_name].id)), np.uint8).reshape(rows, -1).copy()
    delta = (rng.normal(size=(rows, cols)) * 0.02 * size).astype(np.float32)
    return blocks, decoded(type_name, blocks, cols), delta


def decoded(type_name, blocks, cols=512):
    return np.asarray(dequantize_rows(blocks, BY_NAME[type_name].id, n_per_row=cols)).reshape(len(blocks), cols)


def grid_of(type_name, blocks):
    """The codes and steps of ``blocks``."""
    grid, shape = CODECS[type_name].grid, (len(blocks), 512)
    codes, steps = np.empty(shape, np.int8), np.empty((shape[0], shape[1] // grid.group), np.float32)
    grid.unpack(blocks, codes, steps)
    return codes, steps


def refitted(type_name, importance, size=0.02, mean=0.0, measured=False):
    """The blocks after, the weights before, the update, what is left of it, what the grid moved by, the new steps."""
    quant = CODECS[type_name]
    blocks, before, delta = blocks_of(type_name, size=size, mean=mean)
    codes, steps = grid_of(type_name, blocks)
    how = replace(recipe(type_name), importance=importance[None] if measured else None)
    chunk = chunk_of(how, delta.shape, weighting=weighting_of(quant, importance))
    grid = moving_grid(chunk, quant.grid, blocks, steps)
    unit = (
        codes.astype(np.float32) - quant.grid.zero
        if quant.grid.levels is None
        else quant.grid.levels[codes.astype(int) - quant.grid.code_min]
    )
    assert np.allclose(
        np.repeat(steps, quant.grid.group, 1) * unit - np.repeat(grid[1], quant.grid.group, 1), before, atol=1e-7
    )
    left = delta.copy()
    for i in range(len(delta)):
        refit_row(grid, grid.before, i, unit[i], np.float32(0), steps[i], left[i])
    return blocks, before, delta, left, delta - left, steps


@pytest.mark.parametrize("type_name", TYPES)
def test_what_it_says_is_what_the_blocks_hold(type_name):
    importance = np.random.default_rng(1).uniform(0.1, 10, 512).astype(np.float32)
    blocks, before, delta, left, shift, steps = refitted(type_name, importance)
    after = decoded(type_name, blocks)
    assert np.allclose(after - before, shift, atol=2e-6) and np.allclose(left + shift, delta, atol=1e-6)
    assert np.allclose(grid_of(type_name, blocks)[1], steps, rtol=1e-5)


@pytest.mark.parametrize("type_name", TYPES)
def test_the_weighted_error_never_grows(type_name):
    importance = np.ones(512, np.float32)
    importance[[5, 100, 301, 477]] = 3000
    _, _, delta, left, _, _ = refitted(type_name, importance)
    of_block = (len(delta), -1, CODECS[type_name].type.block_size)
    error, error_before = ((importance * x**2).reshape(of_block).sum(2) for x in (left, delta))
    assert (error <= error_before * (1 + 1e-4)).all()


@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_1", "Q4_K", "Q5_K"])
def test_one_column_that_matters_is_met(type_name):
    importance = np.full(512, 1e-3, np.float32)
    importance[77] = 1e4
    _, _, delta, left, _, _ = refitted(type_name, importance)
    assert np.median(np.abs(left[:, 77])) < 0.3 * np.median(np.abs(delta[:, 77]))


@pytest.mark.parametrize("type_name", TYPES)
def test_auto_is_unbiased(type_name):
    quant = CODECS[type_name]
    importance = np.ones((1, 512), np.float32)
    importance[0, 40] = 1000
    total, tries = 0.0, 60
    for seed in range(tries):
        blocks, before, delta = blocks_of(type_name, rows=16)
        weighting = weighting_of(quant, importance[0])
        new, sums = merged(recipe(type_name, seed=seed), blocks, delta, weighting=weighting)
        moved = decoded(type_name, new) - before
        assert np.isclose(sums[0], (moved.astype(np.float64) * delta).sum(), rtol=2e-2)
        total += (moved * delta).sum() / (delta * delta).sum() / tries
    assert 0.8 < total < 1.1


@pytest.mark.parametrize("type_name", TYPES)
def test_auto_in_chunks_and_without_an_update(type_name):
    blocks, _, delta = blocks_of(type_name, size=1.0)
    how = recipe(type_name)
    whole, _ = merged(how, blocks, delta)
    parts = [merged(how, blocks[i : i + 3], delta[i : i + 3], i)[0] for i in range(0, 8, 3)]
    assert (np.concatenate(parts) == whole).all()
    still, _ = merged(how, blocks, np.zeros_like(delta))
    assert (still == blocks).all()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_auto_keeps_an_update_that_leaves_the_grid(type_name):
    blocks, before, delta = blocks_of(type_name, size=3.0)
    new, sums = merged(recipe(type_name), blocks, delta)
    moved = decoded(type_name, new).astype(np.float64) - before
    assert (moved * delta).sum() / (delta.astype(np.float64) ** 2).sum() > 0.9
    assert np.isclose(sums[0] / sums[1], (moved * delta).sum() / (delta.astype(np.float64) ** 2).sum(), atol=1e-3)


@pytest.mark.parametrize("type_name", TYPES)
def test_blocks_of_zeros_and_of_one_value(type_name):
    quant = CODECS[type_name]
    for value in (0.0, 0.01, -0.01):
        weights = np.full((2, 512), value, np.float32)
        blocks = np.frombuffer(bytes(quantize_rows(weights, quant.type.id)), np.uint8).reshape(2, -1).copy()
        delta = (np.random.default_rng(0).normal(size=(2, 512)) * 1e-3).astype(np.float32)
        new, sums = merged(recipe(type_name), blocks, delta)
        assert np.isfinite(sums).all() and np.isfinite(decoded(type_name, new)).all()


@pytest.mark.parametrize(("source", "target"), [("IQ4_NL", "Q8_0"), ("Q4_1", "Q8_0"), ("Q4_K", "Q8_0")])
def test_a_small_update_survives_a_type_on_whose_grid_the_old_one_lies(source, target):
    how = recipe(source, target=target)
    blocks, before, delta = blocks_of(source, rows=128, size=0.004)
    new, sums = merged(how, blocks, delta)
    moved = decoded(target, new).astype(np.float64) - before
    fresh, _ = merged(recipe(source, "fresh", target), blocks, delta)
    kept, erased = (
        ((x * delta).sum() / (delta.astype(np.float64) ** 2).sum()) for x in (moved, decoded(target, fresh) - before)
    )
    assert abs(kept - 1) < 0.15 and np.isclose(sums[0] / sums[1], kept, atol=1e-3)
    if source == "IQ4_NL":
        assert erased < 0.6
    parts = [merged(how, blocks[i : i + 5], delta[i : i + 5], i)[0] for i in range(0, 128, 5)]
    assert (np.concatenate(parts) == new).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_moving_the_grid_after_rounding_brings_each_block_nearer(type_name):
    importance = np.random.default_rng(1).uniform(0.1, 2, 512).astype(np.float32)
    importance[[5, 100, 301, 477]] = 300
    codec = CODECS[type_name]
    weighed = weighting_of(codec, importance)
    blocks, before, delta = blocks_of(type_name, rows=32)
    errors = []
    for weighting in (weighed, replace(weighed, after=np.empty(0, np.int64))):
        new, _ = merged(recipe(type_name), blocks, delta, weighting=weighting)
        squares = importance * np.square(decoded(type_name, new) - before - delta)
        errors.append(squares.reshape(len(delta), -1, codec.type.block_size).sum(2))
    after, without = errors
    assert (after <= without * (1 + 1e-3) + 1e-9).all() and after.sum() < 0.97 * without.sum()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_an_update_as_large_as_the_step_needs_no_chance(type_name):
    codec = CODECS[type_name]
    blocks, before, delta = blocks_of(type_name, rows=32)
    steps = np.empty((32, 512 // codec.grid.group), np.float32)
    codec.grid.unpack(blocks, np.empty(delta.shape, np.int8), steps)
    step = np.repeat(np.abs(steps), codec.grid.group, axis=1)
    delta = (np.random.default_rng(1).normal(size=delta.shape) * step * 0.8).astype(np.float32)
    auto, dither = (decoded(type_name, merged(recipe(type_name, way), blocks, delta)[0]) for way in ("auto", "dither"))
    inside = np.abs(dither - before - delta) < step  # what has not left the range of the codes
    error, error_by_chance = ((np.square((after - before - delta) / step)[inside]).mean() for after in (auto, dither))
    assert error < 0.65 * error_by_chance
    assert ((auto - before) * delta).sum() / np.square(delta).sum() > 0.9


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("mean", [0.0, 0.15, -0.15])
@pytest.mark.parametrize("type_name", TYPES)
def test_a_move_takes_no_weight_far(type_name, mean, measured):
    importance = np.full(512, 1e-3, np.float32)
    importance[[77, 90, 400]] = 1e5
    grid, size = CODECS[type_name].grid, CODECS[type_name].type.block_size
    moved = refitted(type_name, importance, size=2.0, mean=mean, measured=measured)[4]
    steps = grid_of(type_name, blocks_of(type_name, size=2.0, mean=mean)[0])[1]
    largest = np.abs(steps).reshape(len(steps), -1, size // grid.group).max(2)
    farthest = (np.abs(moved).reshape(len(moved), -1, size).max(2) / largest).max()
    assert reach(grid, measured) / 4 < farthest < 1.5 * reach(grid, measured)


@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_1"])
def test_what_the_grid_takes_of_all_weights_comes_back(type_name):
    """A column that matters moves the minimum, and so all weights of its block: rounding must undo that by chance."""
    rng, importance = np.random.default_rng(5), np.full(512, 1e-3, np.float32)
    importance[77] = 1e5
    blocks, before, _ = blocks_of(type_name, rows=256)
    step = np.repeat(grid_of(type_name, blocks)[1], CODECS[type_name].grid.group, axis=1)
    delta = (step * rng.normal(size=step.shape) * 0.15).astype(np.float32)
    sign = np.where(rng.random(256) < 0.5, -1, 1).astype(np.float32)
    delta[:, 77] = 0.45 * sign * step[:, 77]
    new, _ = merged(recipe(type_name), blocks, delta, weighting=weighting_of(CODECS[type_name], importance))
    error = ((decoded(type_name, new) - before - delta) / step)[:, 64:96]
    assert abs((sign * error.mean(axis=1)).mean()) < 0.05
