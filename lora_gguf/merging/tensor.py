"""What happens to one tensor of the base: the plan's noun."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.updates import Update
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.quants.codec import Codec

NO_IMPORTANCE = np.empty(0, np.float32)
# the width of the random offset that rounding on a grid adds before the floor; `fresh` is not here: it knows no grid
SPREADS = {"auto": 1.0, "dither": 1.0, "nearest": 0.0}
# the types with the same scales and a bit more in each code: every second of their values is one of the coarser type
FINER = {"Q4_0": "Q5_0", "Q4_1": "Q5_1", "Q4_K": "Q5_K"}


@dataclass(frozen=True)
class Recipe:
    """How the rows of a tensor are rewritten: from which type to which, and by which rounding.

    ``key`` is that of the tensor's random numbers. ``importance`` is f32 (matrices, cols), E[x²] of each column of the
    input as an imatrix has it, or None.
    """

    source: Codec
    target: Codec
    rounding: str
    key: np.uint64
    importance: np.ndarray | None = None

    @property
    def keeps_grid(self) -> bool:
        """Whether rows keep the grid that they lie on: of the type that they had, and rounded on it."""
        on_grid = self.source.grid is not None or self.source.half is not None
        return self.rounding in SPREADS and self.source is self.target and on_grid

    @property
    def refines_grid(self) -> bool:
        """Whether rows keep the grid that they lie on, with values in between."""
        return self.rounding in SPREADS and FINER.get(self.source.type.name) == self.target.type.name

    @property
    def moves_grid(self) -> bool:
        """Whether the grid of a block is itself moved towards its update."""
        keeps = self.keeps_grid or self.refines_grid
        return self.rounding == "auto" and keeps and self.source.grid is not None and bool(self.source.scales_at)

    @property
    def weighs_columns(self) -> bool:
        """Whether the rounding asks how much each column matters."""
        return self.rounding == "auto" and self.target.grid is not None and bool(self.target.scales_at)

    def importance_of(self, matrix: int) -> np.ndarray:
        """Return the importance of a matrix's columns as a quantizer takes it: f32 (cols,), or (0,) for none."""
        return NO_IMPORTANCE if self.importance is None else self.importance[matrix]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor is copied where ``recipe`` is None, else rewritten with ``pairs`` and ``updates`` added.

    ``source`` is where it lies in the base, ``target`` what is written. ``updates`` are those that aren't low rank,
    each with its factor. ``new_rows``, f32 (k, cols), come after those of the base. ``identity`` tells apart what is
    merged into what: the random numbers of the rounding depend on it.
    """

    source: TensorInfo
    target: TensorInfo
    pairs: Sequence[LoraPair] = ()
    updates: Sequence[tuple[Update, float]] = ()
    new_rows: np.ndarray | None = None
    recipe: Recipe | None = None
    identity: str = ""

    @property
    def wanted(self) -> Recipe:
        """The recipe of a tensor that is rewritten."""
        if self.recipe is None:
            raise ValueError(f"{self.target.name} is copied")
        return self.recipe

    @property
    def changes(self) -> bool:
        """Whether the adapter changes weights that the base has."""
        return bool(self.pairs or self.updates)


def tensor_key(seed: int, name: str, identity: str = "") -> np.uint64:
    """Return the key of a tensor's random numbers; ``identity`` is that of what is merged and what it is merged into.

    The error that rounding leaves in a merged file is a function of these numbers. A second merge that met them again
    would add to that error rather than leave it at random.
    """
    text = f"{seed}/{identity}/{name}".encode("utf-8", "surrogateescape")
    return np.uint64(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))
