"""Memory that a thread uses again and again: fresh pages cost as much as a pass over them."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.ndarray:
    """Return an array that this thread uses again under ``name``, with whatever it held."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = getattr(_local, name, None)
    if buffer is None or len(buffer) < n_bytes:
        buffer = np.empty(n_bytes, np.uint8)
        setattr(_local, name, buffer)
    return buffer[:n_bytes].view(dtype).reshape(shape)


def copied(array: np.ndarray) -> np.ndarray:
    """Return a copy of an array in memory that this thread uses for one such copy at a time."""
    copy = scratch("copy", array.shape, array.dtype)
    copy[...] = array
    return copy
