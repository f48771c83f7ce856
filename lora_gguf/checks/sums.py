"""What is counted of each row of a merged tensor: kernels that only loop."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_gguf.kernels.decorators import kernel

# the sums of a comparison, in the order that ``count`` writes them; the others are added row by row, the last three
# are maxima
(
    PROJECTION, UPDATE2, ACHIEVED2, DITHERED, NEAREST, VARIANCE, EXPECTED_NOISE2, EXPECTED_FAR, FAR,
    DOUBTFUL, BEYOND, BEFORE2, BEFORE_ACHIEVED, FRESH, HALVED, HALF_VARIANCE, NOISE2, ALLOWED_NOISE2, ASTRAY,
    MOVED2, PEAK, PEAK_HALF, PEAK_NOISE2,
) = range(23)  # fmt: skip
N_SUMS, N_KERNEL, ROWS = PEAK_NOISE2 + 1, BEFORE_ACHIEVED + 1, 9
MAXIMA = slice(PEAK, PEAK_NOISE2 + 1)
# in steps: near the middle of two neighbours; at the farther one; beyond both
NEAR, FARTHER, EDGE = np.float32(0.48), np.float32(0.52), np.float32(1.05)
TINY = np.float32(1e-38)


@kernel
def _add_moves(w: Any) -> None:
    """Add what 64 weights achieved; ``w`` f32 (ROWS + N_KERNEL + 1, 64) holds before, after, delta, low and gap, room
    for four more, then one row a sum, and the peak. One array and short loops: so the compiler vectorises.
    """
    for k in range(64):
        w[ROWS + PROJECTION, k] += w[2, k] * (w[1, k] - w[0, k])
        w[ROWS + UPDATE2, k] += w[2, k] * w[2, k]
        w[ROWS + ACHIEVED2, k] += (w[1, k] - w[0, k]) * (w[1, k] - w[0, k])
    for k in range(64):
        w[ROWS + BEFORE2, k] += w[0, k] * w[0, k]
        w[ROWS + BEFORE_ACHIEVED, k] += w[0, k] * (w[1, k] - w[0, k])


@kernel
def _add_chances(w: Any) -> None:
    """Add what each way of rounding should achieve; leaves the place between the neighbours in row 6."""
    for k in range(64):
        w[6, k] = min(max(w[0, k] + w[2, k] - w[3, k], np.float32(0)), w[4, k])
        variance = w[6, k] * (w[4, k] - w[6, k])
        w[ROWS + VARIANCE, k] += w[2, k] * w[2, k] * variance
        w[ROWS + EXPECTED_NOISE2, k] += variance
    for k in range(64):
        w[7, k] = w[4, k] if w[6, k] + w[6, k] >= w[4, k] else np.float32(0)
        w[ROWS + DITHERED, k] += w[2, k] * (w[3, k] + w[6, k] - w[0, k])
        w[ROWS + NEAREST, k] += w[2, k] * (w[3, k] + w[7, k] - w[0, k])
    for k in range(64):
        closer = min(w[6, k], w[4, k] - w[6, k])
        w[ROWS + EXPECTED_FAR, k] += (closer if closer < NEAR * w[4, k] else np.float32(0)) / max(w[4, k], TINY)


@kernel
def _add_errors(w: Any) -> None:
    """Add where the weights are instead: at the farther neighbour, beyond both, or near the middle. Needs row 6."""
    for k in range(64):
        error = abs(w[1, k] - w[3, k] - w[6, k])
        w[7, k] = (error if w[4, k] > 0 else np.float32(0)) / max(w[4, k], TINY)
        w[8, k] = abs(w[2, k]) * w[4, k]
    for k in range(64):
        w[ROWS + FAR, k] += np.float32(w[7, k] > FARTHER)
        w[ROWS + BEYOND, k] += np.float32(w[7, k] > EDGE)
    for k in range(64):
        w[ROWS + DOUBTFUL, k] += w[8, k] * w[8, k] * np.float32(w[7, k] > NEAR)
        w[ROWS + N_KERNEL, k] = max(w[ROWS + N_KERNEL, k], w[8, k])


@kernel
def count(
    before: np.ndarray, after: np.ndarray, delta: np.ndarray, low: np.ndarray, high: np.ndarray, sums: np.ndarray
) -> None:
    """Write what became of each row's update ``delta`` (all f32, (rows, cols)) to ``sums`` f64 (rows, N_SUMS): the
    first ``N_KERNEL`` and the peak.
    """
    n_rows, n_cols = before.shape
    work = np.empty((ROWS + N_KERNEL + 1, 64), np.float32)
    for i in range(n_rows):
        work[:] = np.float32(0)
        for start in range(0, n_cols, 64):
            n = min(64, n_cols - start)
            if n < 64:
                work[:5] = np.float32(0)
            for k in range(n):
                work[0, k], work[1, k], work[2, k] = before[i, start + k], after[i, start + k], delta[i, start + k]
            for k in range(n):
                work[3, k], work[4, k] = low[i, start + k], high[i, start + k] - low[i, start + k]
            _add_moves(work)
            _add_chances(work)
            _add_errors(work)
        for s in range(N_KERNEL):
            for k in range(64):
                sums[i, s] += work[ROWS + s, k]
        sums[i, PEAK] = work[ROWS + N_KERNEL].max()
