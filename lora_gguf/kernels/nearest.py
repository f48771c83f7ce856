"""What lies nearest, as ggml finds it: the integer to a number, and the vector of a grid to weights off the grid."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import kernel, part

ROUNDING = np.float32(12582912)  # 1.5 * 2**23: a sum's lowest bit is worth one


@part
def nearest_int(x: float) -> int:
    """Return the integer (int32) nearest to the f32 ``x``, ties to even; beyond 2**22 whatever ggml's bit trick gives:
    NaN becomes 0, infinity -2**22.
    """
    return np.int32(np.int32(np.float32(x + ROUNDING).view(np.int32) & 0x7FFFFF) - 0x400000)


@kernel
def nearest_vector(
    vectors: np.ndarray,
    span: tuple[int, int],
    x: tuple[float, ...],
    w: tuple[float, ...],
    scale: float,
    shift: float | None,
    errors: np.ndarray,
) -> int:
    """Return the vector of least weighted square error, of ``span`` = (first, count) of ``vectors``; the first if there
    are several.

    A vector is an integer that holds a level of equally many bits for each of ``x``; a level counts as scale *
    (level - 1 + shift), or as scale * (2 * level + 1) where ``shift`` is None. ``x`` and the weights of their errors
    ``w`` are tuples, so that their loop unrolls, and the indices are unsigned, so that the other loop vectorises.
    ``errors`` int32 is room for the span's.
    """
    first, count = span
    width = 16 // len(x)
    for n in range(count):
        code, error = np.int32(vectors[first + n]), np.float32(0)
        for i in range(len(x)):
            level = np.int32(code >> (width * i)) & np.int32((1 << width) - 1)
            if shift is None:
                value = np.float32(np.int32(2 * level + 1))
            else:
                value = np.float32(level - np.int32(1)) + shift
            difference = scale * value - x[i]
            error += w[i] * difference * difference
        errors[n] = np.float32(error).view(np.int32)
    least, best = errors[0], np.int32(count)
    for n in range(count):
        least = errors[n] if errors[n] < least else least
    for n in range(count):
        at = np.int32(n) if errors[n] == least else np.int32(count)
        best = at if at < best else best
    return vectors[first + np.uint64(best)]
