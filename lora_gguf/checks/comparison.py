"""How far a merged tensor is from its base plus the update, and how far rounding alone may take it.

Each weight that was wanted, base + update, lies between two neighbours on the merged block's own grid, ``low`` and
``high``, a gap apart. Dithering takes ``high`` with probability (wanted - low) / gap: the expectation is what was
wanted, the variance (wanted - low) * (high - wanted). Rounding to nearest takes the closer one, and a fresh
quantization does so on a grid of its own. So for each of the three the share of the update that must have been kept is
known, for dithering with a variance; Bernstein's inequality turns that into a bound which chance exceeds once in 10**9,
however few weights moved.

A merged grid is not believed: what it may be is told by the base's own grid and by that which the type's quantizer
finds for base + update. A step wider than twice both of them counts as that, and the errors are tested against theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_gguf.checks.neighbours import brackets, but_for_scales, cut_off, farthest, own_steps
from lora_gguf.checks.routes import rounded
from lora_gguf.checks.sums import (
    ACHIEVED2,
    ALLOWED_NOISE2,
    ASTRAY,
    BEFORE2,
    BEFORE_ACHIEVED,
    BEYOND,
    DITHERED,
    DOUBTFUL,
    EXPECTED_FAR,
    EXPECTED_NOISE2,
    FAR,
    FRESH,
    HALF_VARIANCE,
    HALVED,
    MAXIMA,
    MOVED2,
    N_SUMS,
    NEAREST,
    NOISE2,
    PEAK,
    PEAK_HALF,
    PEAK_NOISE2,
    PROJECTION,
    UPDATE2,
    VARIANCE,
    count,
)
from lora_gguf.merging.retention import FAINT, LOG_ODDS, Retention
from lora_gguf.merging.scratch import scratch
from lora_gguf.quants.codec import Codec

MOVED = np.float32(1.6)  # steps that a weight may be off where its grid moved after it was rounded
ALLOWED = 0.01  # share of the update that f32 sums in another order, or a rounding to nearest here and there, may cost
WIDER = np.float32(2)  # than what base + update need, times which a step counts
NOISIER = 2.0  # than a grid's own noise, times which a search for another kind of error may be

ROW_UNIT = 2.0**-8  # of bf16: by how much a row's factor and length may be rounded
LOOSE_SHARE = 2e-3  # of the weights may be beyond: a search by importance, or a moved grid, leaves at most 1.3e-3 there
FEW_FAR = 10
FEW = 0.3  # of the weights that dithering rounds to the farther value: rounding to nearest none, half an update half


def bound(variance: Any, peak: Any) -> Any:
    """Return what a sum of independent errors of this variance, none above ``peak``, exceeds once in 10**9."""
    tail = LOG_ODDS / 3 * peak
    return tail + np.sqrt(tail * tail + 2 * LOG_ODDS * variance)


def added(sums: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return sums of rows, f64 (..., N_SUMS), as those of all of them: the last two are maxima."""
    whole = sums.sum(axis)
    whole[..., MAXIMA] = sums[..., MAXIMA].max(axis, initial=0)
    return whole


def off_share(sums: np.ndarray, *, mixed: bool = False) -> np.ndarray:
    """Tell which rows of ``sums`` hold a share of the update that no way of rounding leaves: bool. ``mixed``: some of
    their weights may have been rounded in one way, and some in another.
    """
    slack = bound(sums[..., VARIANCE], sums[..., PEAK])
    unsure = np.where(sums[..., DOUBTFUL] > 0, bound(sums[..., DOUBTFUL], sums[..., PEAK]), 0.0)
    halved = slack + bound(sums[..., HALF_VARIANCE], sums[..., PEAK_HALF])
    errors = np.stack([slack, unsure, slack, halved]) + ALLOWED * sums[..., UPDATE2]
    ways = sums[..., [DITHERED, NEAREST, FRESH, HALVED]]
    ways = np.moveaxis(ways, -1, 0)
    errors[1:3, sums[..., FAR] > FEW * sums[..., EXPECTED_FAR] + FEW_FAR] = -np.inf  # these are not at the nearest
    found, low, high = sums[..., PROJECTION], ways - errors, ways + errors
    if mixed:
        low, high = low.min(0, keepdims=True), high.max(0, keepdims=True)
    return (sums[..., UPDATE2] > 0) & ~((found >= low) & (found <= high)).any(0)


def too_noisy(sums: np.ndarray, *, moved: bool = False) -> np.ndarray:
    """Tell which rows of ``sums`` are farther from base + update than rounding on a sensible grid takes them: bool.
    ``moved``: but for what moved scales explain, as they may in a few blocks.
    """
    peak = sums[..., PEAK_NOISE2]
    allowed = NOISIER * sums[..., ALLOWED_NOISE2] + bound(sums[..., ALLOWED_NOISE2] * peak, peak)
    return sums[..., NOISE2] - moved * sums[..., MOVED2] > allowed


