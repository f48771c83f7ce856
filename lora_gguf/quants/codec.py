"""What is known of a type: its codec, and the grid on which its weights lie.

One file a family holds the kernels, encode beside decode. All take C-contiguous, writable 2-D arrays of whole rows,
write into the output that the caller allocated, and neither check nor raise. They are called from Python, not from
other kernels:

    decode(blocks, out)                 blocks uint8 (rows, row_bytes) -> out f32 (rows, cols), bit-identical to ggml
    encode(weights, importance, blocks) weights f32 (rows, cols), importance f32 (cols,) or (0,) where there is none
                                        -> blocks uint8 (rows, row_bytes): ggml's own quantizer, bit-identical
    unpack(blocks, codes, steps)        -> codes int8 (rows, cols), steps f32 (rows, cols // group): the block's grid
    lows(blocks, lows)                  -> lows f32 (rows, cols // group), in the types with a minimum
    pack(codes, blocks)                 writes the codes into blocks, every other bit stays

A weight is ``step * (code - zero) - low``, low 0 in the types without a minimum, or ``step * levels[code - code_min]``
in those with a codebook (levels ascending). So two neighbouring codes differ by ``step``, or by ``step`` times the
distance of their levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_gguf.quants.ggml import BY_NAME, GgmlType


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a block can take, ``group`` weights a step; see the module's docstring."""

    unpack: Callable[..., None]
    pack: Callable[..., None]
    group: int
    code_max: int
    code_min: int = 0
    zero: int = 0
    lows: Callable[..., None] | None = None
    levels: np.ndarray | None = None

    def read_lows(self, blocks: np.ndarray, lows: np.ndarray) -> None:
        """Write the lows of ``blocks`` to ``lows``, 0 in a type without a minimum; shapes are the module's."""
        if self.lows:
            self.lows(blocks, lows)
        else:
            lows[...] = 0

    @property
    def gap(self) -> float:
        """The mean distance of two neighbours, over the step."""
        return 1.0 if self.levels is None else float(np.diff(self.levels).mean())

    @property
    def breadth(self) -> float:
        """Over the step: the distance of the two farthest weights in a type with a minimum, else twice the farthest
        distance from zero.
        """
        if self.levels is not None:
            return 2.0 * float(np.abs(self.levels.astype(int)).max())
        if self.lows:
            return float(self.code_max - self.code_min)
        return 2.0 * max(self.code_max - self.zero, self.zero - self.code_min)


@dataclass(frozen=True)
class Half:
    """The values that a float of 16 bits can take: explicit ``bits`` of the significand, and the least exponent."""

    bits: int
    least_exponent: int


@dataclass(frozen=True)
class Codec:
    """A type's kernels, and what its weights lie on: a ``grid``, the values of a ``half``, or neither.

    Neither is so in F32, and in IQ1 to IQ3, whose weights are not coded one by one. ``scales_at`` are the bytes of a
    block at which its f16 scales are: that of the steps first, then that of the lows. ``exponents_at`` is the same for
    E8M0 scales.
    """

    type: GgmlType
    decode: Callable[..., None]
    encode: Callable[..., None]
    needs_importance: bool = False
    scales_at: tuple[int, ...] = ()
    exponents_at: tuple[int, ...] = ()
    grid: Grid | None = None
    half: Half | None = None

    def __reduce__(self) -> tuple[Callable[[str], Codec], tuple[str]]:
        """Travel to another process by name: its kernels are compiled there."""
        return codec_called, (self.type.name,)

    @property
    def known_grid(self) -> Grid:
        """The grid of a type that has one."""
        if self.grid is None:
            raise ValueError(f"{self.type} has no grid")
        return self.grid

    def row_bytes(self, n_cols: int) -> int:
        """Return the bytes of a row of ``n_cols`` weights."""
        return self.type.row_bytes(n_cols)

    def decoded(self, blocks: np.ndarray) -> np.ndarray:
        """Return the weights of ``blocks`` uint8 (rows, row_bytes): f32 (rows, cols)."""
        weights = np.empty((len(blocks), blocks.shape[1] // self.type.block_bytes * self.type.block_size), np.float32)
        self.decode(blocks, weights)
        return weights

    def encoded(self, weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """Return the blocks of ``weights`` f32 (rows, cols), as ``encode`` makes them: uint8 (rows, row_bytes)."""
        blocks = np.empty((len(weights), self.row_bytes(weights.shape[1])), np.uint8)
        self.encode(weights, importance, blocks)
        return blocks

    def broken(self, blocks: np.ndarray) -> np.ndarray:
        """Return which ``blocks``, uint8 (n, block_bytes), ggml refuses to load, for a scale is NaN or infinity: bool
        (n,).
        """
        found = np.zeros(len(blocks), bool)
        for at in self.scales_at:
            found |= blocks[:, at + 1] & 0x7C == 0x7C
        for at in self.exponents_at:
            found |= blocks[:, at] == 0xFF
        return found


def codec_called(name: str) -> Codec:
    """Return the one codec of the ggml type called ``name``."""
    from lora_gguf.quants.table import CODECS

    return CODECS[name]


def codec(name: str, decode: Callable[..., None], encode: Callable[..., None], **more: Any) -> Codec:
    """Return the ``Codec`` of the ggml type called ``name``."""
    return Codec(BY_NAME[name], decode, encode, **more)
