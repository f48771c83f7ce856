"""The quantized types: how blocks become weights and weights become blocks.

One file a family, encode beside decode. All kernels take C-contiguous, writable 2-D arrays of whole rows, write into
the output that the caller allocated, and neither check nor raise. They are called from Python, not from other kernels:

    decode(blocks, out)                 blocks uint8 (rows, row_bytes) -> out f32 (rows, cols), bit-identical to ggml
    encode(weights, importance, blocks) weights f32 (rows, cols), importance f32 (cols,) or (0,) where there is none
                                        -> blocks uint8 (rows, row_bytes): ggml's own quantizer, bit-identical
    unpack(blocks, codes, steps)        -> codes int8 (rows, cols), steps f32 (rows, cols // group): the block's grid
    lows(blocks, lows)                  -> lows f32 (rows, cols // group), in the types with a minimum
    pack(codes, blocks)                 writes the codes into blocks, every other bit stays

A weight is ``step * (code - zero) - low``, low 0 in the types without a minimum, or ``step * levels[code - code_min]``.

The grid of a group of weights: two neighbouring codes c and c + 1 differ by ``step`` where ``levels`` is None, and by
``step * (levels[c + 1 - code_min] - levels[c - code_min])`` in the types with a codebook (levels ascending). A type
whose weights are not coded one by one (IQ1 to IQ3) has neither unpack nor pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lora_gguf.quants.ggml import BY_NAME, GgmlType


@dataclass(frozen=True)
class Quant:
    """A type's kernels, and the shape of its grid; see the module's docstring."""

    type: GgmlType
    decode: Callable
    encode: Callable | None = None
    unpack: Callable | None = None
    lows: Callable | None = None
    pack: Callable | None = None
    group: int = 0
    zero: int = 0
    code_min: int = 0
    code_max: int = 0
    levels: np.ndarray | None = None
    needs_importance: bool = False


def quant(name: str, decode, **kernels) -> Quant:
    """The ``Quant`` of the ggml type called ``name``."""
    return Quant(BY_NAME[name], decode, **kernels)
