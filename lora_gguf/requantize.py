"""One chunk of rows: decode as far as needed, add the update, and encode again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_gguf.ggml import GgmlType
from lora_gguf.quants import Quant
from lora_gguf.rounding import round_bf16, round_codes, round_f16, round_levels, tally_rows

NO_IMPORTANCE = np.empty(0, np.float32)
# the width of the random offset before the floor; a rounding that is not here finds a new grid
SPREADS = {"dither": 1.0, "nearest": 0.0}
ROUNDINGS = (*SPREADS, "fresh")
_HALVES = {"F16": round_f16, "BF16": round_bf16}
# where a block's f16 scales and minima lie, in bytes: ggml refuses to load a block in which one is NaN or infinity
F16_FIELDS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_S": (0,), "IQ2_XXS": (0,),
    "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "Q1_0": (0,), "Q2_0": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How the rows of a tensor are rewritten: from which type to which, and by which rounding.

    ``importance`` is f32 (matrices, cols), E[x²] of each column of the input, or None.
    """

    source: Quant
    target: Quant
    rounding: str
    key: np.uint64
    importance: np.ndarray | None = None

    @property
    def keeps_grid(self) -> bool:
        gridded = self.source.unpack is not None or self.source.type.name in _HALVES
        return self.rounding in SPREADS and self.source is self.target and gridded


def recode(recipe: Recipe, blocks: np.ndarray, delta: np.ndarray, first_row: int, matrix: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The rows ``blocks`` uint8 (rows, row_bytes) with ``delta`` f32 (rows, cols) added; ``blocks`` may be reused.

    Returns the new rows as stored, and their sums (4,) for ``Retention``. The same bytes come out however the tensor is
    cut into chunks; ``first_row`` is the chunk's place in it, ``matrix`` the expert that it belongs to.
    """
    sums = np.zeros(4)
    if not recipe.keeps_grid:
        return _renew(recipe, blocks, delta, matrix, sums), sums
    if recipe.source.unpack is None:
        halves = blocks.view(np.uint16)
        _HALVES[recipe.source.type.name](halves, delta, SPREADS[recipe.rounding], recipe.key, first_row, sums)
    else:
        _move_codes(recipe.source, blocks, delta, SPREADS[recipe.rounding], recipe.key, first_row, sums)
    return blocks, sums


def _move_codes(quant: Quant, blocks, delta, spread: float, key: np.uint64, first_row: int, sums) -> None:
    codes = np.empty(delta.shape, np.int8)
    steps = np.empty((delta.shape[0], delta.shape[1] // quant.group), np.float32)
    quant.unpack(blocks, codes, steps)
    if quant.levels is None:
        round_codes(codes, steps, delta, quant.code_min, quant.code_max, spread, key, first_row, sums)
    else:
        round_levels(codes, steps, delta, quant.levels, quant.code_min, spread, key, first_row, sums)
    quant.pack(codes, blocks)


def _renew(recipe: Recipe, blocks, delta, matrix: int, sums) -> np.ndarray:
    """Decode, add, and let the target type's own quantizer find a new grid."""
    before, after = np.empty_like(delta), np.empty_like(delta)
    recipe.source.decode(blocks, before)
    wanted = before + delta
    renewed = np.empty((len(delta), recipe.target.type.row_bytes(delta.shape[1])), np.uint8)
    recipe.target.encode(wanted, NO_IMPORTANCE if recipe.importance is None else recipe.importance[matrix], renewed)
    recipe.target.decode(renewed, after)
    tally_rows(before, after, delta, sums)
    return renewed



def broken_row(type: GgmlType, blocks: np.ndarray) -> int | None:
    """The first of the rows ``blocks`` uint8 (rows, row_bytes) with a scale that is NaN or infinity, or None."""
    of_block = blocks.reshape(-1, type.block_bytes)
    for offset in F16_FIELDS.get(type.name, ()):
        broken = of_block[:, offset + 1] & 0x7C == 0x7C
        if broken.any():
            return int(broken.argmax()) // (len(of_block) // len(blocks))
    return None
