"""One and two bits a weight: TQ1_0, TQ2_0, Q1_0 and Q2_0 (ggml).

A block is one f16 scale ``d`` and codes; a weight is ``d * code`` (Q1_0: ``-d`` or ``d``). The codes lie interleaved in
TQ1_0 and TQ2_0, in reading order in Q1_0 and Q2_0:

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

from collections.abc import Callable
from functools import partial

import numpy as np

from lora_gguf.kernels.by_block import F32, I8, U8, by_block
from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.half import f32_at
from lora_gguf.quants.codec import Grid, codec
from lora_gguf.quants.direct import store_f16

POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)
# TQ1_0's runs of bytes: first byte, bytes, trits a byte, first weight
RUNS = np.array([[0, 32, 5, 0], [32, 16, 5, 160], [48, 4, 4, 240]])


def _canonical_trits(n_trits: int) -> np.ndarray:
    """For each byte, the byte that ggml writes for the same first ``n_trits`` trits."""
    value = np.zeros(256, np.int64)
    for n, power in enumerate(POWERS_OF_3):
        trit = ((np.arange(256) * power % 256) * 3 >> 8) if n < n_trits else 0
        value = 3 * value + trit
    return ((value * 256 + 242) // 243).astype(np.uint8)


CANONICAL = np.stack([_canonical_trits(5), _canonical_trits(4)])


@kernel
def _trit(byte: int, n: int) -> int:
    """The n-th trit of a byte, 0 to 2."""
    return (np.uint16(np.uint8(byte * POWERS_OF_3[n])) * np.uint16(3)) >> 8


@by_block((U8, 54), (F32, 256))
def decode_tq1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block, y, d = blocks[i], out[i], f32_at(blocks[i], 52)
        for start, n_bytes, n_trits, first in RUNS:
            for n in range(n_trits):
                for m in range(n_bytes):
                    y[first + n * n_bytes + m] = np.float32(np.int32(_trit(block[start + m], n)) - 1) * d


@by_block((U8, 54), (I8, 256), (F32,))
def unpack_tq1_0(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        block, y = blocks[i], codes[i]
        steps[i] = f32_at(block, 52)
        for start, n_bytes, n_trits, first in RUNS:
            for n in range(n_trits):
                for m in range(n_bytes):
                    y[first + n * n_bytes + m] = _trit(block[start + m], n) - 1


@by_block((I8, 256), (U8, 54))
def pack_tq1_0(codes: np.ndarray, blocks: np.ndarray) -> None:
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


@by_block((U8, 66), (F32, 2, 4, 32))
def decode_tq2_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d = f32_at(blocks[i], 64)
        for h in range(2):
            for n in range(4):
                for m in range(32):
                    out[i, h, n, m] = np.float32(np.int32(blocks[i, 32 * h + m] >> (2 * n) & 3) - 1) * d


@by_block((U8, 66), (I8, 2, 4, 32), (F32,))
def unpack_tq2_0(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        steps[i] = f32_at(blocks[i], 64)
        for h in range(2):
            for n in range(4):
                for m in range(32):
                    codes[i, h, n, m] = (blocks[i, 32 * h + m] >> (2 * n) & 3) - 1


@by_block((I8, 2, 4, 32), (U8, 66))
def pack_tq2_0(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for h in range(2):
            for m in range(32):
                byte = 0
                for n in range(4):
                    byte |= (codes[i, h, n, m] + 1) << (2 * n)
                blocks[i, 32 * h + m] = byte


@by_block((U8, 18), (F32, 16, 8))
def decode_q1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d = f32_at(blocks[i], 0)
        for k in range(16):
            for b in range(8):
                out[i, k, b] = d if blocks[i, 2 + k] & (1 << b) else -d


@by_block((U8, 18), (I8, 16, 8), (F32,))
def unpack_q1_0(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        steps[i] = f32_at(blocks[i], 0)
        for k in range(16):
            for b in range(8):
                codes[i, k, b] = blocks[i, 2 + k] >> b & 1


@by_block((I8, 16, 8), (U8, 18))
def pack_q1_0(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for k in range(16):
            byte = 0
            for b in range(8):
                byte |= codes[i, k, b] << b
            blocks[i, 2 + k] = byte


@by_block((U8, 18), (F32, 16, 4))
def decode_q2_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        d = f32_at(blocks[i], 0)
        for k in range(16):
            for n in range(4):
                out[i, k, n] = np.float32(np.int32(blocks[i, 2 + k] >> (2 * n) & 3) - 1) * d


@by_block((U8, 18), (I8, 16, 4), (F32,))
def unpack_q2_0(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        steps[i] = f32_at(blocks[i], 0)
        for k in range(16):
            for n in range(4):
                codes[i, k, n] = (blocks[i, 2 + k] >> (2 * n) & 3) - 1


@by_block((I8, 16, 4), (U8, 18))
def pack_q2_0(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for k in range(16):
            byte = 0
            for n in range(4):
                byte |= (codes[i, k, n] + 1) << (2 * n)
            blocks[i, 2 + k] = byte


@kernel
def _round(overflow: int, x: np.ndarray, codes: np.ndarray, d: np.ndarray) -> None:
    """Round each row of ``x`` over its largest magnitude, ``d``, to -1, 0 or 1, halves away from zero.

    The inverse of a denormal magnitude may be infinite, and so the quotient; ggml converts it to an integer as x86
    does, which gives ``overflow``. The scale is 0 in f16 then, so that only the bytes matter.
    """
    for i in range(len(x)):
        largest = np.uint32(0)
        for bits in x[i].view(np.uint32):  # on the bit patterns because that vectorises
            largest = max(largest, bits & np.uint32(0x7FFFFFFF))
        d[i] = np.uint32(largest).view(np.float32)
        inverse = np.float32(1) / d[i] if d[i] > 0 else np.float32(0)
        for j in range(x.shape[1]):
            r = x[i, j] * inverse
            code = np.int8(r >= np.float32(0.5)) - np.int8(r <= np.float32(-0.5))
            codes[i, j] = code if abs(r) < np.float32(2) else overflow


@kernel
def _signs(x: np.ndarray, codes: np.ndarray, d: np.ndarray) -> None:
    """The signs of each row of ``x`` as 0 and 1, and the mean magnitude ``d``."""
    for i in range(len(x)):
        total = np.float32(0)
        for j in range(x.shape[1]):
            total += abs(x[i, j])
            codes[i, j] = x[i, j] >= 0
        d[i] = total / np.float32(x.shape[1])


def _encode(
    quantize: Callable[..., None], pack: Callable[..., None], block_size: int, block_bytes: int, scale_at: int
) -> Callable[..., None]:
    @np.errstate(over="ignore")
    def encode(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
        x = weights.reshape(-1, block_size)
        codes, d = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
        quantize(x, codes, d)
        blocks[...] = 0
        store_f16(d, blocks.reshape(-1, block_bytes), scale_at)
        pack(codes, blocks)

    return encode


TERNARY = [
    codec(
        "TQ1_0", decode_tq1_0, _encode(partial(_round, 0), pack_tq1_0, 256, 54, 52), scales_at=(52,),
        grid=Grid(unpack_tq1_0, pack_tq1_0, group=256, code_min=-1, code_max=1),
    ),
    codec(
        "TQ2_0", decode_tq2_0, _encode(partial(_round, 0), pack_tq2_0, 256, 66, 64), scales_at=(64,),
        grid=Grid(unpack_tq2_0, pack_tq2_0, group=256, code_min=-1, code_max=1),
    ),
    codec(
        "Q1_0", decode_q1_0, _encode(_signs, pack_q1_0, 128, 18, 0), scales_at=(0,),
        grid=Grid(unpack_q1_0, pack_q1_0, group=128, code_max=1, levels=np.array([-1, 1], np.float32)),
    ),
    codec(
        "Q2_0", decode_q2_0, _encode(partial(_round, -1), pack_q2_0, 64, 18, 0), scales_at=(0,),
        grid=Grid(unpack_q2_0, pack_q2_0, group=64, code_min=-1, code_max=2),
    ),
]  # fmt: skip
