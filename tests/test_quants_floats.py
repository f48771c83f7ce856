from __future__ import annotations

import ctypes

import libgguf
import numpy as np
import pytest

from lora_gguf.quants.table import CODECS
from tests.common import ggml
from tests.quant_cases import decode, encode

ENCODERS = {"F16": "ggml_fp32_to_fp16_row", "BF16": "ggml_fp32_to_bf16_row_ref"}
DECODERS = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


def _through_ggml(function: str, values: np.ndarray, dtype) -> np.ndarray:
    out = np.empty(values.size, dtype)
    pointers = values.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)
    getattr(ggml(), function)(*pointers, ctypes.c_int64(values.size))
    return out


def _bit_patterns() -> np.ndarray:
    """f32 of any bits, and each upper half with the lower halves that decide a rounding."""
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    edges = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | lower).reshape(-1)
    return np.concatenate([edges, np.random.default_rng(1).integers(0, 1 << 32, 1 << 20, np.uint32)]).view(np.float32)


@pytest.mark.parametrize("name", ENCODERS)
def test_encode(name):
    weights = _bit_patterns()
    ours = encode(name, weights[None]).view(np.uint16)[0]
    assert np.array_equal(ours, _through_ggml(ENCODERS[name], weights, np.uint16))
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = libgguf.quantize_rows(weights[None], CODECS[name].type.id)
    assert np.array_equal(ours, theirs.reshape(-1).view(np.uint16))


@pytest.mark.parametrize("name", DECODERS)
def test_decode(name):
    halves = np.arange(1 << 16, dtype=np.uint16)
    ours = decode(name, halves.view(np.uint8)[None])[0]
    assert np.array_equal(ours.view(np.uint32), _through_ggml(DECODERS[name], halves, np.float32).view(np.uint32))


def test_f32_is_copied_bit_for_bit():
    weights = _bit_patterns()[None]
    blocks = encode("F32", weights)
    assert blocks.tobytes() == weights.tobytes()
    assert decode("F32", blocks).tobytes() == weights.tobytes()
