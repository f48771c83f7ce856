"""One and two bits a weight: TQ1_0, TQ2_0, Q1_0 and Q2_0 (ggml).

A block is one f16 scale ``d`` and codes; a weight is ``d * code`` (Q1_0: ``-d`` or ``d``). The codes lie
interleaved in TQ1_0 and TQ2_0, in reading order in Q1_0 and Q2_0:

    TQ1_0   54 bytes, 256 weights   trits[52]; bytes 0-31 hold weights m + 32n, bytes 32-47 160 + m + 16n (n < 5),
                                    bytes 48-51 240 + m + 4n (n < 4), trit n being the n-th after the point of byte/256
                                    in base 3; then d
    TQ2_0   66 bytes, 256 weights   qs[64]; byte 32h + m holds weights 128h + m + 32n in bits 2n; then d
    Q1_0    18 bytes, 128 weights   d, then qs[16], weight j in bit j % 8 of byte j / 8
    Q2_0    18 bytes,  64 weights   d, then qs[16], weight j in bits 2 (j % 4) of byte j / 4

Two bits reach the code 2, which decodes to 2d. ggml's quantizers never write it. The grid of Q2_0 includes it; that of
TQ2_0 ends at 1, as the type's name promises. 13 of the 256 bytes of five trits are never written by ggml either, and
``pack`` leaves such a byte alone as long as its codes stay.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernel import kernel
from lora_gguf.quants import quant
from lora_gguf.quants.half import f16_from_f32, f32_from_f16

POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)


def _canonical_trits(n_trits: int) -> np.ndarray:
    """For each byte, the byte that ggml writes for the same first ``n_trits`` trits."""
    value = np.zeros(256, np.int64)
    for n, power in enumerate(POWERS_OF_3):
        trit = ((np.arange(256) * power % 256) * 3 >> 8) if n < n_trits else 0
        value = 3 * value + trit
    return ((value * 256 + 242) // 243).astype(np.uint8)


CANONICAL = np.stack([_canonical_trits(5), _canonical_trits(4)])


# TQ1_0's runs of bytes: first byte, bytes, trits a byte, first weight
RUNS = np.array([[0, 32, 5, 0], [32, 16, 5, 160], [48, 4, 4, 240]])


@kernel
def _trit(byte, n):
    """The n-th trit of a byte, 0 to 2."""
    return (np.uint16(np.uint8(byte * POWERS_OF_3[n])) * np.uint16(3)) >> 8


@kernel
def decode_tq1_0(blocks, out):
    blocks, out = blocks.reshape(-1, 54), out.reshape(-1, 256)
    for i in range(len(blocks)):
        block, y = blocks[i], out[i]
        d = f32_from_f16(block[52] | block[53] << 8)
        for start, n_bytes, n_trits, first in RUNS:
            for n in range(n_trits):
                for m in range(n_bytes):
                    y[first + n * n_bytes + m] = np.float32(np.int32(_trit(block[start + m], n)) - 1) * d


@kernel
def unpack_tq1_0(blocks, codes, steps):
    blocks, codes, steps = blocks.reshape(-1, 54), codes.reshape(-1, 256), steps.reshape(-1)
    for i in range(len(blocks)):
        block, y = blocks[i], codes[i]
        steps[i] = f32_from_f16(block[52] | block[53] << 8)
        for start, n_bytes, n_trits, first in RUNS:
            for n in range(n_trits):
                for m in range(n_bytes):
                    y[first + n * n_bytes + m] = _trit(block[start + m], n) - 1


@kernel
def pack_tq1_0(codes, blocks):
    blocks, codes = blocks.reshape(-1, 54), codes.reshape(-1, 256)
    for i in range(len(blocks)):
        block, y = blocks[i], codes[i]
        for start, n_bytes, n_trits, first in RUNS:
            for m in range(n_bytes):
                value = np.int32(0)
                for n in range(n_trits):
                    value = value * np.int32(3) + np.int32(y[first + n * n_bytes + m] + 1)
                value *= POWERS_OF_3[5 - n_trits]
                byte = np.uint8((value * np.int32(256) + np.int32(242)) // np.int32(243))
                old = block[start + m]
                block[start + m] = old if CANONICAL[5 - n_trits, old] == byte else byte


@kernel
def decode_tq2_0(blocks, out):
    blocks, out = blocks.reshape(-1, 66), out.reshape(-1, 2, 4, 32)
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(block[64] | block[65] << 8)
        for h in range(2):
            for n in range(4):
                for m in range(32):
                    q = (block[32 * h + m] >> (2 * n)) & 3
                    out[i, h, n, m] = np.float32(np.int32(q) - 1) * d


@kernel
def unpack_tq2_0(blocks, codes, steps):
    blocks, codes, steps = blocks.reshape(-1, 66), codes.reshape(-1, 2, 4, 32), steps.reshape(-1)
    for i in range(len(blocks)):
        block = blocks[i]
        steps[i] = f32_from_f16(block[64] | block[65] << 8)
        for h in range(2):
            for n in range(4):
                for m in range(32):
                    codes[i, h, n, m] = ((block[32 * h + m] >> (2 * n)) & 3) - 1


@kernel
def pack_tq2_0(codes, blocks):
    blocks, codes = blocks.reshape(-1, 66), codes.reshape(-1, 2, 4, 32)
    for i in range(len(blocks)):
        for h in range(2):
            for m in range(32):
                byte = 0
                for n in range(4):
                    byte |= (codes[i, h, n, m] + 1) << (2 * n)
                blocks[i, 32 * h + m] = byte


@kernel
def decode_q1_0(blocks, out):
    blocks, out = blocks.reshape(-1, 18), out.reshape(-1, 16, 8)
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(block[0] | block[1] << 8)
        for k in range(16):
            for b in range(8):
                out[i, k, b] = d if block[2 + k] & (1 << b) else -d


@kernel
def unpack_q1_0(blocks, codes, steps):
    blocks, codes, steps = blocks.reshape(-1, 18), codes.reshape(-1, 16, 8), steps.reshape(-1)
    for i in range(len(blocks)):
        block = blocks[i]
        steps[i] = f32_from_f16(block[0] | block[1] << 8)
        for k in range(16):
            for b in range(8):
                codes[i, k, b] = (block[2 + k] >> b) & 1


@kernel
def pack_q1_0(codes, blocks):
    blocks, codes = blocks.reshape(-1, 18), codes.reshape(-1, 16, 8)
    for i in range(len(blocks)):
        for k in range(16):
            byte = 0
            for b in range(8):
                byte |= codes[i, k, b] << b
            blocks[i, 2 + k] = byte


@kernel
def decode_q2_0(blocks, out):
    blocks, out = blocks.reshape(-1, 18), out.reshape(-1, 16, 4)
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(block[0] | block[1] << 8)
        for k in range(16):
            for n in range(4):
                out[i, k, n] = np.float32(np.int32((block[2 + k] >> (2 * n)) & 3) - 1) * d


@kernel
def unpack_q2_0(blocks, codes, steps):
    blocks, codes, steps = blocks.reshape(-1, 18), codes.reshape(-1, 16, 4), steps.reshape(-1)
    for i in range(len(blocks)):
        block = blocks[i]
        steps[i] = f32_from_f16(block[0] | block[1] << 8)
        for k in range(16):
            for n in range(4):
                codes[i, k, n] = ((block[2 + k] >> (2 * n)) & 3) - 1


@kernel
def pack_q2_0(codes, blocks):
    blocks, codes = blocks.reshape(-1, 18), codes.reshape(-1, 16, 4)
    for i in range(len(blocks)):
        for k in range(16):
            byte = 0
            for n in range(4):
                byte |= (codes[i, k, n] + 1) << (2 * n)
            blocks[i, 2 + k] = byte


@kernel
def _amax(x):
    """The largest magnitude of ``x``, found on the bit patterns because that vectorises."""
    largest = np.uint32(0)
    for bits in x.view(np.uint32):
        largest = max(largest, bits & np.uint32(0x7FFFFFFF))
    return np.uint32(largest).view(np.float32)


@kernel
def _ternary_codes(x, overflow, codes):
    """Round ``x`` over its largest magnitude to -1, 0, 1, halves away from zero, and return that magnitude.

    The inverse of a denormal magnitude may be infinite, and so the quotient; ggml converts it to an integer as x86
    does, which gives ``overflow``. The scale is then 0 in f16, so that only the bytes matter.
    """
    d = _amax(x)
    inverse = np.float32(1) / d if d > 0 else np.float32(0)
    for j in range(len(x)):
        r = x[j] * inverse
        code = np.int8(r >= np.float32(0.5)) - np.int8(r <= np.float32(-0.5))
        codes[j] = code if abs(r) < np.float32(2) else overflow
    return d


@kernel
def _write_f16(x, target):
    h = f16_from_f32(x)
    target[0] = h & 0xFF
    target[1] = h >> 8


@kernel
def encode_tq1_0(weights, importance, blocks):
    weights, blocks = weights.reshape(-1, 256), blocks.reshape(-1, 54)
    codes = np.empty((1, 256), np.int8)
    blocks[:] = 0
    for i in range(len(blocks)):
        _write_f16(_ternary_codes(weights[i], 0, codes[0]), blocks[i, 52:])
        pack_tq1_0(codes, blocks[i : i + 1])


@kernel
def encode_tq2_0(weights, importance, blocks):
    weights, blocks = weights.reshape(-1, 256), blocks.reshape(-1, 66)
    codes = np.empty((1, 256), np.int8)
    for i in range(len(blocks)):
        _write_f16(_ternary_codes(weights[i], 0, codes[0]), blocks[i, 64:])
        pack_tq2_0(codes, blocks[i : i + 1])


@kernel
def encode_q1_0(weights, importance, blocks):
    weights, blocks = weights.reshape(-1, 128), blocks.reshape(-1, 18)
    codes = np.empty((1, 128), np.int8)
    for i in range(len(blocks)):
        total = np.float32(0)
        for j in range(128):
            total += abs(weights[i, j])
            codes[0, j] = weights[i, j] >= 0
        _write_f16(total / np.float32(128), blocks[i])
        pack_q1_0(codes, blocks[i : i + 1])


@kernel
def encode_q2_0(weights, importance, blocks):
    weights, blocks = weights.reshape(-1, 64), blocks.reshape(-1, 18)
    codes = np.empty((1, 64), np.int8)
    for i in range(len(blocks)):
        _write_f16(_ternary_codes(weights[i], -1, codes[0]), blocks[i])
        pack_q2_0(codes, blocks[i : i + 1])


TERNARY = [
    quant("TQ1_0", decode_tq1_0, encode=encode_tq1_0, unpack=unpack_tq1_0, pack=pack_tq1_0, group=256, code_min=-1, code_max=1),
    quant("TQ2_0", decode_tq2_0, encode=encode_tq2_0, unpack=unpack_tq2_0, pack=pack_tq2_0, group=256, code_min=-1, code_max=1),
    quant("Q1_0", decode_q1_0, encode=encode_q1_0, unpack=unpack_q1_0, pack=pack_q1_0, group=128, code_min=0, code_max=1,
          levels=np.array([-1, 1], np.float32)),
    quant("Q2_0", decode_q2_0, encode=encode_q2_0, unpack=unpack_q2_0, pack=pack_q2_0, group=64, code_min=-1, code_max=2),
]  # fmt: skip
