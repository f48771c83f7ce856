"""Q2_K to Q6_K as ggml quantizes them; their bytes are in ``kquants_blocks.py``.

A search gives each group's scale, and its minimum where the type has one; a second search, or simply the largest, gives
the super-block's f16 scale and the groups' codes under it; then the weights are rounded to the grid that results.
Without an importance matrix those are ggml's reference quantizers, with one those that weigh each error by it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_gguf.quants import direct, fit, kquants_blocks
from lora_gguf.quants.codec import Codec, Grid, codec


def _importance_weights(weights: np.ndarray, importance: np.ndarray, factor: float) -> np.ndarray:
    """importance * sqrt(factor * the super-block's mean square + the weight's own square), shaped as the weights."""
    squares = weights * weights
    mean_squares = np.float32(factor) * direct.sums(squares.reshape(-1, 256)) / np.float32(256)
    spread = np.sqrt(mean_squares[:, None] + squares.reshape(-1, 256))
    return importance * spread.reshape(weights.shape)


def _root_mean_square_plus(x: np.ndarray) -> np.ndarray:
    return np.sqrt(direct.sums(x * x) / np.float32(x.shape[1]))[:, None] + np.abs(x)


def _round_scales(values: np.ndarray, code_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (super-blocks, groups) uint8 and f32 scales (super-blocks,): the largest value gets ``code_max``."""
    codes, scales = np.empty(values.shape, np.uint8), np.empty(len(values), np.float32)
    direct.round_scales(values, np.float32(code_max), codes, scales)
    return codes, scales


def _fit_scales(values: np.ndarray, importance_sums: np.ndarray, code_max: int) -> tuple[np.ndarray, np.ndarray]:
    """As ``_round_scales``, by ggml's search."""
    codes, scales = np.empty(values.shape, np.uint8), np.empty(len(values), np.float32)
    fit.fit_positive(values, importance_sums, fit.around(code_max, 4), scales, codes)
    return codes, scales


def _fit_minimum_type(
    x: np.ndarray, w: np.ndarray, tries: np.ndarray, absolute: bool, scale_max: int, is_reference: bool
) -> tuple[np.ndarray, ...]:
    """Codes (groups, n), then codes and scale of the super-blocks' scales, then of their minima."""
    n_groups = 256 // x.shape[1]
    scales, minima, codes = np.empty(len(x), np.float32), np.empty(len(x), np.float32), np.empty(x.shape, np.int8)
    fit.fit_affine(x, w, tries, absolute, scales, minima, codes)
    scales, minima = scales.reshape(-1, n_groups), minima.reshape(-1, n_groups)
    if is_reference:
        return codes, *_round_scales(scales, scale_max), *_round_scales(minima, scale_max)
    importance_sums = direct.sums(w).reshape(-1, n_groups)
    return codes, *_fit_scales(scales, importance_sums, scale_max), *_fit_scales(minima, importance_sums, scale_max)


def _recode(x: np.ndarray, steps: np.ndarray, lows: np.ndarray, lowest: int, highest: int, codes: np.ndarray) -> None:
    per_32 = 32 // x.shape[1]
    grid = steps.reshape(-1, per_32), lows.reshape(-1, per_32)
    fit.recode(x.reshape(-1, 32), *grid, np.int32(lowest), np.int32(highest), codes.reshape(-1, 32))


