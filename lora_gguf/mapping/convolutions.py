"""Updates of convolutions, which PEFT has as matrices: (out, in * height * width)."""

from __future__ import annotations

import math
from dataclasses import replace

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.updates import Added, Replaced, Update
from lora_gguf.errors import UnsupportedError


def is_spread(shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Return whether the matrix of ``shape`` is a convolution, ``stored`` as (out, in, height, width)."""
    return len(shape) == 2 < len(stored) and shape[0] == stored[0] and math.prod(shape) == math.prod(stored)


def spread(pair: LoraPair, stored: tuple[int, ...]) -> Added:
    """Return the update of a convolution, whose rows in the file are too short to be of low rank."""
    values = pair.delta().reshape(-1, stored[-1])
    return Added(name=pair.name, shape=values.shape, sources=pair.sources, values=values)


def folded(update: Update, stored: tuple[int, ...]) -> Update:
    """Return ``update`` with the rows that the tensor has in the file, where those of the module are longer or shorter.

    Raises ``UnsupportedError`` for an update that needs whole rows of the module.
    """
    if not stored or update.shape[1] == stored[-1] or math.prod(update.shape) != math.prod(stored):
        return update
    if not isinstance(update, Added | Replaced) or getattr(update, "only", None) is not None:
        raise UnsupportedError(f"{update.name}: {update.kind} on a convolution: merge it with PEFT")
    values = update.values.reshape(-1, stored[-1])
    return replace(update, values=values, shape=values.shape)
