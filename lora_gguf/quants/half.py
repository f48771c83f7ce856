"""Half-precision numbers inside kernels: bit patterns to f32 and back, as IEEE 754 and ggml do it."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernel import kernel

_TWO_112 = np.float32(2.0**112)


@kernel
def f32_from_f16(h):
    """The f32 value of the f16 bit pattern ``h`` (an integer), exact; a NaN comes out quiet, as from ggml."""
    h = np.uint32(h)
    bits = np.uint32((h & 0x7FFF) << 13)
    value = bits.view(np.float32) * _TWO_112  # rebias the exponent; denormals come out right
    if h & 0x7C00 == 0x7C00:  # infinity, NaN
        quiet = 0x400000 if h & 0x3FF else 0
        value = np.uint32(bits | 0x7F800000 | quiet).view(np.float32)
    return -value if h & 0x8000 else value


@kernel
def f16_from_f32(x):
    """The f16 bit pattern (uint16) nearest to the f32 ``x``, ties to even; overflow gives infinity, NaN a quiet NaN."""
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32((bits >> 16) & 0x8000)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    if magnitude >= 0x47800000:  # 65536 and above
        return np.uint16(sign | (0x7E00 if magnitude > 0x7F800000 else 0x7C00))
    if magnitude < 0x38800000:  # denormal in f16: the addition rounds to its unit, 2**-24
        rounded = np.float32(magnitude.view(np.float32) + np.float32(0.5))
        return np.uint16(sign | (rounded.view(np.uint32) - 0x3F000000))
    rebiased = (magnitude - 0x38000000) + 0xFFF + ((magnitude >> 13) & 1)
    return np.uint16(sign | (rebiased >> 13))