@np.errstate(all="ignore")
def encode_q2_k(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    x, blocks = weights.reshape(-1, 16), blocks.reshape(-1, 84)
    if importance.size:
        w, tries = _importance_weights(weights, importance, 1).reshape(x.shape), fit.upward(3, -0.9, 0.05, 37)
    else:
        w, tries = np.abs(x), fit.upward(3, -0.5, 0.1, 16)
    is_reference = importance.size == 0
    codes, scale_codes, d, minimum_codes, dmin = _fit_minimum_type(x, w, tries, is_reference, 15, is_reference)
    scales = scale_codes | minimum_codes << 4
    blocks[:, :16] = scales
    steps, lows = direct.store_f16(d, blocks, 80) * (scales & 15), direct.store_f16(dmin, blocks, 82) * (scales >> 4)
    _recode(x, steps, lows, 0, 3, codes)
    kquants_blocks.pack_q2_k(codes, blocks)


def _encode_k4(
    block_bytes: int, code_max: int, reference_tries: np.ndarray, pack: Callable[..., None]
) -> Callable[..., None]:
    """Q4_K and Q5_K: the same scales, one bit more in a code."""
    importance_tries = fit.upward(code_max, -0.9, 0.05, 37)

    @np.errstate(all="ignore")
    def encode(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
        x, blocks = weights.reshape(-1, 32), blocks.reshape(-1, block_bytes)
        if importance.size:
            w, tries = _importance_weights(weights, importance, 2).reshape(x.shape), importance_tries
        else:
            w, tries = _root_mean_square_plus(x), reference_tries
        codes, scale_codes, d, minimum_codes, dmin = _fit_minimum_type(x, w, tries, False, 63, importance.size == 0)
        if code_max == 31 or not importance.size:
            scale_codes, minimum_codes = np.minimum(scale_codes, 63), np.minimum(minimum_codes, 63)
        direct.store_f16(d, blocks, 0)
        direct.store_f16(dmin, blocks, 2)
        _store_six_bit_pairs(scale_codes, minimum_codes, blocks[:, 4:16])
        steps, lows = np.empty((len(blocks), 8), np.float32), np.empty((len(blocks), 8), np.float32)
        kquants_blocks.steps_and_lows(blocks, steps, lows)
        _recode(x, steps, lows, 0, code_max, codes)
        pack(codes, blocks)

    return encode


def _store_six_bit_pairs(scales: np.ndarray, minima: np.ndarray, out: np.ndarray) -> None:
    out[:, :4] = scales[:, :4] | scales[:, 4:] >> 4 << 6
    out[:, 4:8] = minima[:, :4] | minima[:, 4:] >> 4 << 6
    out[:, 8:] = scales[:, 4:] & 15 | minima[:, 4:] << 4


@np.errstate(all="ignore")
def encode_q3_k(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    x, blocks = weights.reshape(-1, 16), blocks.reshape(-1, 110)
    scales, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int8)
    d, scale_codes = np.empty(len(blocks), np.float32), np.empty((len(blocks), 16), np.int8)
    if importance.size:
        w = _importance_weights(weights, importance, 2).reshape(x.shape)
        fit.fit_symmetric(x, w, -fit.around(4, 9), scales, codes)
        fit.fit_symmetric(scales.reshape(-1, 16), direct.sums(w).reshape(-1, 16), -fit.around(32, 9), d, scale_codes)
    else:
        fit.fit_by_descent(x, scales, codes)
        direct.round_signed_scales(scales.reshape(-1, 16), -32, 31, 32, np.float32(0), scale_codes, d)
    _store_six_bits(scale_codes.view(np.uint8), blocks[:, 96:108])
    steps = direct.store_f16(d, blocks, 108) * (scale_codes - np.float32(32))
    _recode(x, steps, np.zeros_like(steps), -4, 3, codes)
    kquants_blocks.pack_q3_k(codes, blocks)


def _store_six_bits(scales: np.ndarray, out: np.ndarray) -> None:
    out[:, :8] = scales[:, :8] & 15 | scales[:, 8:] << 4
    high = scales >> 4
    out[:, 8:] = high[:, :4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:] << 6


@np.errstate(all="ignore")
def encode_q6_k(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    x, blocks = weights.reshape(-1, 16), blocks.reshape(-1, 210)
    scales, codes = np.empty(len(x), np.float32), np.empty(x.shape, np.int8)
    w = np.broadcast_to(importance, weights.shape).reshape(x.shape) if importance.size else x * x
    fit.fit_symmetric(x, w, -fit.around(32, 9), scales, codes)
    d, scale_codes = np.empty(len(blocks), np.float32), np.empty((len(blocks), 16), np.int8)
    direct.round_signed_scales(scales.reshape(-1, 16), -128, 127, 0, np.float32(1e-15), scale_codes, d)
    blocks[:, 192:208] = scale_codes.view(np.uint8)
    steps = direct.store_f16(d, blocks, 208) * scale_codes
    codes.reshape(-1, 256)[d == 0] = 0
    _recode(x, steps, np.zeros_like(steps), -32, 31, codes)
    kquants_blocks.pack_q6_k(codes, blocks)


def _k_quant(
    name: str, encode: Callable, scales_at: tuple[int, ...], group: int, code_max: int, zero: int = 0
) -> Codec:
    kernels = {step: getattr(kquants_blocks, f"{step}_{name.lower()}", None) for step in ("unpack", "pack", "lows")}
    grid = Grid(**kernels, group=group, code_max=code_max, zero=zero)
    return codec(name, getattr(kquants_blocks, f"decode_{name.lower()}"), encode, scales_at=scales_at, grid=grid)


_encode_q4_k = _encode_k4(144, 15, fit.upward(15, -1, 0.1, 21), kquants_blocks.pack_q4_k)
_encode_q5_k = _encode_k4(176, 31, fit.upward(31, -0.5, 0.1, 16), kquants_blocks.pack_q5_k)

K_QUANTS = [
    _k_quant("Q2_K", encode_q2_k, (80, 82), group=16, code_max=3),
    _k_quant("Q3_K", encode_q3_k, (108,), group=16, code_max=7, zero=4),
    _k_quant("Q4_K", _encode_q4_k, (0, 2), group=32, code_max=15),
    _k_quant("Q5_K", _encode_q5_k, (0, 2), group=32, code_max=31),
    _k_quant("Q6_K", encode_q6_k, (208,), group=16, code_max=63, zero=32),
]
