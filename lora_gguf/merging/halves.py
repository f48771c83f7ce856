"""Floats of 16 bits moved by their update, and the sums that tell what became of an update.

They are rounded as codes are (``rounding``): the offset that is added to what is dropped has a ``spread``, 1 dithers
and 0 rounds to nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_gguf.kernels.chance import key_of_row, uniform
from lora_gguf.kernels.decorators import kernel, report_kernel
from lora_gguf.kernels.half import f32_from_f16


@report_kernel
def _tally(delta: np.ndarray, moved: np.ndarray, changed: Any, sums: np.ndarray) -> None:
    """Add a row's Σ delta·moved, Σ delta², Σ moved² and its number of changed codes to ``sums`` (4,)."""
    both = wanted = got = np.float32(0.0)
    for j in range(len(delta)):
        both += delta[j] * moved[j]
        wanted += delta[j] * delta[j]
        got += moved[j] * moved[j]
    sums[0] += both
    sums[1] += wanted
    sums[2] += got
    sums[3] += changed


@kernel
def round_bf16(halves: np.ndarray, delta: np.ndarray, spread: Any, key: Any, first_row: Any, sums: np.ndarray) -> None:
    """Move bf16 bit patterns ``halves`` uint16 (rows, cols), in place, by ``delta``; the rest as ``round_codes``."""
    n_rows, n_cols = halves.shape
    moved = np.empty(n_cols, np.float32)
    base = np.float32(0.5) - np.float32(0.5) * np.float32(spread)
    for i in range(n_rows):
        row_key = key_of_row(key, first_row + i)
        changed = 0
        for j in range(n_cols):
            old = np.uint32(np.uint32(halves[i, j]) << 16)
            wanted = np.float32(old.view(np.float32) + delta[i, j])
            offset = base + np.float32(spread) * uniform(row_key, j)
            carried = wanted.view(np.uint32) + np.uint32(offset * np.float32(65536.0))
            new = np.uint32(old if delta[i, j] == 0 else carried & 0xFFFF0000)
            halves[i, j] = np.uint16(new >> 16)
            moved[j] = np.uint32(new).view(np.float32) - old.view(np.float32)
            changed += new != old
        _tally(delta[i], moved, changed, sums)


@kernel
def _f16_offset(wanted: np.ndarray, offset: Any) -> Any:
    """Return the f16 pattern below ``wanted``, or above where the dropped fraction plus ``offset`` reaches 1."""
    bits = np.float32(wanted).view(np.uint32)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    if magnitude < 0x38800000:  # denormal in f16, whose unit is 2**-24
        pattern = np.uint32(np.floor(magnitude.view(np.float32) * np.float32(2.0**24) + offset))
    else:
        pattern = np.uint32((magnitude - 0x38000000 + np.uint32(offset * np.float32(8192.0))) >> 13)
    return np.uint16(min(pattern, np.uint32(0x7C00)) | ((bits >> 16) & 0x8000))


@kernel
def round_f16(halves: np.ndarray, delta: np.ndarray, spread: Any, key: Any, first_row: Any, sums: np.ndarray) -> None:
    """Round as ``round_bf16`` does, for f16 bit patterns."""
    n_rows, n_cols = halves.shape
    moved = np.empty(n_cols, np.float32)
    base = np.float32(0.5) - np.float32(0.5) * np.float32(spread)
    for i in range(n_rows):
        row_key = key_of_row(key, first_row + i)
        changed = 0
        for j in range(n_cols):
            old = halves[i, j]
            value = f32_from_f16(old)
            new = old
            if delta[i, j] != 0:
                new = _f16_offset(np.float32(value + delta[i, j]), base + np.float32(spread) * uniform(row_key, j))
            halves[i, j] = new
            moved[j] = f32_from_f16(new) - value
            changed += new != old
        _tally(delta[i], moved, changed, sums)


@kernel
def tally_rows(before: np.ndarray, after: np.ndarray, delta: np.ndarray, sums: np.ndarray) -> None:
    """Add what became of ``delta`` when weights ``before`` turned into ``after`` (all f32, (rows, cols)) to
    ``sums``.
    """
    n_rows, n_cols = before.shape
    moved = np.empty(n_cols, np.float32)
    for i in range(n_rows):
        changed = 0
        for j in range(n_cols):
            moved[j] = after[i, j] - before[i, j]
            changed += moved[j] != 0
        _tally(delta[i], moved, changed, sums)
