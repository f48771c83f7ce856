"""F32, F16 and BF16: a weight is a number of its own."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.quants.codec import Half, codec


def decode_f32(blocks, out):
    out.view(np.uint8)[...] = blocks


def encode_f32(weights, importance, blocks):
    blocks[...] = weights.view(np.uint8)


@kernel
def decode_f16(blocks, out):
    """NaNs come out quiet, as the processor's own conversion gives them."""
    halves, out = blocks.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32)
    for j in range(halves.size):
        bits = np.uint32(np.uint32(halves[j] & 0x7FFF) << 13)
        finite = np.float32(bits.view(np.float32) * np.float32(2.0**112)).view(np.uint32)  # denormals come out right
        special = np.uint32(bits | 0x7F800000 | (np.uint32(0x400000) if bits > 0x0F800000 else np.uint32(0)))
        magnitude = special if bits >= 0x0F800000 else finite
        out[j] = magnitude | np.uint32(halves[j] & 0x8000) << 16


@kernel
def encode_f16(weights, importance, blocks):
    """Nearest, ties to even; overflow gives infinity."""
    bits, halves = weights.reshape(-1).view(np.uint32), blocks.reshape(-1).view(np.uint16)
    for j in range(bits.size):
        magnitude = np.uint32(bits[j] & 0x7FFFFFFF)
        normal = np.uint32(magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13
        tiny = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - 0x3F000000
        finite = np.uint32(tiny if magnitude < 0x38800000 else normal)
        special = np.uint32(0x7E00 if magnitude > 0x7F800000 else 0x7C00)
        halves[j] = (special if magnitude >= 0x47800000 else finite) | bits[j] >> 16 & 0x8000


@kernel
def decode_bf16(blocks, out):
    halves, out = blocks.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32)
    for j in range(halves.size):
        out[j] = np.uint32(halves[j]) << 16


@kernel
def encode_bf16(weights, importance, blocks):
    """Nearest, ties to even; NaNs become quiet, denormals stay."""
    bits, halves = weights.reshape(-1).view(np.uint32), blocks.reshape(-1).view(np.uint16)
    for j in range(bits.size):
        rounded = np.uint32(bits[j] + 0x7FFF + (bits[j] >> 16 & 1)) >> 16
        nan = bits[j] >> 16 | 64
        halves[j] = nan if bits[j] & 0x7FFFFFFF > 0x7F800000 else rounded


FLOATS = [
    codec("F32", decode_f32, encode_f32),
    codec("F16", decode_f16, encode_f16, half=Half(10, -14)),
    codec("BF16", decode_bf16, encode_bf16, half=Half(7, -126)),
]
