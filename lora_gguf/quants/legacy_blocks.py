"""The bytes of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights a block, one f16 scale, and in the _1 types one f16 minimum.

Blocks and codes are read as 16-bit words, two codes at a time. Where a loop is to be vectorised, an array's shape counts
its lanes: LLVM unrolls a literal count before its vectoriser sees the loop.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernel import kernel
from lora_gguf.quants.half import f32_from_f16


@kernel
def _words(array, per_block):
    return array.reshape(-1).view(np.uint16).reshape(-1, per_block)


# Four bits a code: byte j of qs holds weight j in its low nibble and weight j + 16 in its high one.


@kernel
def _unpack_nibbles(qs, codes):
    for k in range(8):
        codes[k] = qs[k] & 0x0F0F
        codes[k + 8] = qs[k] >> 4 & 0x0F0F


@kernel
def _pack_nibbles(codes, qs):
    for k in range(8):
        qs[k] = codes[k] & 0x0F0F | (codes[k + 8] & 0x0F0F) << 4


# Q4_0 is d:2 qs:16, weight = d * (code - 8).


@kernel
def decode_q4_0(blocks, out):
    d = _words(blocks, 9)[:, 0]
    qs = blocks.reshape(-1, 18)[:, 2:]
    out = out.reshape(-1, 2, 16)
    for i in range(len(d)):
        step, q, low, high = f32_from_f16(d[i]), qs[i], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(np.int32(q[j] & 15) - 8) * step
            high[j] = np.float32(np.int32(q[j] >> 4) - 8) * step


@kernel
def unpack_q4_0(blocks, codes, steps):
    words, codes, steps = _words(blocks, 9), _words(codes, 16), steps.reshape(-1)
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_nibbles(words[i, 1:], codes[i])


@kernel
def pack_q4_0(codes, blocks):
    words, codes = _words(blocks, 9), _words(codes, 16)
    for i in range(len(words)):
        _pack_nibbles(codes[i], words[i, 1:])


# Q4_1 is d:2 m:2 qs:16, weight = d * code + m.


@kernel
def decode_q4_1(blocks, out):
    words = _words(blocks, 10)
    qs = blocks.reshape(-1, 20)[:, 4:]
    out = out.reshape(-1, 2, 16)
    for i in range(len(words)):
        d, m = f32_from_f16(words[i, 0]), f32_from_f16(words[i, 1])
        q, low, high = qs[i], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(q[j] & 15) * d + m
            high[j] = np.float32(q[j] >> 4) * d + m


@kernel
def unpack_q4_1(blocks, codes, steps):
    words, codes, steps = _words(blocks, 10), _words(codes, 16), steps.reshape(-1)
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_nibbles(words[i, 2:], codes[i])


@kernel
def pack_q4_1(codes, blocks):
    words, codes = _words(blocks, 10), _words(codes, 16)
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
def _eights(codes):
    return codes.reshape(-1).view(np.uint64).reshape(-1, 4)


@kernel
def _load(words, k):
    return (
        np.uint64(words[k])
        | np.uint64(words[k + 1]) << _16
        | np.uint64(words[k + 2]) << np.uint64(32)
        | np.uint64(words[k + 3]) << np.uint64(48)
    )


@kernel
def _store(value, words, k):
    for j in range(4):
        words[k + j] = value >> np.uint64(16 * j)


@kernel
def _spread(bits):
    """Bit k of the byte ``bits`` as the fifth bit of byte k."""
    chosen = (np.uint64(bits) & np.uint64(255)) * _EACH_BYTE & _BIT_K_OF_BYTE_K
    return (chosen + _SEVEN_BITS) >> np.uint64(3) & _FIFTH_BITS


@kernel
def _gather(codes):
    return (codes >> _4 & _EACH_BYTE) * _BYTE_K_TO_BIT_K >> np.uint64(56)


@kernel
def _unpack_five_bits(words, codes):
    low, high = _load(words, 2), _load(words, 6)
    codes[0] = low & _LOW_NIBBLES | _spread(words[0])
    codes[1] = high & _LOW_NIBBLES | _spread(words[0] >> 8)
    codes[2] = low >> _4 & _LOW_NIBBLES | _spread(words[1])
    codes[3] = high >> _4 & _LOW_NIBBLES | _spread(words[1] >> 8)


@kernel
def _pack_five_bits(codes, words):
    words[0] = _gather(codes[0]) | _gather(codes[1]) << _8
    words[1] = _gather(codes[2]) | _gather(codes[3]) << _8
    _store(codes[0] & _LOW_NIBBLES | (codes[2] & _LOW_NIBBLES) << _4, words, 2)
    _store(codes[1] & _LOW_NIBBLES | (codes[3] & _LOW_NIBBLES) << _4, words, 6)


@kernel
def _fifth_bit(qh, j):
    return np.uint32(qh >> np.uint32(j)) << 4 & 16


# Q5_0 is d:2 qh:4 qs:16, weight = d * (code - 16).


@kernel
def decode_q5_0(blocks, out):
    words = _words(blocks, 11)
    qs = blocks.reshape(-1, 22)[:, 6:]
    out = out.reshape(-1, 2, 16)
    for i in range(len(words)):
        d, qh = f32_from_f16(words[i, 0]), np.uint32(words[i, 1] | words[i, 2] << 16)
        q, low, high = qs[i], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(np.int32(q[j] & 15 | _fifth_bit(qh, j)) - 16) * d
            high[j] = np.float32(np.int32(q[j] >> 4 | _fifth_bit(qh, j + 16)) - 16) * d


@kernel
def unpack_q5_0(blocks, codes, steps):
    words, codes, steps = _words(blocks, 11), _eights(codes), steps.reshape(-1)
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_five_bits(words[i, 1:], codes[i])


@kernel
def pack_q5_0(codes, blocks):
    words, codes = _words(blocks, 11), _eights(codes)
    for i in range(len(words)):
        _pack_five_bits(codes[i], words[i, 1:])


# Q5_1 is d:2 m:2 qh:4 qs:16, weight = d * code + m.


@kernel
def decode_q5_1(blocks, out):
    words = _words(blocks, 12)
    qs = blocks.reshape(-1, 24)[:, 8:]
    out = out.reshape(-1, 2, 16)
    for i in range(len(words)):
        d, m = f32_from_f16(words[i, 0]), f32_from_f16(words[i, 1])
        qh = np.uint32(words[i, 2] | words[i, 3] << 16)
        q, low, high = qs[i], out[i, 0], out[i, 1]
        for j in range(low.size):
            low[j] = np.float32(np.int32(q[j] & 15 | _fifth_bit(qh, j))) * d + m
            high[j] = np.float32(np.int32(q[j] >> 4 | _fifth_bit(qh, j + 16))) * d + m


@kernel
def unpack_q5_1(blocks, codes, steps):
    words, codes, steps = _words(blocks, 12), _eights(codes), steps.reshape(-1)
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        _unpack_five_bits(words[i, 2:], codes[i])


@kernel
def pack_q5_1(codes, blocks):
    words, codes = _words(blocks, 12), _eights(codes)
    for i in range(len(words)):
        _pack_five_bits(codes[i], words[i, 2:])


# Q8_0 is d:2 qs:32, weight = d * code, and qs are the codes themselves.


@kernel
def decode_q8_0(blocks, out):
    d = _words(blocks, 17)[:, 0]
    qs = blocks.reshape(-1, 34)[:, 2:]
    out = out.reshape(-1, 32)
    for i in range(len(d)):
        step, q, y = f32_from_f16(d[i]), qs[i], out[i]
        for j in range(y.size):
            y[j] = np.float32(np.int8(q[j])) * step


@kernel
def unpack_q8_0(blocks, codes, steps):
    words, codes, steps = _words(blocks, 17), _words(codes, 16), steps.reshape(-1)
    for i in range(len(words)):
        steps[i] = f32_from_f16(words[i, 0])
        for k in range(16):
            codes[i, k] = words[i, k + 1]


@kernel
def pack_q8_0(codes, blocks):
    words, codes = _words(blocks, 17), _words(codes, 16)
    for i in range(len(words)):
        for k in range(16):
            words[i, k + 1] = codes[i, k]
