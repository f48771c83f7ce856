"""The noun that both paths share: a low-rank update of one tensor, in GGUF terms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class LoraPair:
    """The update ``W += scale * b @ a`` of the GGUF tensor ``name``.

    ``a`` is (r, in) and ``b`` (out, r), f32 and contiguous, in the layout that the GGUF tensor has; for stacked experts
    both have a leading axis E: (E, r, in) and (E, out, r). ``scale`` is PEFT's: alpha / r, or alpha / sqrt(r).
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that this updates."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def delta(self) -> np.ndarray:
        """``scale * b @ a`` in f32, whole: for tests and small tensors."""
        return np.float32(self.scale) * (self.b.astype(np.float32) @ self.a.astype(np.float32))
