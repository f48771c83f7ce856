"""Half-precision numbers inside kernels: bit patterns to f32 and back, as IEEE 754 and ggml do it."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import part

_UNIT = np.float32(2.0**-24)  # of f16 denormals
_REBIAS = np.float32(2.0**112)  # from f16's exponents to f32's


@part
def f32_from_f16(h: int) -> float:
    """Return the f32 value of the f16 bit pattern ``h`` (an integer), exact; a NaN comes out quiet, as from ggml."""
    h = np.uint32(h)
    magnitude = h & 0x7FFF
    bits = np.uint32((magnitude << 13) + 0x38000000)  # rebias the exponent
    if magnitude < 0x400:  # denormal in f16, and never in f32: arithmetic on denormals is slow
        bits = np.float32(np.float32(magnitude) * _UNIT).view(np.uint32)
    if magnitude >= 0x7C00:  # infinity, NaN
        bits = np.uint32((magnitude << 13) | 0x7F800000 | (0x400000 if magnitude > 0x7C00 else 0))
    return np.uint32(bits | (h & 0x8000) << 16).view(np.float32)


@part
def f32_of_many(h: int) -> float:
    """Return what ``f32_from_f16`` does, by choices alone: a loop over it becomes vector code."""
    bits = np.uint32(np.uint32(h & 0x7FFF) << 13)
    finite = np.float32(bits.view(np.float32) * _REBIAS).view(np.uint32)  # denormals come out right, but slowly
    special = np.uint32(bits | 0x7F800000 | (np.uint32(0x400000) if bits > 0x0F800000 else np.uint32(0)))
    magnitude = special if bits >= 0x0F800000 else finite
    return np.uint32(magnitude | np.uint32(h & 0x8000) << 16).view(np.float32)


@part
def f32_at(block: np.ndarray, at: int) -> float:
    """Return the f32 value of the f16 number at byte ``at`` of ``block`` uint8."""
    return f32_from_f16(np.uint32(block[at]) | np.uint32(block[at + 1]) << 8)


@part
def f16_from_f32(x: float) -> int:
    """Return the f16 bit pattern (uint16) nearest to the f32 ``x``, ties to even; overflow gives infinity, NaN a quiet
    NaN.
    """
    bits = np.float32(x).view(np.uint32)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    normal = np.uint32(magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13
    denormal = (
        np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - 0x3F000000
    )  # in units of 2**-24
    finite = np.uint32(denormal if magnitude < 0x38800000 else normal)
    special = np.uint32(0x7E00 if magnitude > 0x7F800000 else 0x7C00)
    return np.uint16((special if magnitude >= 0x47800000 else finite) | bits >> 16 & 0x8000)
