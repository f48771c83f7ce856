"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 as ggml quantizes them; their bytes are in ``legacy_blocks.py``.

Without an importance matrix a block's extremes give its scale; with one a search does, which weighs an error by the
importance times the root of the row's mean square plus the weight's own square. Q8_0 has no use for one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lora_gguf.quants import direct, fit, legacy_blocks
from lora_gguf.quants.codec import Codec, Grid, codec


def _importance_weights(weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
    squares = weights * weights
    mean_squares = direct.sums(squares) / np.float32(weights.shape[1])
    return (importance * np.sqrt(mean_squares[:, None] + squares)).reshape(-1, 32)


def _encode_symmetric(block_bytes: int, n: int, pack: Callable[..., None]) -> Callable[..., None]:
    """weight = d * (code - n), codes 0 to 2 n - 1."""

    @np.errstate(all="ignore")
    def encode(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
        x = weights.reshape(-1, 32)
        d, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int8)
        if importance.size:
            fit.fit_symmetric(x, _importance_weights(weights, importance), -fit.around(n, 9), d, codes)
        else:
            d[...] = direct.extremes(x)[0] / np.float32(-n)
            direct.truncate(x, d, np.zeros_like(d), np.float32(n + 0.5), np.int32(2 * n - 1), codes)
        direct.store_f16(d, blocks.reshape(-1, block_bytes), 0)
        pack(codes, blocks)

    return encode


def _encode_affine(block_bytes: int, code_max: int, pack: Callable[..., None]) -> Callable[..., None]:
    """weight = d * code + m, codes 0 to ``code_max``."""

    @np.errstate(all="ignore")
    def encode(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
        x = weights.reshape(-1, 32)
        d, minima, codes = np.empty(len(x), np.float32), np.empty(len(x), np.float32), np.empty(x.shape, np.int8)
        if importance.size:
            tries = fit.upward(code_max, -0.9, 0.05, 37)
            fit.fit_affine(x, _importance_weights(weights, importance), tries, False, d, minima, codes)
            m = -minima
        else:
            _, m, highest = direct.extremes(x)
            d[...] = (highest - m) / np.float32(code_max)
            direct.truncate(x, d, m, np.float32(0.5), np.int32(code_max), codes)
        direct.store_f16(d, blocks.reshape(-1, block_bytes), 0)
        direct.store_f16(m, blocks.reshape(-1, block_bytes), 2)
        pack(codes, blocks)

    return encode


@np.errstate(all="ignore")
def encode_q8_0(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    x = weights.reshape(-1, 32)
    d = np.abs(direct.extremes(x)[0]) / np.float32(127)
    codes = np.empty(x.shape, np.int8)
    direct.round_away(x, d, codes)
    direct.store_f16(d, blocks.reshape(-1, 34), 0)
    legacy_blocks.pack_q8_0(codes, blocks)


def _legacy(name: str, encode: Callable, code_max: int, zero: int = 0, **more: Any) -> Codec:
    kernels = {step: getattr(legacy_blocks, f"{step}_{name.lower()}", None) for step in ("unpack", "pack", "lows")}
    scales_at = (0, 2) if kernels["lows"] else (0,)
    grid = Grid(**kernels, group=32, code_max=code_max, zero=zero, **more)
    return codec(name, getattr(legacy_blocks, f"decode_{name.lower()}"), encode, scales_at=scales_at, grid=grid)


LEGACY = [
    _legacy("Q4_0", _encode_symmetric(18, 8, legacy_blocks.pack_q4_0), code_max=15, zero=8),
    _legacy("Q4_1", _encode_affine(20, 15, legacy_blocks.pack_q4_1), code_max=15),
    _legacy("Q5_0", _encode_symmetric(22, 16, legacy_blocks.pack_q5_0), code_max=31, zero=16),
    _legacy("Q5_1", _encode_affine(24, 31, legacy_blocks.pack_q5_1), code_max=31),
    _legacy("Q8_0", encode_q8_0, code_min=-128, code_max=127),
]
