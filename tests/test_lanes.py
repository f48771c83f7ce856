"""Sixteen numbers at a time, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from numba.core.errors import TypingError

from lora_gguf.kernels import lanes
from lora_gguf.kernels.decorators import kernel

X = np.array(
    [-3.5, -0.5, 0.0, 0.49, 0.5, 2.0, 7.25, 126.9, 1e-40, -1e30, np.inf, -np.inf, np.nan, 1.5, -1.5, 3e38], np.float32
)
Y = np.array([2.0, -0.5, 1.0, np.nan, -7.0, 2.0, 0.25, 1e-3, 1e-40, 1e30, 1.0, 5.0, 1.0, -1.5, -1.5, 3e38], np.float32)
Z = np.linspace(-1, 1, 16, dtype=np.float32)


def over(function):
    """``function`` of three lanes as one of three arrays."""
    inner = kernel(function)

    @kernel
    def run(x, y, z, out):
        lanes.store(inner(lanes.load(x, 0), lanes.load(y, 0), lanes.load(z, 0)), out, 0)

    def call(x, y, z):
        out = np.empty(16, np.float32)
        run(x, y, z, out)
        return out

    return call


LIKE_NUMPY = {
    "+": (lambda x, y, z: x + y - z, lambda x, y, z: x + y - z),
    "*": (lambda x, y, z: x * y / z, lambda x, y, z: x * y / z),
    "floor": (lambda x, y, z: lanes.floor(x), lambda x, y, z: np.floor(x)),
    "magnitude": (lambda x, y, z: lanes.magnitude(x), lambda x, y, z: np.abs(x)),
    "least": (lambda x, y, z: lanes.least(x, y), lambda x, y, z: np.where(x < y, x, y)),
    "most": (lambda x, y, z: lanes.most(x, y), lambda x, y, z: np.where(x > y, x, y)),
    "where_less": (lambda x, y, z: lanes.where_less(x, y, z, x), lambda x, y, z: np.where(x < y, z, x)),
    "nonzero": (lambda x, y, z: lanes.nonzero(x), lambda x, y, z: (x != 0).astype(np.float32)),
    "splat": (lambda x, y, z: lanes.splat(np.float32(2.5)), lambda x, y, z: np.full(16, 2.5, np.float32)),
    "bits": (
        lambda x, y, z: lanes.bits(lanes.bits(x) & lanes.splat(np.uint32(0xFFFF0000))),
        lambda x, y, z: (x.view(np.uint32) & 0xFFFF0000).view(np.float32),
    ),
    "uint32": (
        lambda x, y, z: lanes.to_f32(
            (lanes.iota() * lanes.splat(np.uint32(0x9E3779B9)) ^ lanes.bits(x)) >> lanes.splat(np.uint32(8))
        ),
        lambda x, y, z: ((np.arange(16, dtype=np.uint32) * np.uint32(0x9E3779B9) ^ x.view(np.uint32)) >> 8).astype(
            np.float32
        ),
    ),
}


@pytest.mark.parametrize("name", LIKE_NUMPY)
@np.errstate(all="ignore")
def test_lane_by_lane(name):
    ours, theirs = LIKE_NUMPY[name]
    assert np.array_equal(over(ours)(X, Y, Z), theirs(X, Y, Z), equal_nan=True)


def test_fma_rounds_once():
    x = np.full(16, 1 + 2.0**-12, np.float32)
    z = np.full(16, -1 - 2.0**-11, np.float32)
    assert (over(lambda x, y, z: lanes.fma(x, y, z))(x, x, z) == np.float32(2.0**-24)).all()


@kernel
def totals_of(w, x, y, z):
    return lanes.totals(lanes.load(w, 0), lanes.load(x, 0), lanes.load(y, 0), lanes.load(z, 0))


def test_sums_run_by_halves():
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    sums = x
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    assert (over(lambda x, y, z: lanes.splat(lanes.total(x)))(x, x, x) == sums[0]).all()
    four = [x, -x, x + 1, x * 3]
    alone = over(lambda x, y, z: lanes.splat(lanes.total(x)))
    assert totals_of(*four) == tuple(alone(one, one, one)[0] for one in four)
    assert (over(lambda x, y, z: lanes.splat(lanes.greatest(x)))(x, x, x) == x.max()).all()


def test_rows_columns_and_codes():
    @kernel
    def moved(source, codes, target, taken):
        lanes.store(lanes.load(source, (1, 3)), target, (0, 2))
        lanes.store(lanes.load(codes, 1) + lanes.splat(np.float32(1.0)), taken, 0)

    source, codes = np.arange(64, dtype=np.float32).reshape(2, 32), np.arange(-9, 8).astype(np.int8)
    target, taken = np.zeros((1, 20), np.float32), np.zeros(17, np.int8)
    moved(source, codes, target, taken)
    assert np.array_equal(target[0], [0, 0, *range(35, 51), 0, 0]) and np.array_equal(taken, [*range(-7, 9), 0])


def test_bytes():
    @kernel
    def combined(x, y, table, out):
        a, b, t = lanes.load_i8(x, 0), lanes.load_i8(y, 0), lanes.load_i8(table, 1)
        lanes.store(a + b, out, (0, 0))
        lanes.store(a - b, out, (1, 0))
        lanes.store(a & b, out, (2, 0))
        lanes.store(a ^ b, out, (3, 0))
        lanes.store(lanes.is_less(a, b), out, (4, 0))
        lanes.store(lanes.is_other(a, b), out, (5, 0))
        lanes.store(lanes.pick(t, b & lanes.splat(np.int8(15))), out, (6, 0))
        lanes.store(lanes.to_f32(a), out, (7, 0))
        lanes.store(lanes.to_i8(lanes.to_f32(a)), out, (8, 0))

    rng = np.random.default_rng(0)
    x, y, table = (rng.integers(-128, 128, 17).astype(np.int8) for _ in range(3))
    y[3], out = x[3], np.empty((9, 16), np.int8)
    combined(x, y, table, out)
    x, y = x[:16], y[:16]
    picked = table[1 + (y & 15)]
    assert np.array_equal(out, [x + y, x - y, x & y, x ^ y, -(x < y).astype(int), -(x != y).astype(int), picked, x, x])


def test_bytes_that_tell_where_numbers_are_less():
    @kernel
    def compared(x, y, out):
        lanes.store(lanes.is_less(lanes.load(x, 0), lanes.load(y, 0)), out, 0)

    out = np.empty(16, np.int8)
    compared(X, Y, out)
    assert np.array_equal(out, -(X < Y).astype(np.int8)) and out.any()


REFUSED = {
    "every second": np.zeros(40, np.float32)[::2],
    "columns": np.zeros((20, 20), np.float32)[:, 2:18],
    "by columns": np.zeros((20, 20), np.float32, order="F"),
    "f64": np.zeros(20),
    "uint8": np.zeros(20, np.uint8),
    "int32": np.zeros(20, np.int32),
    "f16": np.zeros(20, np.float16),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_would_read_or_write_wrongly(name):
    array = REFUSED[name]
    at = (0, 0) if array.ndim == 2 else 0

    @kernel
    def loaded(array, at, out):
        lanes.store(lanes.load(array, at), out, 0)

    @kernel
    def stored(array, at):
        lanes.store(lanes.splat(np.float32(1.0)), array, at)

    with pytest.raises(TypingError, match="C-contiguous arrays of f32 or int8, found"):
        loaded(array, at, np.zeros(16, np.float32))
    with pytest.raises(TypingError, match="C-contiguous arrays of f32 or int8, found"):
        stored(array, at)


def test_refuses_other_bytes():
    @kernel
    def loaded(array, out):
        lanes.store(lanes.load_i8(array, 0), out, 0)

    with pytest.raises(TypingError, match="expected an array of int8"):
        loaded(np.zeros(16, np.float32), np.zeros(16, np.int8))


def test_takes_a_part_of_a_row():
    """Nor is a part of a C-contiguous row, or a row of a matrix, refused."""

    @kernel
    def moved(source, target):
        lanes.store(lanes.load(source[1], 2), target[2:], 0)

    source, target = np.arange(64, dtype=np.float32).reshape(2, 32), np.zeros(20, np.float32)
    moved(source, target)
    assert np.array_equal(target, [0, 0, *range(34, 50), 0, 0])
