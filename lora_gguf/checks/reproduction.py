"""Merge some tensors again as a file says that it was made, and compare bytes: the plainest proof, if it succeeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lora_gguf.files.base import Base
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.mapping.placement import Placement
from lora_gguf.merging.chunks import Changed, New, Weigh, cut
from lora_gguf.merging.importance import weigher
from lora_gguf.merging.options import ROUNDINGS, Policy
from lora_gguf.merging.plan import make_plan
from lora_gguf.merging.rows import merge_rows
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.merging.work import encoded
from lora_gguf.quants.table import CODECS

IMATRIX_KEY = "lora_gguf.imatrix"
N_TRIES = 5  # tensors, none of which come out the same, before the others are given up


def recorded_policy(merged: Base, imatrix: Imatrix | None = None) -> Policy | None:
    """The rounding and seed that a merge wrote into its file; None where another tool made it, or with an ``imatrix``
    not given.
    """
    rounding, seed = merged.get("lora_gguf.rounding"), merged.get("lora_gguf.seed")
    if rounding not in ROUNDINGS or not isinstance(seed, int) or (merged.get(IMATRIX_KEY) and not imatrix):
        return None
    return Policy(rounding, seed, imatrix=imatrix)


def reproduced(
    model: Base,
    merged: Base,
    placements: Sequence[tuple[Placement, float]],
    names: Iterable[str],
    imatrix: Imatrix | None = None,
) -> set[str]:
    """Those of the tensors ``names`` that a merge of ``placements`` into ``model`` gives byte for byte."""
    names = set(names)
    policy = recorded_policy(merged, imatrix) if names else None
    if policy is None:
        return set()
    plan, weigh = make_plan(model, placements, policy), weigher(model, imatrix)
    return {
        tensor.target.name
        for tensor in plan.merged
        if tensor.target.name in names and is_same(tensor, model, merged, weigh)
    }


def is_same(tensor: TensorPlan, model: Base, merged: Base, weigh: Weigh) -> bool:
    """Whether merging ``tensor`` again, into the type that it has in ``merged``, gives the same bytes."""
    source, target = tensor.source, merged.tensors[tensor.target.name]
    quant = CODECS[target.type.name]
    recipe = replace(tensor.recipe, target=quant)
    for chunk in cut([replace(tensor, recipe=recipe, target=target)], weigh):
        if isinstance(chunk, Changed):
            blocks = model.reader_of(source.name).read(source, chunk.first, chunk.n_rows)
            blocks, _ = merge_rows(chunk, blocks)
        elif isinstance(chunk, New):
            blocks = encoded(chunk)
        else:
            continue
        if (blocks != merged.reader_of(target.name).read(target, chunk.first, chunk.n_rows)).any():
            return False
    return True
