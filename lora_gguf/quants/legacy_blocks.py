"""The bytes of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights a block, one f16 scale, and in the _1 types one f16 minimum.

Codes are unpacked and packed in 16-bit words, two at a time, five-bit ones in 64-bit words.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.by_block import F32, U8, U16, U64, by_block
from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.half import f32_at, f32_from_f16


@kernel
def _u32(block: np.ndarray, at: int) -> int:
    high = np.uint32(block[at + 2]) << 16 | np.uint32(block[at + 3]) << 24
    return np.uint32(np.uint32(block[at]) | np.uint32(block[at + 1]) << 8 | high)


# Four bits a code: byte j of qs holds weight j in its low nibble and weight j + 16 in its high one.


@kernel
def _unpack_nibbles(qs: np.ndarray, codes: np.ndarray) -> None:
    for k in range(8):
        codes[k] = qs[k] & 0x0F0F
        codes[k + 8] = qs[k] >> 4 & 0x0F0F


@kernel
def _pack_nibbles(codes: np.ndarray, qs: np.ndarray) -> None:
    for k in range(8):
        qs[k] = codes[k] & 0x0F0F | (codes[k + 8] & 0x0F0F) << 4


# Q4_0 is d:2 qs:16, weight = d * (code - 8).


@by_block((U8, 18), (F32, 2, 16))
def decode_q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d, qs, low, high = f32_at(blocks[i], 0), blocks[i, 2:], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(np.int32(qs[j] & 15) - 8) * d
            high[j] = np.float32(np.int32(qs[j] >> 4) - 8) * d


@by_block((U16, 9), (U16, 16), (F32,))
def unpack_q4_0(words: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_nibbles(words[i, 1:], codes[i])


@by_block((U16, 16), (U16, 9))
def pack_q4_0(codes: np.ndarray, words: np.ndarray) -> None:
    for i in range(len(words)):
        _pack_nibbles(codes[i], words[i, 1:])


# Q4_1 is d:2 m:2 qs:16, weight = d * code + m.


@by_block((U8, 20), (F32, 2, 16))
def decode_q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d, m = f32_at(blocks[i], 0), f32_at(blocks[i], 2)
        qs, low, high = blocks[i, 4:], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(qs[j] & 15) * d + m
            high[j] = np.float32(qs[j] >> 4) * d + m


@by_block((U16, 10), (U16, 16), (F32,))
def unpack_q4_1(words: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_nibbles(words[i, 2:], codes[i])


@by_block((U16, 10), (F32,))
def lows_q4_1(words: np.ndarray, lows: np.ndarray) -> None:
    for i in range(len(words)):
        lows[i] = -f32_from_f16(words[i, 1])


@by_block((U16, 16), (U16, 10))
def pack_q4_1(codes: np.ndarray, words: np.ndarray) -> None:
    for i in range(len(words)):
        _pack_nibbles(codes[i], words[i, 2:])


# Five bits a code: bit j of the 32-bit qh is the highest bit of weight j, qs holds the lower four as above. Eight codes
# at a time are worked on in one 64-bit integer.

_EACH_BYTE = np.uint64(0x0101010101010101)
_LOW_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_FIFTH_BITS = np.uint64(0x1010101010101010)
_SEVEN_BITS = np.uint64(0x7F7F7F7F7F7F7F7F)
_BIT_K_OF_BYTE_K = np.uint64(0x8040201008040201)
_BYTE_K_TO_BIT_K = np.uint64(0x0102040810204080)
_4, _8, _16 = np.uint64(4), np.uint64(8), np.uint64(16)


@kernel
def _load(words: np.ndarray, k: int) -> int:
    return (
        np.uint64(words[k])
        | np.uint64(words[k + 1]) << _16
        | np.uint64(words[k + 2]) << np.uint64(32)
        | np.uint64(words[k + 3]) << np.uint64(48)
    )


@kernel
def _store(value: int, words: np.ndarray, k: int) -> None:
    for j in range(4):
        words[k + j] = value >> np.uint64(16 * j)


@kernel
def _spread(bits: int) -> int:
    """Bit k of the byte ``bits`` as the fifth bit of byte k."""
    chosen = (np.uint64(bits) & np.uint64(255)) * _EACH_BYTE & _BIT_K_OF_BYTE_K
    return (chosen + _SEVEN_BITS) >> np.uint64(3) & _FIFTH_BITS


@kernel
def _gather(codes: np.ndarray) -> int:
    return (codes >> _4 & _EACH_BYTE) * _BYTE_K_TO_BIT_K >> np.uint64(56)


@kernel
def _unpack_five_bits(words: np.ndarray, codes: np.ndarray) -> None:
    low, high = _load(words, 2), _load(words, 6)
    codes[0] = low & _LOW_NIBBLES | _spread(words[0])
    codes[1] = high & _LOW_NIBBLES | _spread(words[0] >> 8)
    codes[2] = low >> _4 & _LOW_NIBBLES | _spread(words[1])
    codes[3] = high >> _4 & _LOW_NIBBLES | _spread(words[1] >> 8)


@kernel
def _pack_five_bits(codes: np.ndarray, words: np.ndarray) -> None:
    words[0] = _gather(codes[0]) | _gather(codes[1]) << _8
    words[1] = _gather(codes[2]) | _gather(codes[3]) << _8
    _store(codes[0] & _LOW_NIBBLES | (codes[2] & _LOW_NIBBLES) << _4, words, 2)
    _store(codes[1] & _LOW_NIBBLES | (codes[3] & _LOW_NIBBLES) << _4, words, 6)


@kernel
def _fifth_bit(qh: int, j: int) -> int:
    return np.uint32(qh >> np.uint32(j)) << 4 & 16


# Q5_0 is d:2 qh:4 qs:16, weight = d * (code - 16).


@by_block((U8, 22), (F32, 2, 16))
def decode_q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d, qh = f32_at(blocks[i], 0), _u32(blocks[i], 2)
        qs, low, high = blocks[i, 6:], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(np.int32(qs[j] & 15 | _fifth_bit(qh, j)) - 16) * d
            high[j] = np.float32(np.int32(qs[j] >> 4 | _fifth_bit(qh, j + 16)) - 16) * d


@by_block((U16, 11), (U64, 4), (F32,))
def unpack_q5_0(words: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_five_bits(words[i, 1:], codes[i])


@by_block((U64, 4), (U16, 11))
def pack_q5_0(codes: np.ndarray, words: np.ndarray) -> None:
    for i in range(len(words)):
        _pack_five_bits(codes[i], words[i, 1:])


# Q5_1 is d:2 m:2 qh:4 qs:16, weight = d * code + m.


@by_block((U8, 24), (F32, 2, 16))
def decode_q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d, m, qh = f32_at(blocks[i], 0), f32_at(blocks[i], 2), _u32(blocks[i], 4)
        qs, low, high = blocks[i, 8:], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(np.int32(qs[j] & 15 | _fifth_bit(qh, j))) * d + m
            high[j] = np.float32(np.int32(qs[j] >> 4 | _fifth_bit(qh, j + 16))) * d + m


@by_block((U16, 12), (U64, 4), (F32,))
def unpack_q5_1(words: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_five_bits(words[i, 2:], codes[i])


@by_block((U16, 12), (F32,))
def lows_q5_1(words: np.ndarray, lows: np.ndarray) -> None:
    for i in range(len(words)):
        lows[i] = -f32_from_f16(words[i, 1])


@by_block((U64, 4), (U16, 12))
def pack_q5_1(codes: np.ndarray, words: np.ndarray) -> None:
    for i in range(len(words)):
        _pack_five_bits(codes[i], words[i, 2:])


# Q8_0 is d:2 qs:32, weight = d * code, and qs are the codes themselves.


@by_block((U8, 34), (F32, 32))
def decode_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d, qs, y = f32_at(blocks[i], 0), blocks[i, 2:], out[i]
        for j in range(y.size):
            y[j] = np.float32(np.int8(qs[j])) * d


@by_block((U16, 17), (U16, 16), (F32,))
def unpack_q8_0(words: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        for k in range(16):
            codes[i, k] = words[i, k + 1]


@by_block((U16, 16), (U16, 17))
def pack_q8_0(codes: np.ndarray, words: np.ndarray) -> None:
    for i in range(len(words)):
        for k in range(16):
            words[i, k + 1] = codes[i, k]
