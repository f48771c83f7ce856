"""Which type each tensor gets, and the recipe by which it gets there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lora_gguf.errors import UnsupportedError, UsageError
from lora_gguf.files.base import Base
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.merging.options import Policy
from lora_gguf.merging.tensor import Recipe, TensorPlan, tensor_key
from lora_gguf.quants.ggml import BY_NAME, GgmlType
from lora_gguf.quants.mixes import fallback_type, mix_types, model_of, requires_importance
from lora_gguf.quants.table import CODECS

CODED = "Q6_K"  # for a tensor whose weights are not coded one by one (IQ1 to IQ3), so that codes cannot be moved


def with_types(base: Base, tensors: Sequence[TensorPlan], policy: Policy) -> list[TensorPlan]:
    """Return the tensors with the types and recipes that ``policy`` gives them."""
    types = _mix_types(base, tensors, policy.mix, policy.imatrix) if policy.mix else {}
    return [with_recipe(tensor, policy, types.get(tensor.target.name)) for tensor in tensors]


def rechosen(tensors: Iterable[TensorPlan], policy: Policy) -> list[TensorPlan]:
    """Return changed tensors as another ``policy`` without a mix has them."""
    return [with_recipe(tensor, policy) for tensor in tensors]


def with_recipe(tensor: TensorPlan, policy: Policy, mix_type: GgmlType | None = None) -> TensorPlan:
    """Return a tensor with its type, which is ``mix_type`` if given, and the recipe by which it gets there."""
    info = tensor.source
    chosen = mix_type or (adapted_type(tensor, policy) if tensor.changes else info.type)
    if tensor.new_rows is not None and CODECS[chosen.name].needs_importance:
        chosen = fallback_type(BY_NAME[CODED], info.n_cols)
    target, recipe = replace(tensor.target, type=chosen), None
    if tensor.changes or chosen != info.type:
        whole = any(update.replaces and update.n_rows == info.n_rows for update, _ in tensor.updates)
        importance = policy.imatrix.of(info) if policy.imatrix else None
        key = tensor_key(policy.seed, target.name, tensor.identity)
        rounding = "fresh" if whole else policy.rounding
        recipe = Recipe(CODECS[info.type.name], CODECS[chosen.name], rounding, key, importance)
    return replace(tensor, target=target, recipe=recipe)


def adapted_type(tensor: TensorPlan, policy: Policy) -> GgmlType:
    """Return the type of an adapted tensor: what the user chose, or the base's, or one that can hold the result."""
    info, codec = tensor.source, CODECS[tensor.source.type.name]
    if policy.type and len(info.shape) > 1:
        return fallback_type(BY_NAME[policy.type], info.n_cols)
    rounds = codec.grid is not None or info.type.block_size == 1
    replaced = any(update.replaces for update, _ in tensor.updates)
    if rounds or (not codec.needs_importance and (policy.rounding == "fresh" or replaced)):
        return info.type
    return fallback_type(BY_NAME[CODED], info.n_cols)


def _mix_types(base: Base, tensors: Sequence[TensorPlan], mix: str, imatrix: Imatrix | None) -> dict[str, GgmlType]:
    if quantized := [info.name for info in base.tensors.values() if info.type.block_size > 1]:
        raise UnsupportedError(
            f"{base.label}: {quantized[0]} is quantized already: --quantize wants an F16, BF16 or F32 base; "
            "use --type to change the type of the adapted tensors"
        )
    targets = [tensor.target for tensor in tensors]
    types = mix_types(mix, model_of(base), targets, has_imatrix=bool(imatrix))
    unmeasured = [
        target.name
        for target in targets
        if requires_importance(mix, target.name, types.get(target.name, target.type))
        and (imatrix is None or imatrix.of(target) is None)
    ]
    if unmeasured:
        raise UsageError(
            f"--quantize {mix}: too few bits without an importance matrix: name one with --imatrix",
            details=unmeasured,
        )
    return types
