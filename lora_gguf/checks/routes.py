"""The ways in which other tools round, followed exactly: what each would have written for base + update.

A tool may hold the base, the update or their sum in half precision on its way, and quantize anew at the end, as ggml
does. Where one of these ways gives a block's own bytes, nothing is left to statistics. Two tools sum in another order,
so a number that lies between two values may fall on either side: a block that differs is explained where a change of
the update that small gives exactly its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_gguf.files.base import evenly
from lora_gguf.merging.tensor import NO_IMPORTANCE
from lora_gguf.quants.codec import Codec
from lora_gguf.quants.table import CODECS

# the types that (the base, the update, their sum) went through: llama-export-lora, then PEFT in f32, bf16 and f16
ROUTES = (
    ("F32", "F32", "F32"),
    ("F32", "F32", "F16"),
    ("F32", "F32", "BF16"),
    ("F16", "F32", "F16"),
    ("F16", "F32", "F32"),
    ("BF16", "F32", "BF16"),
    ("BF16", "F32", "F32"),
    ("BF16", "BF16", "BF16"),
    ("F16", "F16", "F16"),
    ("F32", "F16", "F32"),
    ("F32", "F16", "F16"),
)
N_SAMPLE, FEW_ROWS = 8, 2  # rows that tell which way it was, and that may be damaged instead
MOST_DIFFER = 0.1  # of the blocks, on the right way
N_TRIES = 16
SUMMED, HALVED = np.float32(2.0**-21), np.float32(2.0**-8)  # how far sums in another order, or in halves, are off

TOO_MANY = 6.5  # standard deviations
LEAN = 2.0**-11  # of the update, by which factors in halves may change its scale


@dataclass(frozen=True)
class Rows:
    """Some rows of a merge: base and update f32 (rows, cols), and what the file holds, uint8 (rows, row_bytes)."""

    before: np.ndarray
    delta: np.ndarray
    stored: np.ndarray

    def some(self, rows: np.ndarray) -> Rows:
        return Rows(np.ascontiguousarray(self.before[rows]), np.ascontiguousarray(self.delta[rows]), self.stored[rows])


def rounded(weights: np.ndarray, type_name: str) -> np.ndarray:
    """Return the f32 ``weights`` as they come out of a float type."""
    if type_name == "F32":
        return weights
    codec = CODECS[type_name]
    return codec.decoded(codec.encoded(np.ascontiguousarray(weights), NO_IMPORTANCE))


def encoded_as(codec: Codec, weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Return rows f32 (rows, cols) as the type's quantizer stores them, all columns alike without ``importance``."""
    if codec.needs_importance and not importance.size:
        importance = np.ones(weights.shape[1], np.float32)
    return codec.encoded(np.ascontiguousarray(weights), importance)


