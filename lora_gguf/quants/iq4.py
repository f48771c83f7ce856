"""IQ4_NL and IQ4_XS: four bits a weight into a codebook of sixteen levels (ggml).

    IQ4_NL    18 bytes,  32 weights   d f16, then qs[16], weight j low in byte j, weight j + 16 high, as in Q4_0
    IQ4_XS   136 bytes, 256 weights   d f16; scales_h, 16 bits, two for each 32 weights; scales_l[4], four for each;
                                      then qs[128], 16 bytes for each 32 weights as in IQ4_NL

A weight is ``d * LEVELS[code]``, in IQ4_XS ``d * (scale - 32) * LEVELS[code]``, where scale has six bits. ``d``, and so
the grid's step, may be negative.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.kernels.by_block import F32, I8, U8, by_block
from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.half import f16_from_f32, f32_from_f16
from lora_gguf.kernels.nearest import nearest_int
from lora_gguf.quants.codec import Grid, codec
from lora_gguf.quants.legacy_blocks import pack_q4_0, unpack_q4_0

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2
LANES = 16  # blocks of 32 weights that the search handles side by side
NEGLIGIBLE = np.float32(1e-15)


@by_block((U8, 18), (F32, 32))
def decode_iq4_nl(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        block = blocks[i]
        d = f32_from_f16(block[0] | block[1] << 8)
        for j in range(16):
            out[i, j] = d * LEVELS[block[2 + j] & 15]
            out[i, j + 16] = d * LEVELS[block[2 + j] >> 4]


@kernel
def _step_iq4_xs(block: np.ndarray, s: np.ndarray) -> float:
    """The step of 32-weight group ``s`` of a block."""
    d = f32_from_f16(block[0] | block[1] << 8)
    low = block[4 + s // 2] >> (4 * (s % 2)) & 15
    high = block[2 + s // 4] >> (2 * (s % 4)) & 3
    return d * np.float32(np.int32(low | high << 4) - 32)


@by_block((U8, 136), (F32, 8, 32))
def decode_iq4_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(blocks)):
        for s in range(8):
            step = _step_iq4_xs(blocks[i], s)
            for j in range(16):
                byte = blocks[i, 8 + 16 * s + j]
                out[i, s, j] = step * LEVELS[byte & 15]
                out[i, s, j + 16] = step * LEVELS[byte >> 4]


@by_block((U8, 136), (I8, 8, 32), (F32, 8))
def unpack_iq4_xs(blocks: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> None:
    for i in range(len(blocks)):
        for s in range(8):
            steps[i, s] = _step_iq4_xs(blocks[i], s)
            for j in range(16):
                byte = blocks[i, 8 + 16 * s + j]
                codes[i, s, j] = byte & 15
                codes[i, s, j + 16] = byte >> 4


@by_block((I8, 8, 32), (U8, 136))
def pack_iq4_xs(codes: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        for s in range(8):
            for j in range(16):
                blocks[i, 8 + 16 * s + j] = codes[i, s, j] | codes[i, s, j + 16] << 4


@kernel
def _twice_mean_square(x: np.ndarray) -> float:
    total = np.float32(0)
    for v in x:
        total += v * v
    return total * np.float32(2 / len(x))


@kernel
def _load(x: np.ndarray, importance: np.ndarray, variance: float, xs: np.ndarray, ws: np.ndarray) -> None:
    """Lay a group's weights and their importances into a lane; ``variance`` is twice their block's mean square."""
    for j in range(32):
        xs[j] = x[j]
        square = x[j] * x[j]
        ws[j] = importance[j] * np.sqrt(variance + square) if len(importance) else square


@kernel
def _project(xs: np.ndarray, ws: np.ndarray, inverse: np.ndarray, qx: np.ndarray, qq: np.ndarray) -> None:
    """Each lane's sums of w q x and of w q q, q being the level nearest to x * inverse, added in the order of j."""
    for lane in range(LANES):
        qx[lane] = qq[lane] = 0
    for j in range(32):
        for lane in range(LANES):
            x, w = xs[j, lane], ws[j, lane]
            scaled = x * inverse[lane]
            q = LEVELS[0]
            for k in range(15):
                q = q if scaled < MIDDLES[k] else LEVELS[k + 1]
            qx[lane] += w * q * x
            qq[lane] += w * q * q


@kernel
def _extremes(xs: np.ndarray, largest: np.ndarray) -> None:
    """The weight of largest magnitude in each lane."""
    for lane in range(LANES):
        largest[lane] = 0
    for j in range(32):
        for lane in range(LANES):
            x = xs[j, lane]
            largest[lane] = x if abs(x) > abs(largest[lane]) else largest[lane]


