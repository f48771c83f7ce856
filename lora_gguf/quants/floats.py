"""F32, F16 and BF16: a weight is a number of its own."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.half import f16_from_f32, f32_of_many
from lora_gguf.quants.codec import Half, codec


def decode_f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out.view(np.uint8)[...] = blocks


def encode_f32(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    blocks[...] = weights.view(np.uint8)


@kernel
def decode_f16(blocks: np.ndarray, out: np.ndarray) -> None:
    """Widen f16; NaNs come out quiet, as the processor's own conversion gives them."""
    halves, out = blocks.reshape(-1).view(np.uint16), out.reshape(-1)
    for j in range(halves.size):
        out[j] = f32_of_many(halves[j])


@kernel
def encode_f16(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    """Round to the nearest f16, ties to even; overflow gives infinity."""
    weights, halves = weights.reshape(-1), blocks.reshape(-1).view(np.uint16)
    for j in range(weights.size):
        halves[j] = f16_from_f32(weights[j])


@kernel
def decode_bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    halves, out = blocks.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32)
    for j in range(halves.size):
        out[j] = np.uint32(halves[j]) << 16


@kernel
def encode_bf16(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    """Round to the nearest bf16, ties to even; NaNs become quiet, denormals stay."""
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
