"""Numbers of eight bits as tables: what each byte stands for."""

from __future__ import annotations

import numpy as np


def e4m3_magnitudes() -> np.ndarray:
    """Return the E4M3 value without its sign of each byte, f32 (256,); 127 and 255 as the number 480, not as NaN."""
    exponent, mantissa = np.arange(256) >> 3 & 15, np.arange(256) & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)).astype(np.float32)