@kernel
def _search(xs: np.ndarray, ws: np.ndarray, scratch: np.ndarray, scales: np.ndarray) -> None:
    """Each lane's scale of least weighted square error: 16 guesses, each refined once; 0 for a negligible lane."""
    largest, inverse, best, qx, qq = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    _extremes(xs, largest)
    for guess in range(-8, 8):
        for lane in range(LANES):
            if guess == -8:
                inverse[lane] = np.float32(1) / (largest[lane] / -LEVELS[0])
            else:
                inverse[lane] = (np.float32(guess) + LEVELS[0]) / largest[lane]
        _project(xs, ws, inverse, qx, qq)
        for lane in range(LANES):
            scale = qx[lane] / qq[lane] if qq[lane] > 0 else np.float32(0)
            better = guess == -8 or (qq[lane] > 0 and qx[lane] * qx[lane] > best[lane] * qq[lane])
            scales[lane] = scale if better else scales[lane]
            best[lane] = scale * qx[lane] if better else best[lane]
    for lane in range(LANES):
        scales[lane] = np.float32(0) if abs(largest[lane]) < NEGLIGIBLE else scales[lane]


@kernel
def _fit(x: np.ndarray, importance: np.ndarray, scales: np.ndarray) -> None:
    """The scales (blocks, groups) of the weights (blocks, groups * 32)."""
    n_groups, n_cols = scales.shape[1], max(1, len(importance))
    xs, ws = np.empty((32, LANES), np.float32), np.empty((32, LANES), np.float32)
    scratch, found = np.empty((5, LANES), np.float32), np.empty(LANES, np.float32)
    groups, flat = x.reshape(-1, 32), scales.reshape(-1)
    variance = np.float32(0)
    for first in range(0, len(flat), LANES):
        n = min(LANES, len(flat) - first)
        for lane in range(n):
            g = first + lane
            column = 32 * g % n_cols
            if g % n_groups == 0:
                variance = _twice_mean_square(x[g // n_groups])
            _load(groups[g], importance[column : column + 32], variance, xs[:, lane], ws[:, lane])
        _search(xs, ws, scratch, found)
        for lane in range(n):
            flat[first + lane] = found[lane]


def _fitted(weights: np.ndarray, importance: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    x = weights.reshape(-1, block_size)
    scales = np.empty((len(x), block_size // 32), np.float32)
    _fit(x, importance, scales)
    return x, scales


@kernel
def _code(scaled: float) -> int:
    """The code of the level nearest to ``scaled``; a tie, and NaN, goes up."""
    code = np.int8(15)
    for middle in MIDDLES:
        code -= np.int8(scaled < middle)
    return code


@kernel
def _write_f16(x: float, target: np.ndarray) -> None:
    h = f16_from_f32(x)
    target[0] = h & 0xFF
    target[1] = h >> 8


@kernel
def _write_codes(x: np.ndarray, scale: float, qs: np.ndarray) -> None:
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    for j in range(16):
        qs[j] = _code(inverse * x[j]) | _code(inverse * x[j + 16]) << 4


@kernel
def _write_iq4_nl(x: np.ndarray, scales: np.ndarray, blocks: np.ndarray) -> None:
    for i in range(len(blocks)):
        _write_f16(scales[i, 0], blocks[i])
        _write_codes(x[i], scales[i, 0], blocks[i, 2:])


@kernel
def _write_iq4_xs(x: np.ndarray, scales: np.ndarray, blocks: np.ndarray) -> None:
    """Quantize the eight scales of each block to six bits and the weights to those."""
    for i in range(len(blocks)):
        block, extreme = blocks[i], np.float32(0)
        for scale in scales[i]:
            extreme = scale if abs(scale) > abs(extreme) else extreme
        d = -extreme / np.float32(32)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        for at in range(2, 8):
            block[at] = 0
        _write_f16(d, block)
        for s in range(8):
            scale = max(-32, min(31, nearest_int(inverse * scales[i, s])))
            block[4 + s // 2] |= (scale + 32 & 15) << (4 * (s % 2))
            block[2 + s // 4] |= (scale + 32 >> 4) << (2 * (s % 4))
            _write_codes(x[i, 32 * s :], d * np.float32(scale), block[8 + 16 * s :])


def encode_iq4_nl(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    _write_iq4_nl(*_fitted(weights, importance, 32), blocks.reshape(-1, 18))


def encode_iq4_xs(weights: np.ndarray, importance: np.ndarray, blocks: np.ndarray) -> None:
    _write_iq4_xs(*_fitted(weights, importance, 256), blocks.reshape(-1, 136))


IQ4 = [
    codec(
        "IQ4_NL", decode_iq4_nl, encode_iq4_nl, scales_at=(0,),
        grid=Grid(unpack_q4_0, pack_q4_0, group=32, code_max=15, levels=LEVELS),
    ),
    codec(
        "IQ4_XS", decode_iq4_xs, encode_iq4_xs, scales_at=(0,),
        grid=Grid(unpack_iq4_xs, pack_iq4_xs, group=32, code_max=15, levels=LEVELS),
    ),
]  # fmt: skip