def erased(sums: np.ndarray) -> np.ndarray:
    """Tell which rows of ``sums`` surely hold less than half of the update that dithering leaves: bool."""
    return (sums[..., UPDATE2] > 0) & (sums[..., PROJECTION] + _by_chance(sums) < FAINT * sums[..., DITHERED])


def present(sums: np.ndarray) -> np.ndarray:
    """Tell which rows of ``sums`` surely hold more than half of it: bool."""
    return sums[..., PROJECTION] - _by_chance(sums) > FAINT * sums[..., DITHERED]


def _by_chance(sums: np.ndarray) -> Any:
    """How far from its expectation dithering may leave the projection of rows of ``sums``."""
    return bound(sums[..., VARIANCE], sums[..., PEAK]) + ALLOWED * sums[..., UPDATE2]


@dataclass
class Comparison:
    """The sums of some rows, f64 (N_SUMS,). ``gridded`` says that their type has a grid, ``half`` that they
    are floats."""

    n_weights: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(N_SUMS))
    gridded: bool = True
    half: bool = False

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.n_weights + other.n_weights,
            added(np.stack([self.sums, other.sums])),
            self.gridded and other.gridded,
            self.half or other.half,
        )

    @classmethod
    def of_merge(cls: Any, n_weights: int, merge_sums: np.ndarray) -> Comparison:
        """Return what a merge itself counts, f64 (4,) as in ``Retention``, without what rounding might have done."""
        sums = np.full(N_SUMS, np.nan)
        sums[[PROJECTION, UPDATE2, ACHIEVED2]] = merge_sums[:3]
        return cls(n_weights, sums)

    def as_kept(self) -> Retention:
        """Return the sums that a merge counts."""
        found = self.sums[[PROJECTION, UPDATE2, ACHIEVED2]]
        return Retention(self.n_weights, np.append(found, 0.0))

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
    def fresh(self) -> float:
        """What the type's own quantizer keeps on a new grid."""
        return self._share(FRESH)

    @property
    def standard_error(self) -> float:
        """Of ``kept``, if the rounding was dithered."""
        return math.sqrt(self.sums[VARIANCE]) / self.sums[UPDATE2] if self.sums[UPDATE2] > 0 else 0.0

    @property
    def slack(self) -> float:
        """How far ``kept`` may be from ``dithered`` by chance."""
        error = float(bound(self.sums[VARIANCE], self.sums[PEAK]))
        return error / self.sums[UPDATE2] + ALLOWED if self.sums[UPDATE2] > 0 else 0.0

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
        return bool(self.sums[ACHIEVED2] == 0 and self.sums[EXPECTED_FAR] > LOG_ODDS)

    @property
    def is_dithered(self) -> bool:
        """Whether ``kept`` is what dithering gives."""
        if self.sums[UPDATE2] == 0:
            return bool(self.sums[ACHIEVED2] == 0)
        return abs(self.kept - self.dithered) <= self.slack and not self.unmoved

    @property
    def tells_dither(self) -> bool:
        """Whether more of the update is there than any rounding to nearest leaves: chance put it there."""
        others = max(self.nearest, self.fresh, self._share(HALVED) if self.half else 0.0)
        return self.gridded and self.kept - self.slack > others and self.is_dithered

    @property
    def is_nearest(self) -> bool:
        """Whether the weights are those that rounding base + update to nearest gives, on the merged blocks' grids."""
        if not self.gridded or self.sums[UPDATE2] == 0 or self.sums[FAR] > FEW * self.sums[EXPECTED_FAR]:
            return False
        slack = float(bound(self.sums[DOUBTFUL], self.sums[PEAK])) if self.sums[DOUBTFUL] else 0.0
        return abs(self.kept - self.nearest) <= slack / self.sums[UPDATE2] + ALLOWED

    @property
    def is_erased(self) -> bool:
        """Whether the update is surely not there."""
        return bool(erased(self.sums)) or self.unmoved

    @property
    def is_scaled(self) -> bool:
        """Whether some factor times the update is there, within rounding."""
        left = self.sums[ACHIEVED2] - self.kept * self.sums[PROJECTION]
        return bool(left <= NOISIER * self.sums[ALLOWED_NOISE2])

    @property
    def is_off(self) -> bool:
        """Whether no way of rounding leaves this share of the update. Of a float, rows may be rounded differently."""
        return bool(off_share(self.sums, mixed=self.half))

    @property
    def is_damaged(self) -> bool:
        """Whether weights are where no rounding of base + update puts them, though most are right."""
        return bool(too_noisy(self.sums)) or self.beyond > LOOSE_SHARE or bool(self.sums[ASTRAY])


