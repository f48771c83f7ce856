"""How far a merged tensor is from its base plus the update, and how far rounding alone may take it.

Each weight that was wanted, base + update, lies between two neighbours on the merged block's own grid, ``low`` and ``high``,
a gap apart. Dithering takes ``high`` with probability (wanted - low) / gap: the expectation is what was wanted, the
variance (wanted - low) * (high - wanted). Rounding to nearest, as a fresh quantization does, takes the closer one. So for
both the share of the update that must have been kept is known, for dithering with a variance; Bernstein's inequality
turns that into a bound which chance exceeds once in 10**9, however few weights moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lora_gguf.kernel import kernel
from lora_gguf.quants import Quant

# the sums of a comparison, in the order that ``compare`` writes them; the last one is a maximum
(
    PROJECTION, UPDATE2, ACHIEVED2, CHANGED, DITHERED, NEAREST, MIXED, VARIANCE, NOISE2, EXPECTED_NOISE2,
    EXPECTED_FAR, FAR, DOUBTFUL, BEYOND, BEFORE2, AFTER2, BEFORE_AFTER, PEAK,
) = range(18)  # fmt: skip
N_SUMS = PEAK + 1
LOG_ODDS = math.log(2e9)  # of a bound that chance exceeds once in 10**9
ALLOWED = 0.01  # share of the update that f32 sums in another order, or a rounding to nearest here and there, may cost


@kernel
def bracket_codes(codes, steps, after, wanted, code_min, code_max, low, high):
    """The grid's two values around ``wanted``, all f32 (rows, cols); ``steps`` is (rows, cols // group)."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    for i in range(n_rows):
        for j in range(n_cols):
            step, code = steps[i, j // group], np.float32(codes[i, j])
            below, above = after[i, j], after[i, j]
            if step != 0:
                place = np.floor(code + (wanted[i, j] - after[i, j]) / step)
                place = min(max(place, np.float32(code_min)), np.float32(code_max - 1))
                below = after[i, j] + (place - code) * step
                above = after[i, j] + (place + np.float32(1) - code) * step
            low[i, j], high[i, j] = min(below, above), max(below, above)


@kernel
def bracket_levels(codes, steps, after, wanted, levels, code_min, low, high):
    """As ``bracket_codes`` on a codebook: code c stands for ``levels[c - code_min]`` steps."""
    n_rows, n_cols = codes.shape
    group = n_cols // steps.shape[1]
    for i in range(n_rows):
        for j in range(n_cols):
            step, level = steps[i, j // group], levels[codes[i, j] - code_min]
            below, above = after[i, j], after[i, j]
            if step != 0:
                target = level + (wanted[i, j] - after[i, j]) / step
                c = 0
                while c < len(levels) - 2 and target >= levels[c + 1]:
                    c += 1
                below = after[i, j] + (levels[c] - level) * step
                above = after[i, j] + (levels[c + 1] - level) * step
            low[i, j], high[i, j] = min(below, above), max(below, above)


@kernel
def compare(before, after, delta, low, high, sums):
    """Add what became of the update ``delta`` (all f32, (rows, cols)) to ``sums`` f64 (N_SUMS,)."""
    for i in range(before.shape[0]):
        for j in range(before.shape[1]):
            old, update, achieved = np.float64(before[i, j]), np.float64(delta[i, j]), np.float64(after[i, j]) - before[i, j]
            bottom, top = np.float64(low[i, j]), np.float64(high[i, j])
            gap, inside = top - bottom, min(max(old + update, bottom), top)
            nearest = top if inside - bottom >= top - inside else bottom
            error, closer = abs(after[i, j] - inside), min(inside - bottom, top - inside)
            variance = (inside - bottom) * (top - inside)
            sums[PROJECTION] += update * achieved
            sums[UPDATE2] += update * update
            sums[ACHIEVED2] += achieved * achieved
            sums[CHANGED] += achieved != 0
            sums[DITHERED] += update * (inside - old)
            sums[NEAREST] += update * (nearest - old)
            sums[MIXED] += update * ((nearest if abs(update) > 0.25 * gap else inside) - old)
            sums[VARIANCE] += update * update * variance
            sums[NOISE2] += (achieved - update) * (achieved - update)
            sums[EXPECTED_NOISE2] += variance
            sums[BEFORE2] += old * old
            sums[AFTER2] += np.float64(after[i, j]) * after[i, j]
            sums[BEFORE_AFTER] += old * after[i, j]
            sums[PEAK] = max(sums[PEAK], abs(update) * gap)
            if gap > 0:
                sums[EXPECTED_FAR] += closer / gap if closer < 0.48 * gap else 0.0
                sums[FAR] += error > 0.52 * gap
                sums[BEYOND] += error > 1.05 * gap
                sums[DOUBTFUL] += (update * gap) ** 2 if error > 0.48 * gap else 0.0


def bracket_floats(type_name: str, before: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two values of a float type around ``wanted``. For F32 two that are a bf16's unit apart: a merge may have gone
    through bf16, and f32 itself is finer than sums in another order."""
    if type_name == "F32":
        half = np.maximum(np.abs(before), np.abs(wanted)) * np.float32(2.0**-8)
        return wanted - half, wanted + half
    unit = np.uint32(1 << {"F16": 13, "BF16": 16}[type_name])
    bits = np.ascontiguousarray(wanted).view(np.uint32) & ~(unit - np.uint32(1))
    inner, outer = bits.view(np.float32), (bits + unit).view(np.float32)
    if type_name == "F16":
        fine = np.abs(wanted) < 2.0**-14  # denormal in f16, whose unit is 2**-24
        truncated = np.trunc(wanted * np.float32(2.0**24)) * np.float32(2.0**-24)
        inner = np.where(fine, truncated, inner)
        outer = np.where(fine, truncated + np.copysign(np.float32(2.0**-24), wanted), outer)
    return np.minimum(inner, outer), np.maximum(inner, outer)


def neighbours(quant: Quant, blocks, before, after, wanted) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """``low`` and ``high`` around ``wanted`` on the grid of ``blocks``, and that grid's steps (None for floats).

    None where the type's weights are not coded one by one.
    """
    if quant.type.name in ("F32", "F16", "BF16"):
        return *bracket_floats(quant.type.name, before, wanted), None
    if quant.unpack is None:
        return None
    codes, steps = unpacked(quant, blocks, wanted.shape)
    low, high = np.empty_like(wanted), np.empty_like(wanted)
    if quant.levels is None:
        bracket_codes(codes, steps, after, wanted, quant.code_min, quant.code_max, low, high)
    else:
        bracket_levels(codes, steps, after, wanted, quant.levels, quant.code_min, low, high)
    return low, high, steps


def unpacked(quant: Quant, blocks: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    codes, steps = np.empty(shape, np.int8), np.empty((shape[0], shape[1] // quant.group), np.float32)
    quant.unpack(blocks, codes, steps)
    return codes, steps


def bound(variance: float, peak: float) -> float:
    """What a sum of independent errors with this variance, none above ``peak``, exceeds once in 10**9 (Bernstein)."""
    tail = LOG_ODDS / 3 * peak
    return tail + math.sqrt(tail * tail + 2 * LOG_ODDS * variance)


@dataclass
class Comparison:
    """The sums of some rows. ``same_grid`` says that every block keeps the base's grid, ``gridded`` that there is one."""

    n_weights: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(N_SUMS))
    same_grid: bool = True
    gridded: bool = True

    def __add__(self, other: Comparison) -> Comparison:
        sums = self.sums + other.sums
        sums[PEAK] = max(self.sums[PEAK], other.sums[PEAK])
        return Comparison(
            self.n_weights + other.n_weights, sums, self.same_grid and other.same_grid, self.gridded and other.gridded
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
        return bound(self.sums[VARIANCE], self.sums[PEAK]) / self.sums[UPDATE2] + ALLOWED if self.sums[UPDATE2] > 0 else 0.0

    @property
    def noise(self) -> float:
        """The rms of what rounding added, relative to that of the update."""
        return math.sqrt(self._share(NOISE2))

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
        product = self.sums[BEFORE2] * self.sums[AFTER2]
        return float(self.sums[BEFORE_AFTER] / math.sqrt(product)) if product > 0 else 1.0

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
        return self.sums[CHANGED] == 0 and self.sums[EXPECTED_FAR] > LOG_ODDS

    @property
    def is_dithered(self) -> bool:
        """Whether ``kept`` is what dithering the whole update gives; blocks that it moves far may be rounded to nearest."""
        if self.sums[UPDATE2] == 0:
            return self.sums[CHANGED] == 0
        lowest, highest = sorted((self.dithered, self._share(MIXED)))
        return lowest - self.slack <= self.kept <= highest + self.slack and not self.unmoved

    @property
    def is_nearest(self) -> bool:
        """Whether the weights are those that rounding base + update to nearest gives, on the merged blocks' grids."""
        if not self.gridded or self.sums[UPDATE2] == 0 or self.sums[FAR] > 0.3 * self.sums[EXPECTED_FAR]:
            return False
        slack = bound(self.sums[DOUBTFUL], self.sums[PEAK]) / self.sums[UPDATE2] if self.sums[DOUBTFUL] else 0.0
        return abs(self.kept - self.nearest) <= slack + ALLOWED

    @property
    def is_damaged(self) -> bool:
        """Whether weights are where no rounding of base + update puts them, though most are right."""
        return self.gridded and self.beyond > (0.0 if self.same_grid else 0.01)


def compare_rows(source: Quant, target: Quant, stored_before, stored_after, delta: np.ndarray) -> Comparison:
    """Compare rows as stored, uint8 (rows, row_bytes) of type ``source`` in the base and ``target`` in the merged file."""
    before, after = np.empty_like(delta), np.empty_like(delta)
    source.decode(stored_before, before)
    target.decode(stored_after, after)
    found = neighbours(target, stored_after, before, after, before + delta)
    result = Comparison(delta.size, gridded=found is not None)
    low, high, steps = found or (*_free_range(before + delta, after), None)
    compare(before, after, delta, low, high, result.sums)
    result.same_grid = source is target and result.gridded
    if result.same_grid and steps is not None:
        result.same_grid = bool((unpacked(source, stored_before, delta.shape)[1] == steps).all())
    return result


def _free_range(wanted: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without a grid the errors themselves stand for their size: a gap of twice the error, wanted in its middle."""
    error = np.abs(after - wanted)
    return wanted - error, wanted + error
