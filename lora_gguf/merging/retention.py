"""How much of the adapter survived: per tensor, per kind of tensor, per file.

``kept`` is the projection of the achieved change onto the intended one, Σ delta·achieved / Σ delta²: 1 means that the
adapter acts at full strength, 0 that rounding erased it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lora_gguf.merging.loss import expected_loss

WARN_BELOW = 0.8  # of an adapter kept
FAINT = 0.5  # of the update kept, below which it is not in the file
LOG_ODDS = math.log(2e9)  # of a bound that chance exceeds once in 10**9
NOTHING = 1e-5  # of a step: what sums in f32 leave of updates that cancel
_BLOCK = re.compile(r"^(?:(enc|dec|v|a)\.)?(?:blk|deepstack)\.(\d+)\.")
_SUFFIX = re.compile(r"\.weight$")


def kind_of(name: str) -> str:
    """Tell what a GGUF tensor is, whatever its layer: ``blk.3.attn_q.weight`` is an ``attn_q``."""
    return _SUFFIX.sub("", _BLOCK.sub(lambda match: f"{match[1]}." if match[1] else "", name))


def layer_of(name: str) -> int | None:
    """Return the layer that a GGUF tensor belongs to; None where it is of no layer."""
    match = _BLOCK.match(name)
    return int(match[2]) if match else None


@dataclass
class Retention:
    """Sums over some weights; ``sums`` (4,) f64: Σ delta·achieved, Σ delta², Σ achieved², number of changed codes.

    ``steps2`` is Σ step² and ``weights2`` Σ weight², as far as a sample of the rows tells them: NaN where the type has
    no steps. ``harm2`` is the energy of the noise, weighed by the harm that it does.
    """

    n_weights: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(4))
    steps2: float = 0.0
    weights2: float = 0.0
    harm2: float = 0.0

    def add(self, n_weights: int, sums: np.ndarray) -> None:
        self.n_weights += n_weights
        self.sums = self.sums + sums

    def measure(self, step: float, weight: float, harm: float) -> None:
        """Note the rms ``step`` of the type and ``weight`` of the base, and the ``harm`` that noise does here."""
        self.steps2, self.weights2 = self.n_weights * step**2, self.n_weights * weight**2
        self.harm2 = harm * self.noise2

    @property
    def kept(self) -> float:
        """NaN where there is nothing to keep."""
        return float(self.sums[0] / self.sums[1]) if self.sums[1] > 0 else float("nan")

    @property
    def is_nothing(self) -> bool:
        """Whether the delta is zero, or beside the type's steps as good as zero."""
        return not self.sums[1] > 0 or self.delta_per_step < NOTHING

    @property
    def changed(self) -> float:
        """The share of the codes that changed."""
        return float(self.sums[3] / self.n_weights) if self.n_weights else 0.0

    @property
    def delta_rms(self) -> float:
        return float(np.sqrt(self.sums[1] / self.n_weights)) if self.n_weights else 0.0

    @property
    def noise(self) -> float:
        """The rms of what rounding added, relative to the rms of the delta."""
        error = self.sums[2] - 2 * self.sums[0] + self.sums[1]
        return float(np.sqrt(max(error, 0.0) / self.sums[1])) if self.sums[1] > 0 else 0.0

    @property
    def noise2(self) -> float:
        """Σ noise², noise being what rounding added but for its part along the delta."""
        return max(float(self.sums[2] - self.sums[0] ** 2 / self.sums[1]), 0.0) if self.sums[1] > 0 else 0.0

    @property
    def expected_loss(self) -> float | None:
        """The share of the fine-tune's effect that is lost, within a factor of two; None where it is not known."""
        if self.is_nothing or not self.weights2 > 0 or math.isnan(self.harm2):
            return None
        return expected_loss(self.kept, self.harm2 / self.weights2, float(self.sums[1]) / self.weights2)

    @property
    def delta_norm(self) -> float:
        """The Frobenius norm of the delta."""
        return float(np.sqrt(self.sums[1]))

    @property
    def delta_per_step(self) -> float:
        """The rms of the delta, relative to that of the step between two values that the type can hold; NaN if not
        known.
        """
        return float(np.sqrt(self.sums[1] / self.steps2)) if self.steps2 > 0 else float("nan")

    @property
    def is_faint(self) -> bool:
        """Whether less than half of the update is there, by more than chance: nothing can prove such a tensor."""
        return self.kept + chance(self.noise, self.n_weights) < FAINT

    def as_dict(self) -> dict[str, float | None]:
        """Return plain data; None for what was not measured."""
        measures = ("kept", "changed", "delta_rms", "delta_norm", "delta_per_step", "noise")
        return {"weights": self.n_weights} | {
            name: getattr(self, name) if self.n_weights else None for name in measures
        }


def chance(noise: float, n_weights: int) -> float:
    """Return by how much what is kept of an update may be off by the chance of dithering, at most."""
    return math.sqrt(2 * LOG_ODDS / n_weights) * noise if n_weights else 0.0


def total(parts: Iterable[Retention]) -> Retention:
    whole = Retention()
    for part in parts:
        whole.add(part.n_weights, part.sums)
        whole.steps2 += part.steps2
        whole.weights2 += part.weights2
        whole.harm2 += part.harm2
    return whole