@dataclass
class Compared:
    """What a comparison of some rows found: their sums, f64 (rows, N_SUMS), and of what kind they are."""

    rows: np.ndarray
    n_cols: int
    gridded: bool
    half: bool

    @property
    def whole(self) -> Comparison:
        return Comparison(len(self.rows) * self.n_cols, added(self.rows), self.gridded, self.half)

    def cells(self, n_rows: int) -> np.ndarray:
        """Return the sums of each ``n_rows`` rows."""
        padding = -len(self.rows) % n_rows
        padded = np.concatenate([self.rows, np.zeros((padding, N_SUMS))])
        return added(padded.reshape(-1, n_rows, N_SUMS), 1)


def compare_rows(
    quants: tuple[Codec, Codec],
    stored: tuple[np.ndarray, np.ndarray],
    delta: np.ndarray,
    fresh: np.ndarray,
    *,
    scaled: bool = False,
) -> Compared:
    """Compare rows as ``stored``, uint8 (rows, row_bytes), of the types ``quants``, in the base and in the merge.

    ``fresh`` are base + delta as the merge's type's own quantizer stores them. ``scaled``: each row was brought to a
    length (DoRA), which in bf16 leaves all of it longer or shorter.
    """
    source, target = quants
    before, after, anew = (scratch(name, delta.shape) for name in ("before", "after", "anew"))
    source.decode(stored[0], before)
    target.decode(stored[1], after)
    target.decode(fresh, anew)
    wanted = before + delta
    steps = own_steps(quants, stored[0], fresh, before, delta)
    found = brackets(target, stored[1], (before, after, delta), None if steps is None else WIDER * steps)
    own_error, error = anew - wanted, after - wanted
    low, high = found or (wanted - np.abs(own_error), wanted + np.abs(own_error))
    rows = np.zeros((len(delta), N_SUMS))
    count(before, after, delta, low, high, rows)
    settled = but_for_scales(target, stored[1], after, error, steps)
    unit = (np.abs(before) + np.abs(wanted)) * np.float32(2.0**-9)  # of bf16, through which a merge may have gone
    if rows[:, BEYOND].any():
        inner = np.clip(wanted, low, high) - wanted
        off = np.minimum(np.abs(error - inner), np.abs(settled - inner))
        rows[:, BEYOND] = (off > MOVED * (high - low) + 2 * unit).sum(1)
    if target.type.block_size == 1 or found is None:
        rows[:, [FAR, BEYOND]] = 0
    if target.type.block_size == 1:
        own_error = rounded(wanted, "BF16") - wanted
    astray = np.minimum(np.abs(error), np.abs(settled)) > farthest(target, own_error, steps)
    if found is not None and steps is not None and astray.any():
        astray &= ~cut_off(target, (wanted, after), found, steps)
    rows[:, ASTRAY] = astray.sum(1)
    rows[:, FRESH] = np.einsum("ij,ij->i", delta, (own_error + delta).astype(np.float64))
    halves = rounded(rounded(before, "BF16") + delta, "BF16") - wanted
    rows[:, HALVED] = np.einsum("ij,ij->i", delta, (halves + delta).astype(np.float64))
    rows[:, HALF_VARIANCE] = np.square(delta * unit, dtype=np.float64).sum(1)
    rows[:, PEAK_HALF] = np.abs(delta * unit).max(1, initial=0)
    if scaled and target.type.block_size == 1:
        shift = ROW_UNIT * np.abs(np.einsum("ij,ij->i", delta, wanted, dtype=np.float64))
        rows[:, HALF_VARIANCE] += np.square(shift)
        rows[:, PEAK_HALF] = np.maximum(rows[:, PEAK_HALF], 2 * shift)
    rows[:, NOISE2] = np.square(error, dtype=np.float64).sum(1)
    rows[:, MOVED2] = rows[:, NOISE2] - np.square(settled, dtype=np.float64).sum(1)
    if steps is None:
        own2, peak = np.square(own_error), 2 * np.abs(own_error)
    else:
        own2, peak = np.square(steps) / 12 + np.minimum(np.abs(delta), steps / 4) * steps, steps
    rows[:, ALLOWED_NOISE2] = own2.sum(1, dtype=np.float64)
    rows[:, PEAK_NOISE2] = np.square(peak.max(1, initial=0), dtype=np.float64)
    return Compared(rows, delta.shape[1], found is not None, target.type.block_size == 1)
