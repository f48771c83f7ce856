"""One chunk of rows: decode as far as needed, add the update, and encode again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_gguf.quants import QUANTS, Quant
from lora_gguf.rounding import round_bf16, round_codes, round_f16, round_levels, tally_rows

NO_IMPORTANCE = np.empty(0, np.float32)
SPREADS = {"dither": 1.0, "nearest": 0.0}
_HALVES = {"F16": round_f16, "BF16": round_bf16}


@dataclass(frozen=True)
class Recipe:
    """How the rows of a tensor are rewritten: from which type to which, and by which rounding."""

    source: Quant
    target: Quant
    rounding: str
    key: np.uint64
    importance: np.ndarray = None

    @property
    def keeps_grid(self) -> bool:
        gridded = self.source.unpack is not None or self.source.type.name in _HALVES
        return self.rounding in SPREADS and self.source is self.target and gridded


def recode(recipe: Recipe, blocks: np.ndarray, delta: np.ndarray, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows ``blocks`` uint8 (rows, row_bytes) with ``delta`` f32 (rows, cols) added; ``blocks`` may be reused.

    Returns the new rows as stored, and their sums (4,) for ``Retention``. The same bytes come out however the tensor is
    cut into chunks; ``first_row`` is the chunk's place in it.
    """
    sums = np.zeros(4)
    if not recipe.keeps_grid:
        return _renew(recipe, blocks, delta, sums), sums
    spread = np.float32(SPREADS[recipe.rounding])
    if recipe.source.unpack is None:
        halves = blocks.view(np.uint16)
        _HALVES[recipe.source.type.name](halves, delta, spread, recipe.key, first_row, sums)
    else:
        _move_codes(recipe, blocks, delta, spread, first_row, sums)
    return blocks, sums


def _move_codes(recipe: Recipe, blocks, delta, spread, first_row: int, sums) -> None:
    quant = recipe.source
    codes = np.empty(delta.shape, np.int8)
    steps = np.empty((delta.shape[0], delta.shape[1] // quant.group), np.float32)
    quant.unpack(blocks, codes, steps)
    if quant.levels is None:
        round_codes(codes, steps, delta, quant.code_min, quant.code_max, spread, recipe.key, first_row, sums)
    else:
        round_levels(codes, steps, delta, quant.levels, quant.code_min, spread, recipe.key, first_row, sums)
    quant.pack(codes, blocks)


def _renew(recipe: Recipe, blocks, delta, sums) -> np.ndarray:
    """Decode, add, and let the target type's own quantizer find a new grid."""
    before, after = np.empty_like(delta), np.empty_like(delta)
    recipe.source.decode(blocks, before)
    np.add(before, delta, out=after)
    renewed = np.empty((len(delta), recipe.target.type.row_bytes(delta.shape[1])), np.uint8)
    importance = NO_IMPORTANCE if recipe.importance is None else recipe.importance
    recipe.target.encode(after, importance, renewed)
    recipe.target.decode(renewed, after)
    tally_rows(before, after, delta, sums)
    return renewed


def quant_of(type_name: str) -> Quant | None:
    """The kernels of a type, None where we have none."""
    return QUANTS.get(type_name)
