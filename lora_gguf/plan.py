"""Match the adapter's pairs with the base's tensors, choose types, and find everything that can be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lora_gguf.errors import MismatchError, NumericError, UnsupportedError, UsageError
from lora_gguf.ggml import BY_NAME, GgmlType
from lora_gguf.gguf_reader import GgufReader, TensorInfo
from lora_gguf.gguf_writer import TensorSpec
from lora_gguf.lora import LoraPair
from lora_gguf.quants import QUANTS
from lora_gguf.requantize import ROUNDINGS, Recipe
from lora_gguf.rounding import tensor_key

PROMOTED = "Q6_K"  # of a tensor whose weights are not coded one by one (IQ1 to IQ3), so that codes cannot be moved


@dataclass(frozen=True)
class Policy:
    """What the user asked for: the rounding, and which types the tensors get.

    ``type`` is that of the adapted tensors (None keeps the base's), ``mix`` names one of llama.cpp's quantization mixes for
    all tensors; ``imatrix`` maps tensor names to the importance of their columns, f32 (matrices, cols).
    """

    rounding: str = "dither"
    seed: int = 0
    type: str | None = None
    mix: str | None = None
    imatrix: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        if self.type and self.type not in QUANTS:
            raise UsageError(f"type {self.type}: expected one of {', '.join(QUANTS)}")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding {self.rounding}: expected one of {', '.join(ROUNDINGS)}")


@dataclass
class TensorPlan:
    """What happens to one tensor of the base: copied where ``recipe`` is None, else rewritten with ``pairs`` added."""

    source: TensorInfo
    target: TensorSpec
    pairs: list[LoraPair] = field(default_factory=list)
    recipe: Recipe | None = None


@dataclass
class Plan:
    tensors: list[TensorPlan]
    warnings: list[str]

    @property
    def merged(self) -> list[TensorPlan]:
        """The tensors that the adapter changes."""
        return [tensor for tensor in self.tensors if tensor.pairs]


def make_plan(base: GgufReader, pairs: Iterable[LoraPair], policy: Policy) -> Plan:
    """Decide what happens to each tensor of ``base``.

    Raises ``MismatchError``, ``NumericError`` or ``UnsupportedError`` with all offenders listed.
    """
    wanted: dict[str, list[LoraPair]] = {}
    for pair in pairs:
        wanted.setdefault(pair.name, []).append(pair)
    _check(base, wanted)
    types = _mix_types(base, policy.mix) if policy.mix else {}
    tensors = [_plan_tensor(info, wanted.get(info.name, []), types.get(info.name), policy) for info in base.tensors.values()]
    return Plan(tensors, [])


def _plan_tensor(info: TensorInfo, pairs: list[LoraPair], mix_type: GgmlType | None, policy: Policy) -> TensorPlan:
    target = mix_type or (adapted_type(info, policy) if pairs else info.type)
    spec = TensorSpec(info.name, target, info.shape)
    if not pairs and target == info.type:
        return TensorPlan(info, spec)
    key, importance = tensor_key(policy.seed, info.name), policy.imatrix.get(info.name)
    return TensorPlan(info, spec, pairs, Recipe(QUANTS[info.type.name], QUANTS[target.name], policy.rounding, key, importance))


def _mix_types(base: GgufReader, mix: str):
    from lora_gguf.mixes import mix_types

    return mix_types(base, mix)


def adapted_type(info: TensorInfo, policy: Policy) -> GgmlType:
    """The type of an adapted tensor: what the user chose, or the base's, or one that can hold the result."""
    quant = QUANTS[info.type.name]
    rounds = quant.unpack is not None or info.type.block_size == 1
    if not policy.type and (rounds or policy.rounding == "fresh" and quant.encode):
        return info.type
    from lora_gguf.mixes import fallback_type

    return fallback_type(BY_NAME[policy.type or PROMOTED], info.n_cols)


def _check(base: GgufReader, wanted: dict[str, list[LoraPair]]) -> None:
    misfits, unsupported, numbers = [], [], []
    for name, pairs in wanted.items():
        info = base.tensors.get(name)
        if info is None:
            misfits.append(f"{name}: the base has no such tensor")
            continue
        if info.type.name not in QUANTS:
            unsupported.append(f"{name}: type {info.type} cannot be merged into")
        for pair in pairs:
            if pair.shape != info.shape:
                misfits.append(f"{name}: expected {info.shape}, found {pair.shape}")
            if not (np.isfinite(pair.a).all() and np.isfinite(pair.b).all() and np.isfinite(pair.scale)):
                numbers.append(f"{name}: NaN or infinity in the adapter")
    if not wanted:
        raise MismatchError(f"{base.label}: the adapter has no tensor for it: is this adapter for another base model?")
    for offenders, error, reason in (
        (misfits, MismatchError, "is this adapter for another base model?"),
        (unsupported, UnsupportedError, "merge into a file of another type"),
        (numbers, NumericError, "the adapter is damaged: download it again, or train it again"),
    ):
        if offenders:
            first = offenders[0] if len(offenders) == 1 else f"{len(offenders)} tensors do not fit, such as {offenders[0]}"
            raise error(f"{base.label}: {first}: {reason}", offenders if len(offenders) > 1 else ())
