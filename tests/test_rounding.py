"""The rounding kernels against plain numpy, and what they promise: no bias, no dependence on chunks."""

import numpy as np
import pytest

from lora_gguf.kernels.chance import key_of_row, uniform
from lora_gguf.kernels.low_rank import low_rank
from lora_gguf.merging.halves import round_bf16, round_f16, tally_rows
from lora_gguf.merging.refit import NO_GRID, refit_row
from lora_gguf.merging.rounding import (
    OUTSIDE,
    Rule,
    Watched,
    codebook,
    round_codes,
    round_levels,
)
from lora_gguf.merging.rows import moving_grid
from lora_gguf.merging.tensor import tensor_key
from lora_gguf.quants.table import CODECS
from tests.chunk_cases import chunk_of, recipe

KEY = tensor_key(0, "blk.0.attn_q.weight")
LEVELS = np.array([-12, -8, -6, -4, -3, -2, -1, -0.0, 0, 1, 2, 3, 4, 6, 8, 12], np.float32)


def grid(rows=40, cols=512, group=32, seed=0, size=0.1):
    """Random codes 0 to 15, steps of both signs, and updates of ``size`` steps."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (rows, cols)).astype(np.int8)
    steps = (rng.uniform(0.01, 0.1, (rows, cols // group)) * rng.choice([-1, 1], (rows, cols // group))).astype(
        np.float32
    )
    delta = (rng.normal(size=(rows, cols)) * np.repeat(np.abs(steps), group, 1) * size).astype(np.float32)
    return codes, steps, delta


def rule(spread, key):
    """Of the codes 0 to 15."""
    return Rule(np.float32(spread), key, 0, np.float32(0), np.float32(15))


def watched(codes, sums):
    """No grid that moves."""
    return Watched(NO_GRID, np.zeros((len(codes), 1), np.float32), np.empty((2, codes.shape[1]), np.float32), sums)


def rounded(codes, steps, delta, spread=1.0, key=KEY, first_row=0):
    codes, sums = codes.copy(), np.zeros(4)
    limits = np.float32(0), np.float32(15)
    round_codes(
        codes,
        steps,
        delta,
        Rule(np.float32(spread), key, first_row, *limits),
        watched(codes, sums),
    )
    return codes, sums


@pytest.mark.parametrize("rank", [1, 3, 4, 16, 21])
def test_low_rank_is_the_product_in_whatever_chunks(rank):
    rng = np.random.default_rng(rank)
    b, a = rng.normal(size=(9, rank)).astype(np.float32), rng.normal(size=(rank, 77)).astype(np.float32)
    delta, parts = np.empty((9, 77), np.float32), np.empty((9, 77), np.float32)
    low_rank(b, a, delta)
    assert np.allclose(delta, b.astype(np.float64) @ a, rtol=1e-4, atol=1e-5)
    for row in range(9):
        low_rank(b[row : row + 1], a, parts[row : row + 1])
    assert (parts == delta).all()


@pytest.mark.parametrize("group", [16, 32, 64, 256])
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_nearest_is_the_nearest_code(group, size):
    codes, steps, delta = grid(group=group, size=size)
    got, sums = rounded(codes, steps, delta, spread=0.0)
    wanted = np.clip(np.floor(codes + (delta / np.repeat(steps, group, 1)) + np.float32(0.5)), 0, 15)
    assert (got == wanted).mean() > 0.9999
    moved = (got.astype(np.float64) - codes) * np.repeat(steps, group, 1)
    assert np.allclose(
        sums,
        [(moved * delta).sum(), (delta.astype(np.float64) ** 2).sum(), (moved**2).sum(), (got != codes).sum()],
        rtol=1e-4,
    )


@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_0", "Q4_K", "Q6_K"])
def test_codes_round_what_the_grid_has_left(type_name):
    rng, quant = np.random.default_rng(4), CODECS[type_name]
    weights = rng.normal(size=(24, 512)).astype(np.float32)
    delta = (rng.normal(size=weights.shape) * 0.2).astype(np.float32)
    delta[0] *= 5
    blocks = np.empty((24, quant.type.row_bytes(512)), np.uint8)
    quant.encode(weights, np.empty(0, np.float32), blocks)
    before, codes, steps = (
        np.empty_like(weights),
        np.empty(weights.shape, np.int8),
        np.empty((24, 512 // quant.grid.group), np.float32),
    )
    quant.decode(blocks, before)
    quant.grid.unpack(blocks, codes, steps)
    old, sums, outside = codes.copy(), np.zeros(4), np.zeros((24, 512 // quant.type.block_size), np.float32)
    limits = np.float32(quant.grid.code_min), np.float32(quant.grid.code_max)
    moved_first, before_steps = blocks.copy(), steps.copy()
    once = moving_grid(chunk_of(recipe(type_name), weights.shape), quant.grid, moved_first, before_steps)
    for i in range(24):
        zero, unit = np.float32(quant.grid.zero), codes[i].astype(np.float32)
        refit_row(once, once.before, i, unit, zero, before_steps[i], delta[i].copy())
    grid = moving_grid(chunk_of(recipe(type_name), weights.shape), quant.grid, blocks, steps)
    rule = Rule(np.float32(0), KEY, 0, *limits, np.float32(quant.grid.zero))
    round_codes(codes, steps, delta, rule, Watched(grid, outside, np.empty((2, 512), np.float32), sums))
    moved_grid, after, step = (
        np.empty_like(weights),
        np.empty_like(weights),
        np.repeat(before_steps.astype(np.float64), quant.grid.group, 1),
    )
    quant.decode(moved_first, moved_grid)
    ideal = old + (before + delta - moved_grid.astype(np.float64)) / step
    assert (codes == np.clip(np.floor(ideal + 0.5), *limits)).mean() > 0.999
    gone = np.maximum(np.abs(ideal - np.clip(ideal, *limits)) - 1, 0)
    gone = np.square(gone).reshape(24, -1, quant.type.block_size).mean(2)
    assert np.allclose(outside, gone, rtol=1e-3, atol=1e-4) and (gone > 1e-3).sum() > 5
    quant.grid.pack(codes, blocks)
    quant.decode(blocks, after)
    counted = np.repeat(outside <= OUTSIDE, quant.type.block_size, axis=1)
    achieved, wanted = (after.astype(np.float64) - before) * counted, delta.astype(np.float64) * counted
    assert np.allclose(sums[:3], [(achieved * wanted).sum(), (wanted**2).sum(), (achieved**2).sum()], rtol=1e-4)
    assert sums[3] == (codes != old).sum() and not counted.all()


def test_dither_is_unbiased():
    codes, steps, delta = grid(rows=2, size=0.2)
    codes[:] = 7
    tries = 2000
    mean = (
        sum(rounded(codes, steps, delta, key=tensor_key(seed, "t"))[0].astype(np.float64) for seed in range(tries))
        / tries
        - 7
    )
    ratio = delta / np.repeat(steps, 32, 1)
    error = (mean - ratio) / np.sqrt(np.maximum(np.abs(ratio) * (1 - np.minimum(np.abs(ratio), 1)), 1e-3) / tries)
    assert abs(error.mean()) < 0.15 and 0.9 < error.std() < 1.1


def test_dither_moves_by_less_than_a_step():
    codes, steps, delta = grid(size=3.0)
    codes[:] = 7
    got, _ = rounded(codes, steps, delta)
    moved = got - np.float64(7)
    ratio = np.clip(delta / np.repeat(steps, 32, 1), -7, 8)
    assert (np.abs(moved - ratio) < 1).all()


def test_codes_stay_on_the_grid():
    codes, steps, delta = grid(size=100.0)
    got, _ = rounded(codes, steps, delta)
    assert got.min() == 0 and got.max() == 15


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_no_update_changes_nothing(spread):
    codes, steps, delta = grid()
    got, sums = rounded(codes, steps, delta * 0, spread)
    assert (got == codes).all() and (sums == 0).all()
    steps[:] = 0
    got, sums = rounded(codes, steps, delta, spread)
    assert (got == codes).all() and sums[0] == 0


def test_the_bytes_depend_on_seed_name_and_row_but_not_on_chunks():
    codes, steps, delta = grid()
    whole, _ = rounded(codes, steps, delta)
    parts = [rounded(codes[i : i + 7], steps[i : i + 7], delta[i : i + 7], first_row=i)[0] for i in range(0, 40, 7)]
    assert (np.concatenate(parts) == whole).all()
    for other in (tensor_key(1, "blk.0.attn_q.weight"), tensor_key(0, "blk.1.attn_q.weight")):
        assert (rounded(codes, steps, delta, key=other)[0] != whole).any()
    same_rows = rounded(np.tile(codes[:1], (40, 1)), np.tile(steps[:1], (40, 1)), np.tile(delta[:1], (40, 1)))[0]
    assert len(np.unique(same_rows, axis=0)) == 40


def test_rows_and_columns_are_uncorrelated():
    ones = np.ones((256, 256), np.float32)
    codes = rounded(np.full((256, 256), 7, np.int8), ones[:, :8].copy(), ones * np.float32(0.5))[0] - np.float64(7.5)
    limit = 6 / np.sqrt(codes.size)
    assert abs((codes[1:] * codes[:-1]).mean() * 4) < limit and abs((codes[:, 1:] * codes[:, :-1]).mean() * 4) < limit
    assert np.abs(codes.mean(0)).max() < 0.2 and np.abs(codes.mean(1)).max() < 0.2


@pytest.mark.parametrize("levels", [LEVELS, CODECS["IQ4_NL"].grid.levels], ids=["E2M1", "IQ4"])
def test_a_codebook_rounds_between_uneven_levels(levels):
    codes, steps, delta = grid(group=32, size=1.0)
    book, gap, of_step = codebook(*levels), np.diff(levels).max(), np.repeat(steps, 32, 1)
    delta *= gap / 4
    got, sums = codes.copy(), np.zeros(4)
    round_levels(got, steps, delta, book, rule(0, KEY), watched(got, sums))
    wanted = np.clip((levels[codes] * of_step + delta) / of_step, levels[0], levels[-1])
    best = np.abs(levels[None, None] - wanted[..., None]).min(-1)
    assert np.allclose(np.abs(levels[got] - wanted), best, atol=2.5e-5 * gap)
    mean = np.zeros(codes.shape)
    for seed in range(400):
        got = codes.copy()
        round_levels(got, steps, delta, book, rule(1, tensor_key(seed, "t")), watched(got, np.zeros(4)))
        mean += levels[got] / 400
    assert abs((mean - wanted).mean()) < gap / 400 and np.abs(mean - wanted).max() < gap / 4
    still = codes.copy()
    round_levels(still, steps, delta * 0, book, rule(1, KEY), watched(still, np.zeros(4)))
    assert (still == codes).all()


def test_the_largest_random_number_leads_to_no_code_beyond_the_last():
    row, column = 1621, 3252
    assert uniform(key_of_row(np.uint64(0), row), column) == 1 - 2.0**-24
    codes, steps, delta = np.full((1, 4096), 15, np.int8), np.ones((1, 128), np.float32), np.full((1, 4096), 0.1)
    always = Rule(np.float32(1), np.uint64(0), row, np.float32(0), np.float32(15))
    round_levels(codes, steps, delta.astype(np.float32), codebook(*LEVELS), always, watched(codes, np.zeros(4)))
    assert (codes == 15).all()


@pytest.mark.parametrize(("kernel", "dtype"), [(round_f16, np.float16), (round_bf16, None)])
def test_halves(kernel, dtype):
    rng = np.random.default_rng(3)
    weights = (rng.normal(size=(30, 300)) * 10.0 ** rng.integers(-8, 2, (30, 300))).astype(np.float32)
    halves = weights.astype(np.float16).view(np.uint16) if dtype else (weights.view(np.uint32) >> 16).astype(np.uint16)
    value = (
        (lambda h: h.view(np.float16).astype(np.float32))
        if dtype
        else (lambda h: (h.astype(np.uint32) << 16).view(np.float32))
    )
    delta = (value(halves) * rng.normal(size=weights.shape) * 1e-3).astype(np.float32)
    nearest = halves.copy()
    kernel(nearest, delta, 0.0, KEY, 0, np.zeros(4))
    wanted = value(halves) + delta
    for neighbour in (-1, 1):
        other = value((nearest.astype(np.int32) + neighbour).astype(np.uint16))
        closer = np.abs(value(nearest) - wanted) <= np.abs(other - wanted) * (1 + 1e-6)
        assert (closer | ~np.isfinite(other)).all()
    mean = np.zeros(weights.shape)
    for seed in range(300):
        dithered = halves.copy()
        kernel(dithered, delta, 1.0, tensor_key(seed, "t"), 0, np.zeros(4))
        mean += value(dithered).astype(np.float64) / 300
    gap = np.maximum(np.abs(value(nearest + np.uint16(1)) - value(nearest)), 1e-30)
    assert abs(((mean - wanted) / gap).mean()) < 0.01
    still = halves.copy()
    kernel(still, delta * 0, 1.0, KEY, 0, np.zeros(4))
    assert (still == halves).all()


def test_tally_counts_what_was_achieved():
    rng = np.random.default_rng(4)
    before, delta = rng.normal(size=(5, 70)).astype(np.float32), rng.normal(size=(5, 70)).astype(np.float32)
    sums = np.zeros(4)
    tally_rows(before, before + delta / 2, delta, sums)
    assert np.isclose(sums[0] / sums[1], 0.5, atol=1e-4) and sums[3] == 350
