"""What ggml's quantizers compute without a search: sums, extremes, truncation, rounding away from zero."""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.nearest import nearest_int

F0, F1 = np.float32(0), np.float32(1)
_INT32_END = np.float32(2.0**31)


def store_f16(values: np.ndarray, blocks: np.ndarray, at: int) -> np.ndarray:
    """Write ``values`` (n,) as f16 at byte ``at`` of ``blocks``, both even; gives them so rounded, (n, 1) f32."""
    stored = blocks.view(np.float16)[:, at // 2]
    stored[...] = values
    return stored.astype(np.float32)[:, None]


@kernel
def round_scales(values: np.ndarray, code_max: int, codes: np.ndarray, scales: np.ndarray) -> None:
    """Write codes (n, groups) uint8 of values (n, groups), by the scale that makes ``code_max`` of the largest."""
    for i in range(len(values)):
        largest = F0
        for value in values[i]:
            largest = value if value > largest else largest
        inverse = code_max / largest if largest > F0 else F0
        for g in range(values.shape[1]):
            codes[i, g] = nearest_int(inverse * values[i, g]) & 255
        scales[i] = largest / code_max


@kernel
def round_signed_scales(
    values: np.ndarray, lowest: int, highest: int, offset: int, least: float, codes: np.ndarray, scales: np.ndarray
) -> None:
    """Write codes (n, groups) int8 of values (n, groups), by the scale that makes ``lowest`` of the largest in
    magnitude.

    ``offset`` is added to the codes. Without a value of magnitude ``least`` or more, codes and scale are 0.
    """
    for i in range(len(values)):
        extreme = F0
        for value in values[i]:
            extreme = value if abs(value) > abs(extreme) else extreme
        is_zero = (abs(extreme) < least) | (extreme == F0)
        inverse = np.float32(lowest) / extreme
        for g in range(values.shape[1]):
            code = np.int8(min(highest, nearest_int(inverse * values[i, g])))
            codes[i, g] = 0 if is_zero else code + offset
        scales[i] = F0 if is_zero else F1 / inverse


def sums(x: np.ndarray) -> np.ndarray:
    """Return f32 sums of the rows of x (groups, n), added one after the other."""
    out = np.empty(len(x), np.float32)
    _sums(x, out)
    return out


@kernel
def _sums(x: np.ndarray, out: np.ndarray) -> None:
    for g in range(len(x)):
        total = F0
        for value in x[g]:
            total += value
        out[g] = total


def extremes(x: np.ndarray) -> np.ndarray:
    """Return per group of x (groups, n) its largest in magnitude, its lowest and its highest weight; of equals the
    first.
    """
    found = np.empty((3, len(x)), np.float32)
    _find_extremes(x, found)
    return found


@kernel
def _find_extremes(x: np.ndarray, found: np.ndarray) -> None:
    for g in range(len(x)):
        bits = x[g].view(np.int32)
        low_key, high_key = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for j in range(bits.size):
            key = _ordered(bits[j])
            low_key, high_key = min(low_key, key), max(high_key, key)
        low, high = np.int32(_ordered(low_key)).view(np.float32), np.int32(_ordered(high_key)).view(np.float32)
        if low == -high:
            found[0, g] = _first(x[g], low, high) + F0
        else:
            found[0, g] = high if high > -low else low
        found[1, g], found[2, g] = _first(x[g], low, low) if low == F0 else low, high


@kernel
def _ordered(bits: int) -> int:
    """An integer that grows with the number whose bits these are, and the bits again of such an integer."""
    return np.int32(bits ^ (np.int32(bits >> 31) & 0x7FFFFFFF))


@kernel
def _first(x: np.ndarray, a: float, b: float) -> float:
    for value in x:
        if value == a or value == b:
            return value
    return a


@kernel
def truncate(
    x: np.ndarray, scales: np.ndarray, minima: np.ndarray, offset: float, code_max: int, codes: np.ndarray
) -> None:
    """Compute codes = int8((x - minimum) / scale + offset), at most ``code_max``; 0 where no int32 can hold that."""
    for g in range(len(x)):
        xg, minimum, group = x[g], minima[g], codes[g]
        inverse = F1 / scales[g] if scales[g] != F0 else F0
        for j in range(group.size):
            t = (xg[j] - minimum) * inverse + offset
            code = np.int8(np.int32(t if abs(t) < _INT32_END else F0))
            group[j] = code if code < code_max else code_max


@kernel
def round_away(x: np.ndarray, scales: np.ndarray, codes: np.ndarray) -> None:
    """Compute codes = int8 of x / scale rounded, halves away from zero; 0 where no int32 can hold that."""
    for g in range(len(x)):
        xg, group = x[g], codes[g]
        inverse = F1 / scales[g] if scales[g] != F0 else F0
        for j in range(group.size):
            t = xg[j] * inverse
            whole = np.trunc(t)
            whole += np.float32(np.copysign(F1, t)) if abs(t - whole) >= np.float32(0.5) else F0
            group[j] = np.int8(np.int32(whole if abs(whole) < _INT32_END else F0))
