"""Match the adapters' updates with the base's tensors, choose types, and find everything that can be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from lora_gguf.adapters.lora import EMBEDDING, LoraPair
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import MismatchError, NumericError, UnsupportedError, UsageError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.mapping.placement import Placement
from lora_gguf.merging.importance import importance_of
from lora_gguf.merging.options import Policy
from lora_gguf.merging.refit import Weighting
from lora_gguf.merging.requantize import Later, Recipe, weighting_of
from lora_gguf.merging.rounding import tensor_key
from lora_gguf.quants.ggml import BY_NAME, GgmlType
from lora_gguf.quants.mixes import fallback_type, file_type_of, mix_types, model_of, requires_importance
from lora_gguf.quants.table import CODECS

HEAD = "output.weight"
LARGEST_SCALE = 1e30
PROMOTED = "Q6_K"  # of a tensor whose weights are not coded one by one (IQ1 to IQ3), so that codes cannot be moved


@dataclass
class TensorPlan:
    """What happens to one tensor: copied where ``recipe`` is None, else rewritten with ``pairs`` and ``updates`` added.

    ``source`` is where it lies in the base, ``target`` what is written. ``updates`` are those that aren't low rank,
    each with its factor. ``new_rows``, f32 (k, cols), come after those of the base.
    """

    source: TensorInfo
    target: TensorInfo
    pairs: list[LoraPair] = field(default_factory=list)
    updates: list[tuple[Update, float]] = field(default_factory=list)
    new_rows: np.ndarray | None = None
    recipe: Recipe | None = None

    @property
    def changes(self) -> bool:
        """Whether the adapter changes weights that the base has."""
        return bool(self.pairs or self.updates)


@dataclass
class Plan:
    """All tensors in order, warnings, and the raw ``key_values`` that take the place of the base's."""

    tensors: list[TensorPlan]
    warnings: list[str]
    key_values: dict[str, bytes] = field(default_factory=dict)

    @property
    def merged(self) -> list[TensorPlan]:
        """The tensors that the adapter changes."""
        return [tensor for tensor in self.tensors if tensor.changes]

    def file_type(self, before: int | None) -> int:
        """``general.file_type`` of the file, ``before`` that of the base."""
        weights: dict[str, int] = {}
        for tensor in self.tensors:
            weights[tensor.target.type.name] = weights.get(tensor.target.type.name, 0) + tensor.target.n_elements
        return file_type_of(weights, before)


def make_plan(base: Base, placements: Iterable[tuple[Placement, float]], policy: Policy) -> Plan:
    """Decide what happens to each tensor of ``base``; each placement comes with the factor that multiplies its scale.

    Raises ``MismatchError``, ``NumericError`` or ``UnsupportedError`` with all offenders listed.
    """
    placements = list(placements)
    if strange := [scale for _, scale in placements if not math.isfinite(scale) or abs(scale) > LARGEST_SCALE]:
        raise UsageError(f"scale: expected a finite number up to {LARGEST_SCALE:.0e}, found {strange[0]}")
    plans = {name: TensorPlan(info, TensorInfo(name, info.type, info.shape, 0)) for name, info in base.tensors.items()}
    if any(placement.untied for placement, _ in placements):
        embedding = base.tensors[EMBEDDING]
        plans[HEAD] = TensorPlan(embedding, TensorInfo(HEAD, embedding.type, embedding.shape, 0))
    for placement, scale in placements:
        for pair in placement.pairs:
            for name in _targets(pair.name, placement, HEAD in plans):
                plans[name].pairs.append(replace(pair, name=name, scale=pair.scale * scale))
        for update in placement.updates:
            for name in _targets(update.name, placement, HEAD in plans) if update.n_rows else ():
                plans[name].updates.append((update, scale))
        for embedding, new in placement.new_rows.items():
            for name in _targets(embedding, placement, HEAD in plans):
                _append(plans[name], new, base.label)
    _check(base, plans.values())
    types = _mix_types(base, [tensor.target for tensor in plans.values()], policy) if policy.mix else {}
    for name, tensor in plans.items():
        choose(tensor, types.get(name), policy)
    if policy.rounding == "auto":
        energies: dict[str, np.ndarray] = {}
        for tensor in plans.values():
            if tensor.recipe and tensor.recipe.moves_grid and tensor.changes:
                tensor.recipe = replace(
                    tensor.recipe, weighting=Later(partial(_weighted, base, tensor, policy.imatrix, energies))
                )
    warnings = [warning for placement, _ in placements for warning in placement.warnings]
    if any(placement.untied for placement, _ in placements):
        head = plans[HEAD].target
        size = f"{head.n_bytes / 1e6:.1f} MB, {head.type}"
        warnings.append(
            f"{HEAD}: the adapter's head is no longer the embedding: it becomes a tensor of its own ({size}); see --tied"
        )
    return Plan(list(plans.values()), warnings, _vocabulary(placements, base.label))


def _weighted(
    base: Base, tensor: TensorPlan, imatrix: Imatrix | None, energies: dict[str, np.ndarray]
) -> list[Weighting]:
    """By what the grids of each matrix of a tensor are moved."""
    return [
        weighting_of(tensor.recipe.source, importance)
        for importance in importance_of(base, tensor.source.name, imatrix, energies)
    ]


