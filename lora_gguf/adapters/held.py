"""What of an adapter is in memory while a tensor's rows are in work, and what stays in its file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.files.lazy_array import LazyArray, at_hand


def in_memory(value: Any, by_row: bool = False) -> Any:
    """Return what a field of an update holds, its arrays read; one that can be read ``by_row`` may stay where it is."""
    if isinstance(value, LazyArray):
        return at_hand(value) if by_row else np.asarray(value)
    if isinstance(value, LoraPair):
        return replace(value, a=np.asarray(value.a), b=np.asarray(value.b))
    return type(value)(in_memory(item) for item in value) if isinstance(value, list | tuple) else value


def n_held(value: Any, by_row: bool = False) -> int:
    """Return how many bytes ``in_memory(value, by_row)`` takes."""
    if isinstance(value, LoraPair):
        return n_held(value.a) + n_held(value.b)
    if isinstance(value, list | tuple):
        return sum(map(n_held, value))
    stays = by_row and isinstance(value, LazyArray) and value.by_row
    return value.nbytes if isinstance(value, np.ndarray | LazyArray) and not stays else 0
