"""The bytes of Q2_K to Q6_K: super-blocks of 256 weights, 8 or 16 groups, their quantized scales under one f16 or
two.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.by_block import F32, I8, U8, by_block
from lora_gguf.kernels.decorators import kernel, part
from lora_gguf.kernels.half import f32_at

# Q2_K is scales:16 qs:64 d:2 dmin:2, weight = d * (scale & 15) * code - dmin * (scale >> 4), 16 weights a scale.
# Byte j of a half's 32 qs holds, from the low bits up, the codes of weights j, j + 32, j + 64 and j + 96 of that half.


@by_block((U8, 84), (F32, 16, 16))
def decode_q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d, dmin = f32_at(block, 80), f32_at(block, 82)
        for g in range(16):
            step, low = d * np.float32(block[g] & 15), dmin * np.float32(block[g] >> 4)
            qs, y = block[16 + 32 * (g // 8) + 16 * (g % 2) :], out[i, g]
            shift = np.uint8(g & 6)
            for j in range(y.size):
                y[j] = step * np.float32(qs[j] >> shift & 3) - low


@by_block((U8, 84), (I8, 8, 32), (F32, 16))
def unpack_q2_k(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        d = f32_at(blocks[i], 80)
        for g in range(16):
            steps[i, g] = d * np.float32(blocks[i, g] & 15)
        for k in range(8):
            qs, c, shift = blocks[i, 16 + 32 * (k // 4) :], codes[i, k], np.uint8(2 * (k & 3))
            for j in range(c.size):
                c[j] = qs[j] >> shift & 3


@by_block((U8, 84), (F32, 16))
def lows_q2_k(blocks: np.ndarray, lows: np.ndarray) -> None:
    for i in range(len(blocks)):
        dmin = f32_at(blocks[i], 82)
        for g in range(16):
            lows[i, g] = dmin * np.float32(blocks[i, g] >> 4)


@by_block((I8, 2, 4, 32), (U8, 84))
def pack_q2_k(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for half in range(2):
            qs = blocks[i, 16 + 32 * half :]
            c0, c1, c2, c3 = codes[i, half, 0], codes[i, half, 1], codes[i, half, 2], codes[i, half, 3]
            for j in range(c0.size):
                qs[j] = c0[j] & 3 | (c1[j] & 3) << 2 | (c2[j] & 3) << 4 | c3[j] << 6


# Q3_K is hmask:32 qs:64 scales:12 d:2, weight = d * (scale - 32) * (code - 4), 16 weights a scale. qs holds the lower
# two bits of the codes as in Q2_K; bit k of byte j of hmask is the highest bit of weight 32 k + j. The sixteen 6-bit
# scales: the nibbles of scales[0:8] are their lower four bits, scales[8:12] holds their upper two.


@kernel
def _scale_q3_k(scales: np.ndarray, g: int) -> float:
    low = scales[g & 7] >> np.uint8(g >> 3 << 2) & 15
    high = scales[8 + (g & 3)] >> np.uint8(g >> 2 << 1) & 3
    return np.float32(np.int32(low | high << 4) - 32)


@by_block((U8, 110), (F32, 16, 16))
def decode_q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_at(block, 108)
        for g in range(16):
            step = d * _scale_q3_k(block[96:], g)
            hmask, qs, y = block[16 * (g % 2) :], block[32 + 32 * (g // 8) + 16 * (g % 2) :], out[i, g]
            shift, bit = np.uint8(g & 6), np.uint8(g >> 1)
            for j in range(y.size):
                y[j] = step * np.float32(np.int32(qs[j] >> shift & 3 | (hmask[j] >> bit & 1) << 2) - 4)


@by_block((U8, 110), (I8, 8, 32), (F32, 16))
def unpack_q3_k(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        d, scales, hmask = f32_at(blocks[i], 108), blocks[i, 96:], blocks[i]
        for g in range(16):
            steps[i, g] = d * _scale_q3_k(scales, g)
        for k in range(8):
            qs, c = blocks[i, 32 + 32 * (k // 4) :], codes[i, k]
            shift, bit = np.uint8(2 * (k & 3)), np.uint8(k)
            for j in range(c.size):
                c[j] = qs[j] >> shift & 3 | (hmask[j] >> bit & 1) << 2


@by_block((I8, 2, 4, 32), (U8, 110))
def pack_q3_k(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        hmask = blocks[i, :32]
        for half in range(2):
            qs, kept, shift = blocks[i, 32 + 32 * half :], np.uint8(0xF0 >> 4 * half), np.uint8(4 * half)
            c0, c1, c2, c3 = codes[i, half, 0], codes[i, half, 1], codes[i, half, 2], codes[i, half, 3]
            for j in range(c0.size):
                qs[j] = c0[j] & 3 | (c1[j] & 3) << 2 | (c2[j] & 3) << 4 | c3[j] << 6
            for j in range(c0.size):
                bits = c0[j] >> 2 & 1 | c1[j] >> 1 & 2 | c2[j] & 4 | c3[j] << 1 & 8
                hmask[j] = hmask[j] & kept | np.uint8(bits << shift)


# Q4_K is d:2 dmin:2 scales:12 qs:128, weight = d * scale * code - dmin * min, 32 weights a scale. Byte j of a quarter's
# 32 qs holds weights j (low nibble) and j + 32 of that quarter. Of the 6-bit pairs (scale, min), scales[0:4] and
# scales[4:8] hold the first four; scales[8:12] the lower four bits of the other four, whose upper two are the upper two
# bits of scales[0:8].


@part
def _pair_k4(block: np.ndarray, k: int) -> tuple[int, int]:
    """The scale and the minimum of a block's group ``k``."""
    s = block[4:16]
    if k < 4:
        return s[k] & 63, s[k + 4] & 63
    return s[k + 4] & 15 | s[k - 4] >> 6 << 4, s[k + 4] >> 4 | s[k] >> 6 << 4