def along(route: tuple[str, str, str], before: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Return the sum that a way gives, before it is stored."""
    base_type, update_type, sum_type = route
    return rounded(rounded(before, base_type) + rounded(delta, update_type), sum_type)


def n_unexplained(codec: Codec, rows: Rows, importance: np.ndarray, fresh: np.ndarray) -> int:
    """Tell how many blocks no way of rounding gives; ``fresh`` is what the first of them gives."""
    if codec.needs_importance and not importance.size:
        return fresh.size // codec.type.block_bytes
    differs = differing(codec, rows.stored, fresh)
    if not differs.any():
        return 0
    route = _route(codec, rows, importance, differs)
    return int(differs.sum()) if route is None else _count(codec, route, rows, importance, tries=N_TRIES)


def _route(codec: Codec, rows: Rows, importance: np.ndarray, differs: np.ndarray) -> tuple[str, str, str] | None:
    """Return the way that gives the most of some rows; among equals that which gives the most of the rows that the
    plainest way does not. None where none gives nearly all.

    An update in halves hides more than an exact one: it is the way only where some rows more than a few ask for it.
    """
    at_odds = np.flatnonzero(differs.reshape(len(rows.before), -1).any(1))
    sample, odd = (rows.some(some) for some in (evenly(len(rows.before), N_SAMPLE), at_odds[:N_SAMPLE]))
    counts = {route: _count(codec, route, sample, importance) for route in ROUTES}
    if min(counts.values()) > 2 + MOST_DIFFER * sample.stored.size // codec.type.block_bytes:
        return None
    exact = {route: count for route, count in counts.items() if route[1] == "F32"}
    plainest = min(exact, key=lambda route: exact[route])
    alone = [sample.some(np.array([i])) for i in range(len(sample.before))]
    if sum(_count(codec, plainest, row, importance) > 0 for row in alone) <= FEW_ROWS:
        counts = exact
    equals = [route for route, count in counts.items() if count == min(counts.values())]
    return min(equals, key=lambda route: _count(codec, route, odd, importance)) if len(equals) > 1 else equals[0]


def differing(codec: Codec, stored: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Tell which blocks differ: bool (blocks,)."""
    return (stored.reshape(-1, codec.type.block_bytes) != other.reshape(-1, codec.type.block_bytes)).any(1)


def _count(codec: Codec, route: tuple[str, str, str], rows: Rows, importance: np.ndarray, tries: int = 0) -> int:
    """How many blocks of ``rows`` a way does not give."""
    if codec.type.block_size == 1:
        return _count_floats(codec, route, rows)
    wrong = differing(codec, rows.stored, encoded_as(codec, along(route, rows.before, rows.delta), importance))
    if not tries or importance.size or not wrong.any() or wrong.mean() > MOST_DIFFER:
        return int(wrong.sum())
    size, n_blocks = codec.type.block_size, len(wrong)
    spread = np.repeat(np.sqrt(np.square(rows.delta).mean(1)), n_blocks // len(rows.delta))[wrong, None]
    before, delta = (array.reshape(n_blocks, size)[wrong] for array in (rows.before, rows.delta))
    left, stored = np.flatnonzero(wrong), rows.stored.reshape(n_blocks, -1)
    rng = np.random.default_rng(0)
    for attempt in range(tries):
        off = HALVED * np.abs(delta) if attempt % 2 and route[1] != "F32" else SUMMED * spread
        moved = delta + off * rng.uniform(-1, 1, delta.shape).astype(np.float32)
        same = ~differing(codec, stored[left], encoded_as(codec, along(route, before, moved), importance))
        left, before, delta, spread = left[~same], before[~same], delta[~same], spread[~same]
        if not len(left):
            break
    return len(left)


def _count_floats(codec: Codec, route: tuple[str, str, str], rows: Rows) -> int:
    """How many numbers are none that a way gives, with an update that is a little more or less."""
    base_type, update_type, sum_type = route
    before, after = rounded(rows.before, base_type), codec.decoded(rows.stored)
    wanted = before + rows.delta
    off = SUMMED * np.sqrt(np.square(rows.delta).mean(1, keepdims=True)) + np.float32(2.0**-23) * np.abs(wanted)
    if update_type != "F32":
        off = off + HALVED * np.abs(rows.delta)
    off[np.broadcast_to(rows.delta == 0, off.shape)] = 0
    least, middle, most = (rounded(rounded(wanted + side * off, sum_type), codec.type.name) for side in (-1, 0, 1))
    if update_type != "F32" and leans(rows.delta, after - middle):
        return after.size
    return int((~((after >= least) & (after <= most))).sum())


def leans(delta: np.ndarray, error: np.ndarray) -> bool:
    """Tell whether errors, as rounding in halves makes them, go with the update or against it by more than chance: then
    it is one of another scale.
    """
    moves = delta.astype(np.float64) * error
    chance = TOO_MANY * np.sqrt(np.square(moves).sum()) + LEAN * np.square(delta, dtype=np.float64).sum()
    return bool(abs(moves.sum()) > chance)
