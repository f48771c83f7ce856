"""What a merge kept of the update, judged: nothing at all, too little of it, too little of one kind of tensor; and what
would keep more.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lora_gguf.adapters.adapter import adapter_name
from lora_gguf.errors import NumericError
from lora_gguf.files.base import Base
from lora_gguf.mapping.accounts import Placement
from lora_gguf.merging.forecast import expected, rows_each
from lora_gguf.merging.loss import BAD_LOSS, GOOD_LOSS, loss_text
from lora_gguf.merging.options import Policy
from lora_gguf.merging.plan import Plan
from lora_gguf.merging.retention import WARN_BELOW, Retention, kind_of, total
from lora_gguf.merging.tensor import SPREADS, TensorPlan
from lora_gguf.merging.types import with_types

ZERO = "its update is zero, or next to it: are its lora_B, its lora_alpha and the scale right?"
NOTHING = f"nothing changes: {ZERO.replace('its update', 'the update', 1)}"
# what to do where little is kept, from the cheapest on
REMEDIES = {"--rounding auto": {"rounding": "auto"}, "--type Q8_0": {"type": "Q8_0"}, "--type BF16": {"type": "BF16"}}
MIX_REMEDIES = {f"--quantize {mix}": {"mix": mix} for mix in ("Q6_K", "Q8_0", "BF16")}
GOOD, TOO_MUCH = 0.9, 1.25  # of an adapter kept
SURE = 2  # standard errors
NOISY = 0.1  # what the rounding's random numbers may add to what is kept, where a way is to be recommended

Kinds = Mapping[tuple[str, str, str], Sequence[Retention]]


def idle(
    adapters: Sequence[tuple[str | os.PathLike, float]], placements: Iterable[tuple[Placement, float]]
) -> list[str]:
    """Return a warning for each of the adapters that changes nothing."""
    return [
        f"{adapter_name(path)} at scale {factor:g} changes nothing: {ZERO}"
        for (path, factor), (placement, _) in zip(adapters, placements, strict=True)
        if placement.is_idle(factor)
    ]


def judged(kinds: Kinds, plan: Plan, model: Base, policy: Policy) -> list[str]:
    """Return warnings on what was kept, ``kinds`` as ``MergeReport.by_kind`` gives it.

    Raises ``NumericError`` where less of the whole was kept than the policy asks for, with the change of the command
    that keeps as much.
    """
    minimum = policy.min_retention
    whole = total(part for parts in kinds.values() for part in parts)
    if not whole.n_weights:
        return []
    if whole.is_nothing:
        if minimum > 0:
            raise NumericError(f"{NOTHING} There is nothing to keep, and --min-retention is {minimum:g}")
        return [] if any(ZERO in warning for warning in plan.warnings) else [NOTHING]
    if whole.kept < minimum:
        found = remedy(plan, model, policy, minimum, by_kind=False)
        raise NumericError(f"kept {whole.kept:.3f} of the adapter, --min-retention is {minimum:g}: {found}")
    if whole.kept < WARN_BELOW:
        return [f"only {whole.kept:.2f} of the adapter was kept: {remedy(plan, model, policy, WARN_BELOW)}"]
    if poor := poorly_kept(kinds):
        return [
            f"only {listed(poor)} was kept, and {whole.kept:.2f} of the whole: "
            f"{remedy(plan, model, policy, WARN_BELOW)}"
        ]
    return []


def sentence(whole: Retention, policy: Policy) -> str:
    """Return what a person wants to know of what a merge kept: how much, and whether that is good; nothing where
    nothing was measured. Where it is poor, the warning of ``judged`` says what keeps more.
    """
    if not whole.n_weights:
        return ""
    if whole.is_nothing:
        return "the adapter changes nothing, so there is nothing to keep"
    loss = whole.expected_loss
    lost = "" if loss is None else f", {loss_text(loss)} of its effect lost"
    share = f"{whole.kept:.0%} of the fine-tune is kept{lost}"
    if whole.kept > TOO_MUCH:
        return f"{share}: too strong: is the scale right?"
    word = judgement(whole.kept, loss)
    if word == "good" or whole.kept < WARN_BELOW:
        return f"{share}: {word}"
    larger = policy.rounding in SPREADS and policy.rounding != "nearest"
    option = "--type Q8_0 loses less, in a larger file" if larger else "--rounding auto loses less"
    return f"{share}: {word}; {option}"


def judgement(kept: float, loss: float | None) -> str:
    """Return whether a merge that keeps and loses so much is good, fair or poor."""
    if kept < WARN_BELOW or (loss or 0.0) > BAD_LOSS:
        return "poor"
    return "good" if kept >= GOOD and (loss or 0.0) <= GOOD_LOSS else "fair"


def poorly_kept(kinds: Kinds) -> dict[str, float]:
    """Return the kinds of tensor of whose update little was kept, with the share, the least first."""
    found = {f"{kind} ({after})": total(parts) for (kind, _, after), parts in kinds.items()}
    poor = {name: part.kept for name, part in found.items() if part.kept + SURE * error_of(part) < WARN_BELOW}
    return dict(sorted(poor.items(), key=lambda item: item[1]))


def listed(poor: Mapping[str, float]) -> str:
    return ", ".join(f"{kept:.2f} of the update of {name}" for name, kept in list(poor.items())[:5])


def error_of(part: Retention, n_weights: int | None = None) -> float:
    """Return the standard error of what was kept that random rounding leaves, of ``n_weights`` weights."""
    return part.noise / math.sqrt(max(n_weights or part.n_weights, 1))


def remedy(plan: Plan, model: Base, policy: Policy, goal: float, by_kind: bool = True) -> str:
    """Return the smallest change of the command that keeps ``goal``, with what a sample of rows says that it keeps.

    ``by_kind``: of each kind of tensor, not only of the whole. Where none does, that is said, with the best there is.
    """
    best = ("", 0.0)
    for option, other in alternatives(policy):
        tensors = with_types(model, plan.tensors, other)
        merged = [tensor for tensor in tensors if tensor.changes]
        found = expected(model, merged)
        whole = surely(merged, found)
        if min([whole, *(surely(group, found) for group in grouped(merged) if by_kind)]) >= goal:
            return f"{option} would keep about {total(found.values()).kept:.2f} of it {growth(plan, tensors, model)}"
        best = max(best, (option, whole), key=lambda item: item[1])
    if best[1] >= goal:
        return f"no other rounding or type keeps all of them; {best[0]} keeps about {best[1]:.2f} of the whole"
    reached = f": {best[0]} keeps about {best[1]:.2f}" if best[1] >= WARN_BELOW else ": is the scale right?"
    return f"no other rounding or type keeps {goal:g}{reached}"


def alternatives(policy: Policy) -> Iterator[tuple[str, Policy]]:
    """Return other ways to merge, as what to write and the policy; none that is the policy itself."""
    if policy.type:
        yield "leaving out --type", replace(policy, type=None)
    for option, change in (MIX_REMEDIES if policy.mix else REMEDIES).items():
        other = replace(policy, **change)  # type: ignore[arg-type]
        if other != policy:
            yield option, other


def grouped(tensors: Iterable[TensorPlan]) -> list[list[TensorPlan]]:
    """Group the tensors by kind."""
    groups: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        groups.setdefault(kind_of(tensor.target.name), []).append(tensor)
    return list(groups.values())


def surely(tensors: Sequence[TensorPlan], found: Mapping[str, Retention]) -> float:
    """Tell what a sample of ``tensors`` says that is kept of their updates at least; 0 where it cannot tell."""
    part, n_rows = total(found[tensor.target.name] for tensor in tensors), rows_each(tensors)
    n_weights = sum(min(n_rows, tensor.source.n_rows) * tensor.source.n_cols for tensor in tensors)
    error = SURE * error_of(part, n_weights)
    return part.kept - error if error <= NOISY else 0.0


def growth(plan: Plan, tensors: Iterable[TensorPlan], model: Base) -> str:
    """Tell how large the file becomes with the types of ``tensors``."""
    now, then = (sum(tensor.target.n_bytes for tensor in found) for found in (plan.tensors, tensors))
    return "at the same size" if now == then else f"in a file {then / model.n_bytes:.2f} times the base's size"
