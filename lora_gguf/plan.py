"""Match the adapter's pairs with the base's tensors, choose types, and find everything that can be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lora_gguf.errors import MismatchError, NumericError, UnsupportedError
from lora_gguf.gguf_reader import GgufReader, TensorInfo
from lora_gguf.gguf_writer import TensorSpec
from lora_gguf.lora import LoraPair
from lora_gguf.requantize import Recipe, quant_of
from lora_gguf.rounding import tensor_key


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
        return [tensor for tensor in self.tensors if tensor.recipe]


def make_plan(base: GgufReader, pairs: Iterable[LoraPair], *, rounding: str, seed: int) -> Plan:
    """Decide what happens to each tensor of ``base``.

    Raises ``MismatchError``, ``NumericError`` or ``UnsupportedError`` with all offenders listed.
    """
    wanted: dict[str, list[LoraPair]] = {}
    for pair in pairs:
        wanted.setdefault(pair.name, []).append(pair)
    _check(base, wanted)
    tensors = [_plan_tensor(info, wanted.get(info.name, []), rounding, seed) for info in base.tensors.values()]
    return Plan(tensors, [])


def _plan_tensor(info: TensorInfo, pairs: list[LoraPair], rounding: str, seed: int) -> TensorPlan:
    target = TensorSpec(info.name, info.type, info.shape)
    if not pairs:
        return TensorPlan(info, target)
    quant = quant_of(info.type.name)
    return TensorPlan(info, target, pairs, Recipe(quant, quant, rounding, tensor_key(seed, info.name)))


def _check(base: GgufReader, wanted: dict[str, list[LoraPair]]) -> None:
    misfits, unsupported, numbers = [], [], []
    for name, pairs in wanted.items():
        info = base.tensors.get(name)
        if info is None:
            misfits.append(f"{name}: the base has no such tensor")
            continue
        if quant_of(info.type.name) is None:
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
