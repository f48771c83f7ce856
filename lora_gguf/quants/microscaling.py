"""Four-bit floats under a small shared scale: MXFP4 (OCP Microscaling) and NVFP4, as ggml stores them.

The codes are E2M1 floats. ggml keeps twice their value, 0 1 2 3 4 6 8 12 and the negatives, and halves the scale.

    MXFP4   17 bytes, 32 weights   e, a power of two (E8M0: 2**(e - 127)); then qs[16], weight j in the low half of
                                   byte j, weight j + 16 in the high half
    NVFP4   36 bytes, 64 weights   d[4], an E4M3 scale without sign for each 16 weights; then qs[32], 8 bytes for
                                   each 16 weights: weight j in the low half of byte j, weight j + 8 in the high half

The grid's code is the rank of the nibble, 0 for -12 to 15 for 12. Codes 7 and 8 are the format's two zeros, at the same
level: ``pack`` and ``unpack`` tell them apart, ``decode`` gives +0 for both as ggml does.
"""

from __future__ import annotations

import math

import numpy as np

from lora_gguf.kernels.by_block import F32, I8, U8, by_block
from lora_gguf.kernels.decorators import kernel
from lora_gguf.quants.codec import Grid, codec
from lora_gguf.quants.minifloats import e4m3_magnitudes

VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
LEVELS = np.sort(VALUES)


def _scales_e8m0() -> np.ndarray:
    """Half of 2**(e - 127) for each byte e; 255, which OCP calls NaN, is 2**127 in ggml."""
    return np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


E8M0 = _scales_e8m0()
# half of the E4M3 value of each byte; 127, which is NaN, is 0 in ggml, 255 is not
E4M3 = np.where(np.arange(256) == 127, 0, e4m3_magnitudes() / 2).astype(np.float32)


@kernel
def _rank(nibble: int) -> int:
    """The place of a nibble's value among the sixteen, 0 to 15; ``_nibble`` is its inverse."""
    return nibble ^ 8 ^ (7 * (nibble >> 3))


@kernel
def _nibble(rank: int) -> int:
    return rank ^ 15 ^ (7 * (rank >> 3))


@by_block((U8, 17), (F32, 32))
def decode_mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d = E8M0[blocks[i, 0]]
        for j in range(16):
            byte = blocks[i, 1 + j]
            out[i, j] = VALUES[byte & 15] * d
            out[i, j + 16] = VALUES[byte >> 4] * d


@by_block((U8, 17), (I8, 32), (F32,))
def unpack_mxfp4(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        steps[i] = E8M0[blocks[i, 0]]
        for j in range(16):
            byte = blocks[i, 1 + j]
            codes[i, j] = _rank(byte & 15)
            codes[i, j + 16] = _rank(byte >> 4)


@by_block((I8, 32), (U8, 17))
def pack_mxfp4(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for j in range(16):
            blocks[i, 1 + j] = _nibble(codes[i, j]) | _nibble(codes[i, j + 16]) << 4


@by_block((U8, 36), (F32, 4, 16))
def decode_nvfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        for s in range(4):
            d = E4M3[blocks[i, s]]
            for j in range(8):
                byte = blocks[i, 4 + 8 * s + j]
                out[i, s, j] = VALUES[byte & 15] * d
                out[i, s, j + 8] = VALUES[byte >> 4] * d


@by_block((U8, 36), (I8, 4, 16), (F32, 4))
def unpack_nvfp4(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        for s in range(4):
            steps[i, s] = E4M3[blocks[i, s]]
            for j in range(8):
                byte = blocks[i, 4 + 8 * s + j]
                codes[i, s, j] = _rank(byte & 15)
                codes[i, s, j + 8] = _rank(byte >> 4)


@by_block((I8, 4, 16), (U8, 36))
def pack_nvfp4(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for s in range(4):
            for j in range(8):
                blocks[i, 4 + 8 * s + j] = _nibble(codes[i, s, j]) | _nibble(codes[i, s, j + 8]) << 4


@kernel
def _amax(x: np.ndarray) -> float:
    """The largest magnitude of ``x``, found on the bit patterns because that vectorises."""
    largest = np.uint32(0)
    for bits in x.view(np.uint32):
        largest = max(largest, bits & np.uint32(0x7FFFFFFF))
    return np.uint32(largest).view(np.float32)


@kernel
def _nearest(x: np.ndarray, d: float, nibbles: np.ndarray) -> None:
    """The nibbles of the values nearest to ``x`` in steps of ``d``; a tie goes to the smaller magnitude, zero is +0."""
    for j in range(len(x)):
        best = abs(x[j])
        magnitude = np.uint8(0)
        for k in range(1, 8):
            error = abs(VALUES[k] * d - abs(x[j]))
            magnitude = np.uint8(k) if error < best else magnitude
            best = error if error < best else best
        nibbles[j] = magnitude | (np.uint8(8) if x[j] < 0 and magnitude > 0 else np.uint8(0))


@kernel
def _e8m0(amax: float) -> int:
    """The shared exponent: that of the largest magnitude less 2, the logarithm rounded to f32 as ggml's is.

    Below 2**-125 it wraps around as the conversion to a byte does on x86, and the block decodes to zeros.
    """
    if amax == 0:
        return 0
    return (int(math.floor(np.float32(math.log2(amax)))) + 125) & 0xFF


@by_block((F32, 32), (F32,), (U8, 17))
def encode_mxfp4(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    nibbles = np.empty(32, np.uint8)
    for i in range(len(blocks)):
        e = _e8m0(_amax(weights[i]))
        blocks[i, 0] = e
        _nearest(weights[i], E8M0[e], nibbles)
        for j in range(16):
            blocks[i, 1 + j] = nibbles[j] | nibbles[j + 16] << 4


@kernel
def _e4m3(x: float) -> int:
    """The E4M3 byte of ``x`` >= 0, halves up; from 248 on ggml writes the largest, 448."""
    if not x > 0:
        return 0
    if x < np.float32(2.0**-6):
        return min(int(x * np.float32(512) + np.float32(0.5)), 7)
    byte = ((np.int64(np.float32(x).view(np.uint32)) + (1 << 19)) >> 20) - (120 << 3)
    return byte if byte < 15 << 3 else 0x7E


@by_block((F32, 4, 16), (F32,), (U8, 36))
def encode_nvfp4(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    nibbles = np.empty(16, np.uint8)
    for i in range(len(blocks)):
        for s in range(4):
            scale = _e4m3(_amax(weights[i, s]) / np.float32(6))
            blocks[i, s] = scale
            _nearest(weights[i, s], E4M3[scale], nibbles)
            for j in range(8):
                blocks[i, 4 + 8 * s + j] = nibbles[j] | nibbles[j + 8] << 4


MICROSCALING = [
    codec(
        "MXFP4", decode_mxfp4, encode_mxfp4, exponents_at=(0,),
        grid=Grid(unpack_mxfp4, pack_mxfp4, group=32, code_max=15, levels=LEVELS),
    ),
    codec(
        "NVFP4", decode_nvfp4, encode_nvfp4,
        grid=Grid(unpack_nvfp4, pack_nvfp4, group=16, code_max=15, levels=LEVELS),
    ),
]  # fmt: skip
