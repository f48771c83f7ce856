"""What files of tensors share: dtypes and how they widen to f32, checks of names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lora_gguf.errors import MalformedError, printable
from lora_gguf.quants.minifloats import e4m3_magnitudes

MAX_DIMS = 32


def bf16_to_f32(raw: np.ndarray) -> np.ndarray:
    """Widen bfloat16, as uint16 of any shape, to f32 exactly."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def f8_e5m2_to_f32(raw: np.ndarray) -> np.ndarray:
    """Widen float8 with 5 exponent bits, as uint8 of any shape, to f32 exactly: the upper byte of an f16."""
    return (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def f8_e4m3_to_f32(raw: np.ndarray) -> np.ndarray:
    """Widen float8 with 4 exponent bits ("fn": no infinities), as uint8 of any shape, to f32 exactly."""
    codes = np.arange(256)
    table = np.where(codes & 127 == 127, np.nan, e4m3_magnitudes())
    return np.copysign(table, np.where(codes < 128, 1.0, -1.0)).astype(np.float32)[raw]


@dataclass(frozen=True)
class Dtype:
    """How a tensor is stored, and what widens it to something that numpy knows."""

    stored: np.dtype
    widen: Callable[[np.ndarray], np.ndarray] | None = None


# the names are those of safetensors; storages of a .bin use them too
DTYPES = {
    name: Dtype(np.dtype(code), widen)
    for name, code, widen in (
        ("F64", "<f8", None),
        ("F32", "<f4", None),
        ("F16", "<f2", None),
        ("BF16", "<u2", bf16_to_f32),
        ("F8_E4M3", "u1", f8_e4m3_to_f32),
        ("F8_E5M2", "u1", f8_e5m2_to_f32),
        ("I64", "<i8", None),
        ("I32", "<i4", None),
        ("I16", "<i2", None),
        ("I8", "i1", None),
        ("U64", "<u8", None),
        ("U32", "<u4", None),
        ("U16", "<u2", None),
        ("U8", "u1", None),
        ("BOOL", "?", None),
    )
}
UNSUPPORTED_DTYPES = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


def check_name(name: object, label: str) -> None:
    """Raise ``MalformedError`` unless ``name`` is a string that can be printed on one line."""
    if not isinstance(name, str):
        raise damaged(label, f"a tensor name of type {type(name).__name__}")
    shown = printable(name[:201])
    if not name or shown != name:
        raise damaged(label, f"tensor name '{shown}' is empty, too long or not printable")


def damaged(label: str, what: str) -> MalformedError:
    """Return the error for a file that breaks its format's rules."""
    return MalformedError(f"{label}: {what}: the file is damaged, download it again")