def _targets(name: str, placement: Placement, has_head: bool) -> tuple[str, ...]:
    """The tensors that an update of ``name`` changes: the head too, where only another adapter tells it from the
    embedding.
    """
    return (name, HEAD) if name == EMBEDDING and has_head and placement.tied else (name,)


def _append(tensor: TensorPlan, new: np.ndarray, label: str) -> None:
    if tensor.new_rows is not None:
        raise MismatchError(
            f"{label}: {tensor.source.name}: two adapters add tokens: merge one, then the other into the result"
        )
    n_rows, n_cols = tensor.target.shape
    tensor.new_rows, tensor.target = new, replace(tensor.target, shape=(n_rows + len(new), n_cols))


def _vocabulary(placements: list[tuple[Placement, float]], label: str) -> dict[str, bytes]:
    """The key/value pairs of the one vocabulary that the adapters ask for."""
    found = [placement.key_values for placement, _ in placements if placement.key_values]
    if any(other != found[0] for other in found[1:]):
        raise MismatchError(
            f"{label}: two adapters change its tokens, each in its own way: merge one, then the other into the result"
        )
    return found[0] if found else {}


def _mix_types(base: Base, tensors: list[TensorInfo], policy: Policy) -> dict[str, GgmlType]:
    if quantized := [info.name for info in base.tensors.values() if info.type.block_size > 1]:
        raise UnsupportedError(
            f"{base.label}: {quantized[0]} is quantized already: --quantize wants an F16, BF16 or F32 base; "
            "use --type to change the type of the adapted tensors"
        )
    types = mix_types(policy.mix, model_of(base), tensors, has_imatrix=bool(policy.imatrix))
    unmeasured = [
        tensor.name
        for tensor in tensors
        if requires_importance(policy.mix, tensor.name, types.get(tensor.name, tensor.type))
        and (policy.imatrix is None or policy.imatrix.of(tensor) is None)
    ]
    if unmeasured:
        raise UsageError(
            f"--quantize {policy.mix}: too few bits without an importance matrix: name one with --imatrix",
            details=unmeasured,
        )
    return types


def choose(tensor: TensorPlan, mix_type: GgmlType | None, policy: Policy) -> None:
    """Set the type that ``tensor`` gets, and the recipe by which it gets there."""
    info = tensor.source
    chosen = mix_type or (adapted_type(tensor, policy) if tensor.changes else info.type)
    if tensor.new_rows is not None and CODECS[chosen.name].needs_importance:
        chosen = fallback_type(BY_NAME[PROMOTED], info.n_cols)
    tensor.target = replace(tensor.target, type=chosen)
    if tensor.changes or chosen != info.type:
        rounding = (
            "fresh"
            if any(update.replaces and update.n_rows == info.n_rows for update, _ in tensor.updates)
            else policy.rounding
        )
        key = tensor_key(policy.seed, tensor.target.name)
        importance = policy.imatrix.of(info) if policy.imatrix else None
        tensor.recipe = Recipe(CODECS[info.type.name], CODECS[chosen.name], rounding, key, importance)


def adapted_type(tensor: TensorPlan, policy: Policy) -> GgmlType:
    """The type of an adapted tensor: what the user chose, or the base's, or one that can hold the result."""
    info = tensor.source
    quant = CODECS[info.type.name]
    if policy.type and len(info.shape) > 1:
        return fallback_type(BY_NAME[policy.type], info.n_cols)
    rounds = quant.grid is not None or info.type.block_size == 1
    replaced = any(update.replaces for update, _ in tensor.updates)
    if rounds or (not quant.needs_importance and (policy.rounding == "fresh" or replaced)):
        return info.type
    return fallback_type(BY_NAME[PROMOTED], info.n_cols)


def _check(base: Base, plans: Iterable[TensorPlan]) -> None:
    misfits, unsupported, numbers = [], [], []
    merged = [tensor for tensor in plans if tensor.changes or tensor.new_rows is not None]
    for tensor in merged:
        info = tensor.source
        if info.type.name not in CODECS:
            unsupported.append(f"{info.name}: type {info.type} cannot be merged into")
        for pair in tensor.pairs:
            if pair.shape != info.shape:
                misfits.append(f"{info.name}: expected {info.shape}, found {pair.shape}")
            if not (np.isfinite(pair.a).all() and np.isfinite(pair.b).all() and np.isfinite(pair.scale)):
                numbers.append(f"{info.name}: NaN or infinity in the adapter")
    if not merged:
        raise MismatchError(f"{base.label}: the adapter has no tensor for it: is this adapter for another base model?")
    for offenders, error, reason in (
        (misfits, MismatchError, "is this adapter for another base model?"),
        (unsupported, UnsupportedError, "merge into a file of another type"),
        (numbers, NumericError, "the adapter is damaged: download it again, or train it again"),
    ):
        if offenders:
            first = (
                offenders[0] if len(offenders) == 1 else f"{len(offenders)} tensors do not fit, such as {offenders[0]}"
            )
            raise error(f"{base.label}: {first}: {reason}", offenders if len(offenders) > 1 else ())
