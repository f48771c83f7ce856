"""How far a merged tensor is from its base plus the update, and how far rounding alone may take it.

Each weight that was wanted, base + update, lies between two neighbours on the merged block's own grid, ``low`` and
``high``, a gap apart. Dithering takes ``high`` with probability (wanted - low) / gap: the expectation is what was
wanted, the variance (wanted - low) * (high - wanted). Rounding to nearest, as a fresh quantization does, takes the
closer one, and ``--rounding auto`` does this in the blocks where dithering would add more noise. So for each of the
three the share of the update that must have been kept is known, for dithering with a variance; Bernstein's inequality
turns that into a bound which chance exceeds once in 10**9, however few weights moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lora_gguf.checks.neighbours import free_range, neighbours, same_grid
from lora_gguf.kernels.decorators import kernel
from lora_gguf.merging.scratch import scratch
from lora_gguf.quants.codec import Codec

# the sums of a comparison, in the order that ``compare`` writes them; the last one is a maximum
(
    PROJECTION, UPDATE2, ACHIEVED2, DITHERED, NEAREST, AUTO, VARIANCE, EXPECTED_NOISE2, EXPECTED_FAR, FAR,
    EXPECTED_COARSE, COARSE, DOUBTFUL, BEYOND, BEYOND_FINE, BEFORE2, BEFORE_ACHIEVED, PEAK,
) = range(18)  # fmt: skip
N_SUMS, ROWS = PEAK + 1, 9
# in steps: near the middle of two neighbours; at the farther one; beyond both
NEAR, FARTHER, EDGE = np.float32(0.48), np.float32(0.52), np.float32(1.05)
TWELFTH, TINY = np.float32(1 / 12), np.float32(1e-38)
LOG_ODDS = math.log(2e9)  # of a bound that chance exceeds once in 10**9
ALLOWED = 0.01  # share of the update that f32 sums in another order, or a rounding to nearest here and there, may cost

UNITS = {"F16": 2.0**-11, "BF16": 2.0**-8}
LOOSE_TYPES, LOOSE_SHARE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1"), 2e-3  # measured: at most 1.3e-3, on heavy-tailed weights
FEW = 0.3  # of the weights that dithering rounds to the farther value: rounding to nearest none, half an update half


@kernel
def _excess(before, delta, low, high, excess):
    """By how much, in steps squared, dithering's variance is above a new grid's, a twelfth; all (cols,)."""
    for j in range(len(excess)):
        gap = high[j] - low[j]
        up = min(max(before[j] + delta[j] - low[j], np.float32(0)), gap)
        excess[j] = up * (gap - up) - gap * gap * TWELFTH


@kernel
def _mark(excess, block, rough):
    """Set ``rough`` (cols,) to 1 in the blocks whose ``excess`` is positive, else to 0."""
    for start in range(0, len(excess), block):
        a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(start, start + block, 4):
            a, b, c, d = a + excess[j], b + excess[j + 1], c + excess[j + 2], d + excess[j + 3]
        rough[start : start + block] = np.float32(a + b + c + d > 0)


@kernel
def _add_moves(w):
    """Add what 64 weights achieved; ``w`` f32 (ROWS + N_SUMS, 64) holds before, after, delta, low, gap and rough, room
    for three more, then one row a sum. All is in one array and each loop short: so the compiler vectorises."""
    for k in range(64):
        w[ROWS + PROJECTION, k] += w[2, k] * (w[1, k] - w[0, k])
        w[ROWS + UPDATE2, k] += w[2, k] * w[2, k]
        w[ROWS + ACHIEVED2, k] += (w[1, k] - w[0, k]) * (w[1, k] - w[0, k])
    for k in range(64):
        w[ROWS + BEFORE2, k] += w[0, k] * w[0, k]
        w[ROWS + BEFORE_ACHIEVED, k] += w[0, k] * (w[1, k] - w[0, k])


@kernel
def _add_chances(w):
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
        w[ROWS + AUTO, k] += w[2, k] * (w[3, k] + w[6, k] - w[0, k] + w[5, k] * (w[7, k] - w[6, k]))
    for k in range(64):
        closer = min(w[6, k], w[4, k] - w[6, k])
        chance = (closer if closer < NEAR * w[4, k] else np.float32(0)) / max(w[4, k], TINY)
        w[ROWS + EXPECTED_FAR, k] += chance
        w[ROWS + EXPECTED_COARSE, k] += chance * w[5, k]


@kernel
def _add_errors(w):
    """Add where the weights are instead: at the farther neighbour, beyond both, or near the middle. Needs row 6."""
    for k in range(64):
        error = abs(w[1, k] - w[3, k] - w[6, k])
        w[7, k] = (error if w[4, k] > 0 else np.float32(0)) / max(w[4, k], TINY)
        w[8, k] = abs(w[2, k]) * w[4, k]
    for k in range(64):
        far = np.float32(w[7, k] > FARTHER)
        w[ROWS + FAR, k] += far
        w[ROWS + COARSE, k] += far * w[5, k]
    for k in range(64):
        beyond = np.float32(w[7, k] > EDGE)
        w[ROWS + BEYOND, k] += beyond
        w[ROWS + BEYOND_FINE, k] += beyond * (np.float32(1) - w[5, k])
    for k in range(64):
        w[ROWS + DOUBTFUL, k] += w[8, k] * w[8, k] * np.float32(w[7, k] > NEAR)
        w[ROWS + PEAK, k] = max(w[ROWS + PEAK, k], w[8, k])


@kernel
def compare(before, after, delta, low, high, coarse, block, sums):
    """Add what became of the update ``delta`` (all f32, (rows, cols)) to ``sums`` f64 (N_SUMS,).

    Blocks of ``block`` weights may be ones that ``--rounding auto`` rounds to nearest; where ``block`` is 0, those are
    the rows that ``coarse`` uint8 (rows,) marks.
    """
    n_rows, n_cols = before.shape
    work = np.empty((ROWS + N_SUMS, 64), np.float32)
    excess, rough = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    for i in range(n_rows):
        rough[:] = np.float32(coarse[i])
        if block:
            _excess(before[i], delta[i], low[i], high[i], excess)
            _mark(excess, block, rough)
        work[:] = np.float32(0)
        for start in range(0, n_cols, 64):
            n = min(64, n_cols - start)
            if n < 64:
                work[:6] = np.float32(0)
            for k in range(n):
                work[0, k], work[1, k], work[2, k] = before[i, start + k], after[i, start + k], delta[i, start + k]
            for k in range(n):
                work[3, k], work[4, k] = low[i, start + k], high[i, start + k] - low[i, start + k]
                work[5, k] = rough[start + k]
            _add_moves(work)
            _add_chances(work)
            _add_errors(work)
        for s in range(PEAK):
            for k in range(64):
                sums[s] += work[ROWS + s, k]
        sums[PEAK] = max(sums[PEAK], work[ROWS + PEAK].max())


def coarse_rows(type_name: str, before: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """The rows, uint8 (rows,), of F16 and BF16 that move by whole units: ``--rounding auto`` rounds them to nearest."""
    unit = np.float32(UNITS[type_name])
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.square(delta).mean(1) > np.square(before * unit).mean(1)).astype(np.uint8)


def bound(variance: float, peak: float) -> float:
    """What a sum of independent errors with this variance, none above ``peak``, exceeds once in 10**9 (Bernstein)."""
    tail = LOG_ODDS / 3 * peak
    return tail + math.sqrt(tail * tail + 2 * LOG_ODDS * variance)


@dataclass
class Comparison:
    """The sums of some rows. ``gridded`` says that their type has a grid; ``loose`` that blocks got another grid, of a
    type whose quantizer, given an importance matrix, does not round to the nearest of it."""

    n_weights: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(N_SUMS))
    gridded: bool = True
    loose: bool = False

    def __add__(self, other: Comparison) -> Comparison:
        sums = self.sums + other.sums
        sums[PEAK] = max(self.sums[PEAK], other.sums[PEAK])
        return Comparison(
            self.n_weights + other.n_weights, sums, self.gridded and other.gridded, self.loose or other.loose
        )

    def _share(self, which: int) -> float:
        return float(self.sums[which] / self.sums[UPDATE2]) if self.sums[UPDATE2] > 0 else 1.0

    @property
    def kept(self) -> float:
        """The projection of the achieved change on the update: 1 is all of it."""
        return self._share(PROJECTION)

    @property
    def dithered(self) -> float:
        """What dithering keeps on average: less than 1 only where the grid's range ends."""
        return self._share(DITHERED)

    @property
    def nearest(self) -> float:
        """What rounding to nearest keeps, exactly."""
        return self._share(NEAREST)

    @property
    def standard_error(self) -> float:
        """Of ``kept``, if the rounding was dithered."""
        return math.sqrt(self.sums[VARIANCE]) / self.sums[UPDATE2] if self.sums[UPDATE2] > 0 else 0.0

    @property
    def slack(self) -> float:
        """How far ``kept`` may be from ``dithered`` by chance."""
        return (
            bound(self.sums[VARIANCE], self.sums[PEAK]) / self.sums[UPDATE2] + ALLOWED
            if self.sums[UPDATE2] > 0
            else 0.0
        )

    @property
    def delta_norm(self) -> float:
        """The Frobenius norm of the update."""
        return math.sqrt(self.sums[UPDATE2])

    @property
    def delta_rms(self) -> float:
        return self.delta_norm / math.sqrt(self.n_weights) if self.n_weights else 0.0

    @property
    def noise(self) -> float:
        """The rms of what rounding added, relative to that of the update."""
        return math.sqrt(max(self._share(ACHIEVED2) - 2 * self.kept + 1, 0.0))

    @property
    def expected_noise(self) -> float:
        return math.sqrt(self._share(EXPECTED_NOISE2))

    @property
    def correlation(self) -> float:
        """Of the achieved change with the update."""
        product = self.sums[UPDATE2] * self.sums[ACHIEVED2]
        return float(self.sums[PROJECTION] / math.sqrt(product)) if product > 0 else 0.0

    @property
    def likeness(self) -> float:
        """The correlation of the merged weights with the base's."""
        before_after = self.sums[BEFORE2] + self.sums[BEFORE_ACHIEVED]
        after2 = before_after + self.sums[BEFORE_ACHIEVED] + self.sums[ACHIEVED2]
        return float(before_after / math.sqrt(self.sums[BEFORE2] * after2)) if self.sums[BEFORE2] * after2 > 0 else 1.0

    @property
    def beyond(self) -> float:
        """The share of the weights that are more than one step from where they should be: rounding puts none there."""
        return float(self.sums[BEYOND] / self.n_weights) if self.n_weights else 0.0

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.sums).all())

    @property
    def unmoved(self) -> bool:
        """Whether no weight moved where chance would have moved one, but once in 10**9."""
        return self.sums[ACHIEVED2] == 0 and self.sums[EXPECTED_FAR] > LOG_ODDS

    @property
    def is_dithered(self) -> bool:
        """Whether ``kept`` is what dithering gives."""
        if self.sums[UPDATE2] == 0:
            return self.sums[ACHIEVED2] == 0
        return abs(self.kept - self.dithered) <= self.slack and not self.unmoved

    @property
    def is_auto(self) -> bool:
        """Whether ``kept`` is what ``--rounding auto`` gives, which rounds some blocks to nearest."""
        few = self.sums[COARSE] <= FEW * self.sums[EXPECTED_COARSE]
        return few and abs(self.kept - self._share(AUTO)) <= self.slack and not self.unmoved

    @property
    def is_nearest(self) -> bool:
        """Whether the weights are those that rounding base + update to nearest gives, on the merged blocks' grids."""
        if not self.gridded or self.sums[UPDATE2] == 0 or self.sums[FAR] > FEW * self.sums[EXPECTED_FAR]:
            return False
        slack = bound(self.sums[DOUBTFUL], self.sums[PEAK]) / self.sums[UPDATE2] if self.sums[DOUBTFUL] else 0.0
        return abs(self.kept - self.nearest) <= slack + ALLOWED

    @property
    def is_damaged(self) -> bool:
        """Whether weights are where no rounding of base + update puts them, though most are right."""
        if not self.gridded:
            return False
        fine = self.sums[BEYOND_FINE] > 0 and not (self.loose and self.is_nearest)
        return bool(fine or self.beyond > (LOOSE_SHARE if self.loose else 0.0))


def compare_rows(source: Codec, target: Codec, stored_before, stored_after, delta: np.ndarray) -> Comparison:
    """Compare rows as stored, uint8 (rows, row_bytes), of types ``source`` in the base and ``target`` in the merge."""
    before, after = scratch("before", delta.shape), scratch("after", delta.shape)
    source.decode(stored_before, before)
    target.decode(stored_after, after)
    found = neighbours(target, stored_after, before, after, delta)
    low, high = found or free_range(before + delta, after)
    loose = target.type.name in LOOSE_TYPES and not (
        source is target and same_grid(target, stored_before, stored_after, delta.shape)
    )
    result = Comparison(delta.size, gridded=found is not None, loose=loose)
    block = target.type.block_size if target.grid else 0
    coarse = (
        coarse_rows(target.type.name, before, delta) if target.type.name in UNITS else np.zeros(len(delta), np.uint8)
    )
    compare(before, after, delta, low, high, coarse, block, result.sums)
    return result