@part
def _grid_k4(block: np.ndarray, k: int) -> tuple[float, float]:
    """The step and the low of a block's group ``k``."""
    scale, minimum = _pair_k4(block, k)
    return f32_at(block, 0) * np.float32(scale), f32_at(block, 2) * np.float32(minimum)


@part
def _steps_k4(block: np.ndarray, steps: np.ndarray) -> None:
    d = f32_at(block, 0)
    for k in range(8):
        steps[k] = d * np.float32(_pair_k4(block, k)[0])


@part
def _lows_k4(block: np.ndarray, lows: np.ndarray) -> None:
    dmin = f32_at(block, 2)
    for k in range(8):
        lows[k] = dmin * np.float32(_pair_k4(block, k)[1])


@kernel
def steps_and_lows(blocks: np.ndarray, steps: np.ndarray, lows: np.ndarray) -> None:
    """Read the grid of Q4_K or Q5_K: steps and lows f32 (blocks, 8) of blocks (blocks, block_bytes)."""
    for i in range(len(blocks)):
        _steps_k4(blocks[i], steps[i])
        _lows_k4(blocks[i], lows[i])


@by_block((U8, 144), (F32, 8, 32))
def decode_q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        for k in range(0, 8, 2):
            qs, y, z = blocks[i, 16 + 16 * k :], out[i, k], out[i, k + 1]
            (step_y, low_y), (step_z, low_z) = _grid_k4(blocks[i], k), _grid_k4(blocks[i], k + 1)
            for j in range(y.size):
                y[j] = step_y * np.float32(qs[j] & 15) - low_y
                z[j] = step_z * np.float32(qs[j] >> 4) - low_z


