"""Match the adapters' updates with the base's tensors, choose types, and find everything that can be wrong."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_gguf.adapters.lora import EMBEDDING, HEAD, LoraPair
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import MismatchError, NumericError, UnsupportedError, UsageError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.mapping.accounts import Placement
from lora_gguf.merging.growth import grown
from lora_gguf.merging.identity import first_row_sha256, merge_identity
from lora_gguf.merging.new_tokens import with_one_vocabulary
from lora_gguf.merging.options import Policy
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.merging.types import with_types
from lora_gguf.quants.ggml import FILE_TYPES
from lora_gguf.quants.mixes import file_type_of
from lora_gguf.quants.table import CODECS

LARGEST_SCALE = 1e30
_ONE_BY_ONE = "merge one, then the other into the result"


@dataclass
class Plan:
    """All tensors in order, warnings, and the raw ``key_values`` that take the place of the base's.

    ``mix`` is the one that all types are of, ``promoted`` are the tensors whose type grew out of their mix.
    """

    tensors: list[TensorPlan]
    warnings: list[str]
    key_values: dict[str, bytes] = field(default_factory=dict)
    mix: str | None = None
    promoted: frozenset[str] = frozenset()

    @property
    def merged(self) -> list[TensorPlan]:
        """The tensors that the adapter changes."""
        return [tensor for tensor in self.tensors if tensor.changes]

    def file_type(self, before: int | None) -> int:
        """Return ``general.file_type`` of the file, ``before`` that of the base."""
        if self.mix:
            return FILE_TYPES[self.mix]
        body = [tensor for tensor in self.tensors if tensor.target.name not in {EMBEDDING, HEAD, *self.promoted}]
        if before in FILE_TYPES.values() and all(tensor.target.type == tensor.source.type for tensor in body):
            return int(before or 0)
        weights: dict[str, int] = {}
        for tensor in body or self.tensors:
            weights[tensor.target.type.name] = weights.get(tensor.target.type.name, 0) + tensor.target.n_elements
        return file_type_of(weights, before)


def make_plan(base: Base, placements: Iterable[tuple[Placement, float]], policy: Policy) -> Plan:
    """Decide what happens to each tensor of ``base``; each placement comes with the factor that multiplies its scale.

    Raises ``MismatchError``, ``NumericError`` or ``UnsupportedError`` with all offenders listed.
    """
    placements = with_one_vocabulary(base, list(placements))
    if strange := [scale for _, scale in placements if not math.isfinite(scale) or abs(scale) > LARGEST_SCALE]:
        raise UsageError(f"scale: expected a finite number up to {LARGEST_SCALE:.0e}, found {strange[0]}")
    tensors = adapted(base, placements)
    _check(base, tensors)
    if policy.imatrix:
        policy.imatrix.check(base.tensors.values())
    typed = with_types(base, tensors, policy)
    tensors = grown(typed, base, policy)
    promoted = frozenset(
        after.target.name
        for before, after in zip(typed, tensors, strict=True)
        if before.target.type != after.target.type
    )
    warnings = [warning for placement, _ in placements for warning in placement.warnings]
    if any(placement.untied for placement, _ in placements):
        head = next(tensor.target for tensor in tensors if tensor.target.name == HEAD)
        size = f"{head.n_bytes / 1e6:.1f} MB, {head.type}"
        warnings.append(
            f"{HEAD}: the adapter's head is no longer the embedding: it gets a tensor of its own ({size}); see --tied"
        )
    return Plan(tensors, warnings, _vocabulary(placements, base.label), policy.mix, promoted)


def adapted(base: Base, placements: Sequence[tuple[Placement, float]]) -> list[TensorPlan]:
    """Return the tensors of ``base``, in order, with all that the adapters add to each, still without a recipe."""
    sources = dict(base.tensors)
    if any(placement.untied for placement, _ in placements):
        sources[HEAD] = sources[EMBEDDING]
    pairs: dict[str, list[LoraPair]] = defaultdict(list)
    updates: dict[str, list[tuple[Update, float]]] = defaultdict(list)
    new_rows: dict[str, np.ndarray] = {}
    for placement, scale in placements:
        for pair in placement.pairs:
            for name in _targets(pair.name, placement, HEAD in sources):
                pairs[name].append(replace(pair, name=name, scale=pair.scale * scale))
        for update in placement.updates:
            for name in _targets(update.name, placement, HEAD in sources) if update.n_rows else ():
                updates[name].append((update, scale))
        for embedding, new in placement.new_rows.items():
            for name in _targets(embedding, placement, HEAD in sources):
                if name in new_rows:
                    raise MismatchError(f"{base.label}: {name}: two adapters add tokens: {_ONE_BY_ONE}")
                new_rows[name] = new
    what = merge_identity(base, [placement for placement, _ in placements])
    tensors = [
        TensorPlan(source, _target(name, source, new_rows.get(name)), pairs[name], updates[name], new_rows.get(name))
        for name, source in sources.items()
    ]
    return [
        replace(tensor, identity=f"{what}/{first_row_sha256(base, tensor.source)}") if tensor.changes else tensor
        for tensor in tensors
    ]


def _target(name: str, source: TensorInfo, new_rows: np.ndarray | None) -> TensorInfo:
    """Return a tensor as it is written: of the base's type, with its new rows."""
    shape = source.shape if new_rows is None else (source.shape[0] + len(new_rows), source.shape[1])
    return TensorInfo(name, source.type, shape, 0)


def _targets(name: str, placement: Placement, has_head: bool) -> tuple[str, ...]:
    """The tensors that an update of ``name`` changes. An embedding that is the head too (tied) is two of them where
    another adapter of this merge parts them.
    """
    return (name, HEAD) if name == EMBEDDING and has_head and placement.tied else (name,)


def _vocabulary(placements: list[tuple[Placement, float]], label: str) -> dict[str, bytes]:
    """The key/value pairs of the one vocabulary that the adapters ask for."""
    found = [placement.key_values for placement, _ in placements if placement.key_values]
    if any(other != found[0] for other in found[1:]):
        raise MismatchError(f"{label}: two adapters change its tokens, each in its own way: {_ONE_BY_ONE}")
    return found[0] if found else {}


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
            if not np.isfinite(pair.scale):
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
