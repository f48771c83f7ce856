"""How much of a fine-tune's effect a merge is expected to lose: coarse, but of the right size.

The effect is the Kullback-Leibler divergence between what the model says with the adapter at run time and without it,
on text of the adapter's kind; lost is as much of it, as a share, as lies between the adapter at run time and the merged
file. It has two parts. Where rounding erases, the effect goes as the square of what is left and faster: the largest
changes are kept first. What rounding adds, noise, moves the outputs in proportion to its energy relative to that of the
weights; the update, which training has aimed, moves them far more, and less than in proportion where it is large. The
constants are fitted: docs/benchmarks.md tells on what, and how they do elsewhere.
"""

from __future__ import annotations

from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.quants.codec import Codec

ERASED, NOISE, POWER = 2.75, 0.055, 0.7
# of the harm that noise does: each number of a block that auto moves takes it from the columns that matter most; at 2
# bits a step is as wide as a block
MOVED, COARSE, COARSE_BITS = 0.63, 4.0, 3.0

GOOD_LOSS, BAD_LOSS = 0.25, 0.5  # up to here a loss is good, from here on it is not


def harm(before: Codec, after: Codec, moved: bool = False) -> float:
    """Return how much harm noise in a tensor does, relative to the same energy of noise that is the same everywhere, by
    its type before and after; ``moved`` where the rounding moved its grid. NaN where it was quantized on the way: then
    most of the noise is not of the merge.
    """
    n_before, n_after = (8 * codec.type.block_bytes / codec.type.block_size for codec in (before, after))
    if n_after < n_before:
        return float("nan")
    coarse = COARSE if n_after < COARSE_BITS else 1.0
    return coarse * MOVED ** len(after.scales_at) if moved else coarse


def harm_of(tensor: TensorPlan) -> float:
    """Return ``harm`` of a tensor that is rewritten as planned."""
    recipe = tensor.wanted
    return harm(recipe.source, recipe.target, recipe.moves_grid)


def expected_loss(kept: float, noise: float, update: float) -> float:
    """Return the share of the effect that is lost: 0 is none, 1 all of it.

    ``kept`` is the share of the update in the file; ``noise`` and ``update`` are their energies relative to that of the
    weights, noise without its part along the update and weighed by ``harm``.
    """
    return min((1 - min(kept, 1.0)) ** ERASED + NOISE * noise / update**POWER, 1.0)


def loss_text(loss: float | None) -> str:
    """Return it for a reader, as coarse as it is; - where it is not known."""
    if loss is None:
        return "-"
    if loss < 0.0075:
        return "less than 1%"
    return "nearly all" if loss >= 0.95 else f"about {float(f'{loss:.1g}'):.0%}"