@by_block((U8, 144), (I8, 8, 32), (F32, 8))
def unpack_q4_k(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        _steps_k4(blocks[i], steps[i])
        for k in range(0, 8, 2):
            qs, c, e = blocks[i, 16 + 16 * k :], codes[i, k], codes[i, k + 1]
            for j in range(c.size):
                c[j] = qs[j] & 15
                e[j] = qs[j] >> 4


@by_block((U8, 144), (F32, 8))
def lows_q4_k(blocks: np.ndarray, lows: np.ndarray) -> None:
    for i in range(len(blocks)):
        _lows_k4(blocks[i], lows[i])


@by_block((I8, 8, 32), (U8, 144))
def pack_q4_k(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for k in range(0, 8, 2):
            low, high, qs = codes[i, k], codes[i, k + 1], blocks[i, 16 + 16 * k :]
            for j in range(low.size):
                qs[j] = low[j] & 15 | high[j] << 4


# Q5_K is d:2 dmin:2 scales:12 qh:32 qs:128: as Q4_K, and bit k of byte j of qh is the fifth bit of weight 32 k + j.


@by_block((U8, 176), (F32, 8, 32))
def decode_q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        qh = blocks[i, 16:48]
        for k in range(8):
            qs, y = blocks[i, 48 + 32 * (k // 2) :], out[i, k]
            step, low = _grid_k4(blocks[i], k)
            shift, bit = np.uint8(4 * (k & 1)), np.uint8(k)
            for j in range(y.size):
                y[j] = step * np.float32(qs[j] >> shift & 15 | (qh[j] >> bit & 1) << 4) - low


@by_block((U8, 176), (I8, 8, 32), (F32, 8))
def unpack_q5_k(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        _steps_k4(blocks[i], steps[i])
        qh = blocks[i, 16:48]
        for k in range(8):
            qs, c = blocks[i, 48 + 32 * (k // 2) :], codes[i, k]
            shift, bit = np.uint8(4 * (k & 1)), np.uint8(k)
            for j in range(c.size):
                c[j] = qs[j] >> shift & 15 | (qh[j] >> bit & 1) << 4


@by_block((U8, 176), (F32, 8))
def lows_q5_k(blocks: np.ndarray, lows: np.ndarray) -> None:
    for i in range(len(blocks)):
        _lows_k4(blocks[i], lows[i])


@by_block((I8, 8, 32), (U8, 176))
def pack_q5_k(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        qh = blocks[i, 16:48]
        for k in range(0, 8, 2):
            low, high, qs = codes[i, k], codes[i, k + 1], blocks[i, 48 + 16 * k :]
            for j in range(low.size):
                qs[j] = low[j] & 15 | high[j] << 4
            kept, shift = np.uint8(~(3 << k)), np.uint8(k)
            for j in range(low.size):
                qh[j] = qh[j] & kept | np.uint8((low[j] >> 4 & 1 | high[j] >> 3 & 2) << shift)


# Q6_K is ql:128 qh:64 scales:16 d:2, weight = d * scale * (code - 32), the scales int8, 16 weights a scale. Of a half,
# byte j of its 64 ql holds the lower four bits of weights j and j + 64, byte j of its 32 qh the upper two of weights
# j, j + 32, j + 64 and j + 96.


@by_block((U8, 210), (F32, 16, 16))
def decode_q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_at(block, 208)
        for g in range(16):
            half, quarter, odd = g // 8, g % 8 // 2, 16 * (g % 2)
            ql, qh = block[64 * half + 32 * (quarter % 2) + odd :], block[128 + 32 * half + odd :]
            low_shift, high_shift = np.uint8(quarter // 2 * 4), np.uint8(2 * quarter)
            step, y = d * np.float32(np.int8(block[192 + g])), out[i, g]
            for j in range(y.size):
                y[j] = step * np.float32(np.int32(ql[j] >> low_shift & 15 | (qh[j] >> high_shift & 3) << 4) - 32)


@by_block((U8, 210), (I8, 8, 32), (F32, 16))
def unpack_q6_k(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_at(block, 208)
        for g in range(16):
            steps[i, g] = d * np.float32(np.int8(block[192 + g]))
        for k in range(8):
            half, quarter = k // 4, k % 4
            ql, qh, c = block[64 * half + 32 * (quarter % 2) :], block[128 + 32 * half :], codes[i, k]
            low_shift, high_shift = np.uint8(quarter // 2 * 4), np.uint8(2 * quarter)
            for j in range(c.size):
                c[j] = ql[j] >> low_shift & 15 | (qh[j] >> high_shift & 3) << 4


@by_block((I8, 2, 4, 32), (U8, 210))
def pack_q6_k(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for half in range(2):
            for k in range(2):
                low, high, ql = codes[i, half, k], codes[i, half, k + 2], blocks[i, 64 * half + 32 * k :]
                for j in range(low.size):
                    ql[j] = low[j] & 15 | high[j] << 4
            c0, c1, c2, c3 = codes[i, half, 0], codes[i, half, 1], codes[i, half, 2], codes[i, half, 3]
            qh = blocks[i, 128 + 32 * half :]
            for j in range(c0.size):
                qh[j] = c0[j] >> 4 & 3 | c1[j] >> 2 & 12 | c2[j] & 48 | (c3[j] & 48) << 2
