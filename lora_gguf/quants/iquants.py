"""IQ1, IQ2 and IQ3: eight weights, or four, share one index into a grid of vectors (ggml).

All blocks hold 256 weights. An index picks a row of the type's grid, a byte flips the signs of eight weights, and a
scale of three or four bits stretches a group. Where a sign byte is stored in seven bits, its eighth makes the number of
minuses even.

    IQ2_XXS  66 bytes   d f16; for each 32 weights 4 indices of 8 bits, then 32 bits: 4 signs of 7, scale of 4
    IQ2_XS   74 bytes   d f16; 32 times 16 bits: index of 9, signs of 7; scales[8], 4 bits for each 16 weights
    IQ2_S    82 bytes   d f16; 32 low bytes of indices; signs[32]; qh[8], two high bits of each; scales[8] as above
    IQ3_XXS  98 bytes   d f16; 64 indices of 8 bits; for each 32 weights 32 bits: 4 signs of 7, scale of 4
    IQ3_S   110 bytes   d f16; 64 low bytes of indices; qh[8], their high bits; signs[32]; scales[4], 4 bits for each 32
    IQ1_S    50 bytes   d f16; 32 low bytes of indices; for each 32 weights 16 bits: 4 times three high bits of an
                        index, scale of 3, sign of the shift
    IQ1_M    56 bytes   32 low bytes of indices; qh[16], for each index three high bits and the sign of its shift;
                        4 times 16 bits: 4 scales of 3 for 16 weights each, then four bits of d, low ones first

IQ1's grid values are -1, 0 and 1, all shifted by an eighth. The grids come from the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_gguf.kernels.by_block import F32, U8, by_block
from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.half import f32_from_f16
from lora_gguf.quants.codec import codec
from lora_gguf.quants.iquant_grids import grid
from lora_gguf.quants.iquants_encode import (
    encode_iq1_m,
    encode_iq1_s,
    encode_iq2_s,
    encode_iq2_xs,
    encode_iq2_xxs,
    encode_iq3_s,
    encode_iq3_xxs,
)

SHIFT = np.float32(0.125)
EVEN_SIGNS = np.array([s | (s.bit_count() & 1) << 7 for s in range(128)], np.uint8)


@kernel
def _u16(block: np.ndarray, at: int) -> int:
    return np.uint32(block[at]) | np.uint32(block[at + 1]) << np.uint32(8)


@kernel
def _u32(block: np.ndarray, at: int) -> int:
    return np.int64(_u16(block, at)) | np.int64(_u16(block, at + 2)) << 16


@kernel
def _signed(step: float, first: int, second: bool, signs: np.ndarray, y: np.ndarray) -> None:
    """Eight weights: four times ``first``, four times ``second``, minus where a bit of ``signs`` is set."""
    for j in range(4):
        low, high = step * first[j], step * second[j]
        y[j] = -low if signs & (1 << j) else low
        y[j + 4] = -high if signs & (16 << j) else high


@by_block((U8, 66), (F32, 8), (F32, 8, 4, 8))
def _decode_iq2_xxs(blocks: np.ndarray, grid: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(_u16(block, 0))
        for s in range(8):
            at = 2 + 8 * s
            bits = _u32(block, at + 4)
            step = d * (np.float32(0.5) + np.float32(bits >> 28)) * np.float32(0.25)
            for k in range(4):
                index, signs = block[at + k], EVEN_SIGNS[bits >> 7 * k & 127]
                _signed(step, grid[index, :4], grid[index, 4:], signs, out[i, s, k])


@by_block((U8, 74), (F32, 8), (F32, 32, 8))
def _decode_iq2_xs(blocks: np.ndarray, grid: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(_u16(block, 0))
        for k in range(32):
            bits = _u16(block, 2 + 2 * k)
            scale = block[66 + k // 4] >> (4 * (k // 2 % 2)) & 15
            step = d * (np.float32(0.5) + np.float32(scale)) * np.float32(0.25)
            index = bits & 511
            _signed(step, grid[index, :4], grid[index, 4:], EVEN_SIGNS[bits >> 9], out[i, k])


@by_block((U8, 82), (F32, 8), (F32, 32, 8))
def _decode_iq2_s(blocks: np.ndarray, grid: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(_u16(block, 0))
        for k in range(32):
            index = block[2 + k] | (block[66 + k // 4] >> (2 * (k % 4)) & 3) << 8
            scale = block[74 + k // 4] >> (4 * (k // 2 % 2)) & 15
            step = d * (np.float32(0.5) + np.float32(scale)) * np.float32(0.25)
            _signed(step, grid[index, :4], grid[index, 4:], block[34 + k], out[i, k])


@by_block((U8, 98), (F32, 4), (F32, 8, 4, 8))
def _decode_iq3_xxs(blocks: np.ndarray, grid: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(_u16(block, 0))
        for s in range(8):
            bits = _u32(block, 66 + 4 * s)
            step = d * (np.float32(0.5) + np.float32(bits >> 28)) * np.float32(0.5)
            for k in range(4):
                at = 2 + 8 * s + 2 * k
                signs = EVEN_SIGNS[bits >> 7 * k & 127]
                _signed(step, grid[block[at]], grid[block[at + 1]], signs, out[i, s, k])


@by_block((U8, 110), (F32, 4), (F32, 32, 8))
def _decode_iq3_s(blocks: np.ndarray, grid: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(_u16(block, 0))
        for k in range(32):
            high = block[66 + k // 4] >> (2 * (k % 4))
            scale = block[106 + k // 8] >> (4 * (k // 4 % 2)) & 15
            first, second = grid[block[2 + 2 * k] | (high & 1) << 8], grid[block[3 + 2 * k] | (high & 2) << 7]
            _signed(d * np.float32(1 + 2 * scale), first, second, block[74 + k], out[i, k])


@kernel
def _shifted(step: float, vector: int, minus: bool, y: np.ndarray) -> None:
    shift = -SHIFT if minus else SHIFT
    for j in range(8):
        y[j] = step * (vector[j] + shift)


@by_block((U8, 50), (F32, 8), (F32, 8, 4, 8))
def _decode_iq1_s(blocks: np.ndarray, grid: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(_u16(block, 0))
        for s in range(8):
            bits = _u16(block, 34 + 2 * s)
            step = d * np.float32(2 * (bits >> 12 & 7) + 1)
            for k in range(4):
                index = block[2 + 4 * s + k] | (bits >> 3 * k & 7) << 8
                _shifted(step, grid[index], bits & 0x8000, out[i, s, k])


@by_block((U8, 56), (F32, 8), (F32, 32, 8))
def _decode_iq1_m(blocks: np.ndarray, grid: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(block[49] >> 4 | block[51] & 0xF0 | (block[53] & 0xF0) << 4 | (block[55] & 0xF0) << 8)
        for k in range(32):
            high = block[32 + k // 2] >> (4 * (k % 2))
            scale = _u16(block, 48 + 2 * (k // 8)) >> 3 * (k // 2 % 4) & 7
            step = d * np.float32(2 * scale + 1)
            _shifted(step, grid[block[k] | (high & 7) << 8], high & 8, out[i, k])


def _with_grid(decode: Callable[..., None], name: str) -> Callable[..., None]:
    """The kernel ``decode`` with the grid of the type ``name``."""
    return lambda blocks, out: decode(blocks, grid(name), out)


IQUANTS = [
    codec("IQ2_XXS", _with_grid(_decode_iq2_xxs, "IQ2_XXS"), encode_iq2_xxs, scales_at=(0,), needs_importance=True),
    codec("IQ2_XS", _with_grid(_decode_iq2_xs, "IQ2_XS"), encode_iq2_xs, scales_at=(0,), needs_importance=True),
    codec("IQ2_S", _with_grid(_decode_iq2_s, "IQ2_S"), encode_iq2_s, scales_at=(0,)),
    codec("IQ3_XXS", _with_grid(_decode_iq3_xxs, "IQ3_XXS"), encode_iq3_xxs, scales_at=(0,)),
    codec("IQ3_S", _with_grid(_decode_iq3_s, "IQ3_S"), encode_iq3_s, scales_at=(0,)),
    codec("IQ1_S", _with_grid(_decode_iq1_s, "IQ1_S"), encode_iq1_s, scales_at=(0,), needs_importance=True),
    codec("IQ1_M", _with_grid(_decode_iq1_m, "IQ1_M"), encode_iq1_m),
]
