"""What a file that fails verification holds instead: the causes, tried from the plainest to the most particular."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_gguf.checks.comparison import ALLOWED, Comparison
from lora_gguf.checks.findings import Check, Finding, nearest_only
from lora_gguf.checks.sums import ASTRAY, BEYOND, UPDATE2
from lora_gguf.files.base import Base
from lora_gguf.merging.chunks import Changed, cut, update_of, whole
from lora_gguf.merging.plan import Plan
from lora_gguf.merging.retention import LOG_ODDS, kind_of
from lora_gguf.merging.steps import rms, stored_step
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.quants.table import CODECS

# how many tensors are read again to find out what they hold
N_EXAMPLES = 12
# what is between a base and its original is a step over the root of 12; once the latter is quantized nothing of it is
# left, but that bf16 moves some weights to the next code; of other errors all is left
LEAST_APART, NEARER = 0.22, 0.9
NEARLY = 0.25  # so far from 1 may what is kept of the update be: noise of a step hides it


@dataclass
class Evidence:
    """The open files, what the adapters change, the plan of the merge and, of several adapters, those of each alone."""

    model: Base
    result: Base
    plan: Plan
    adapters: list[str]
    parts: list[Plan] = field(default_factory=list)


def causes(evidence: Evidence, checks: Sequence[Check], others: Sequence[Finding]) -> list[Finding]:
    """Return all that is wrong, the plainest explanation of each; ``holds`` of each check says which tensors are right.

    ``others`` are what is wrong beside the tensors.
    """
    adapted, untouched = [c for c in checks if c.touched], [c for c in checks if not c.touched]
    findings = shape_findings(evidence)
    if finding := other_base(evidence, adapted, untouched):
        return [finding, *findings]
    findings += [*others, *(changed_finding(check) for check in untouched if not check.holds)]
    if is_unmerged(evidence, adapted):
        return [not_merged(adapted), *findings]
    broken = [check for check in adapted if not check.holds and not check.comparison.is_finite]
    findings += [Finding("damaged", (check.name,), "numbers", "NaN or infinity") for check in broken]
    return explain(evidence, [check for check in adapted if check not in broken]) + findings


def is_unmerged(evidence: Evidence, adapted: Sequence[Check]) -> bool:
    """Tell whether the adapted tensors, or the whole file, are the base's bytes though the update asks for more."""
    if not all(check.identical for check in adapted) or not any(
        check.comparison.sums[UPDATE2] > 0 for check in adapted
    ):
        return False
    return not all(check.holds for check in adapted) or is_base(evidence)


def is_base(evidence: Evidence) -> bool:
    """Tell whether the merged file has the base's own header."""
    heads = [
        [reader.source.read(0, min(reader.data_position, reader.size)) for reader in base.readers]
        for base in (evidence.model, evidence.result)
    ]
    return heads[0] == heads[1]


def shape_findings(evidence: Evidence) -> list[Finding]:
    """Return the tensors that only one of the two files has, or in another shape."""
    expected = {tensor.target.name: tensor.target.shape for tensor in evidence.plan.tensors}
    found = {name: info.shape for name, info in evidence.result.tensors.items()}
    findings = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            findings.append(
                Finding("shape", (name,), str(expected.get(name, "no such tensor")), str(found.get(name, "none")))
            )
    return findings


def other_base(evidence: Evidence, adapted: Sequence[Check], untouched: Sequence[Check]) -> Finding | None:
    """Return the file of another base: most of what should be as it was is not, or the weights are nothing like the
    base's.
    """
    changed = [check for check in untouched if not check.holds]
    if evidence.model.architecture != evidence.result.architecture or not (adapted or untouched):
        return Finding(
            "other base", (), evidence.model.architecture or "a model", evidence.result.architecture or "another one"
        )
    far = [check for check in adapted if check.comparison.is_finite and check.comparison.likeness < 0.5]
    unlike = len(far) > len(adapted) / 2 and not any(check.identical for check in adapted)
    if len(changed) > max(2, len(untouched) / 2) or (unlike and len(changed) >= len(untouched) / 2):
        found = f"{len(changed)} of {len(untouched)} changed"
        if unlike:
            found += (
                f", and weights of which {far[0].name} correlates by {far[0].comparison.likeness:.2f} with the base's"
            )
        return Finding("other base", (), "tensors that the adapter does not touch as in the base", found)
    return None


def changed_finding(check: Check) -> Finding:
    if check.type != check.base_type:
        return Finding("changed", (check.name,), f"the base's weights ({check.base_type})", f"others ({check.type})")
    return Finding("changed", (check.name,), "the base's bytes", f"{check.n_different} bytes that differ")


def not_merged(adapted: Sequence[Check]) -> Finding:
    n = len(adapted)
    for check in adapted:
        check.holds = False
    names = (adapted[0].name,) if n == 1 else ()
    return Finding(
        "not merged", names, "the update in it", f"all {n} adapted tensors as in the base, byte for byte: kept 0.00"
    )


def explain(evidence: Evidence, adapted: Sequence[Check]) -> list[Finding]:
    """Return the causes of the adapted tensors that don't hold; one for all of them where it explains them."""
    failing = [check for check in adapted if not check.holds]
    if failing and (finding := unquantized(evidence, failing)):
        return [finding]
    if not failing and (all(check.proved for check in adapted) or holds_as_a_whole(adapted)):
        return []
    findings, left = misplaced(evidence, failing)
    bare = [check for check in left if check.lacks_rows]
    if 2 * len(bare) >= len(failing):
        bare = [check for check in left if check.n_bare]
    findings += [rows_left_out(check) for check in bare]
    left = [check for check in left if check not in bare]
    if left or not failing:
        held = [check for check in adapted if check in left or check.holds]
        finding = by_adapter(evidence, left) if evidence.parts else common_scale(held)
        if finding:
            return [*findings, finding]
    return findings + [single_cause(check) for check in left]


def holds_as_a_whole(adapted: Sequence[Check]) -> bool:
    """Tell whether the tensors together, too small to tell each on its own, hold the update."""
    whole = sum((check.comparison for check in adapted), Comparison())
    return not adapted or not whole.is_off


def single_cause(check: Check) -> Finding:
    """Return the cause of one tensor that does not hold, by its sums alone."""
    found, name = check.comparison, (check.name,)
    kept = f"kept {found.kept:.2f}"
    if check.identical:
        return Finding("skipped", name, "the update in it", f"the base's bytes: {kept}")
    if check.base_type == check.type and nearest_only(check) and not found.is_damaged:
        return Finding("rounded away", name, f"kept {found.dithered:.2f} as in the other tensors", kept)
    if found.is_off and (found.is_scaled or not found.is_damaged):
        return scale_finding(name, found.kept / found.dithered, found.slack)
    if check.n_wrong:
        return Finding("damaged", name, "the bytes that the merge gives", f"{check.n_wrong} bytes that differ")
    n_away = found.sums[BEYOND] + found.sums[ASTRAY]
    place = f"{n_away:.0f} weights more than a step away, {check.n_odd} slices of rows unlike it"
    return Finding("damaged", name, "weights within a step of base + update", place)


def rows_left_out(check: Check) -> Finding:
    """Return the finding of a tensor that lacks the update in some rows."""
    return Finding(
        "rows left out",
        (check.name,),
        "the update in all its rows",
        f"about {check.n_bare} of {check.n_rows} rows without it",
    )


def unquantized(evidence: Evidence, failing: Sequence[Check]) -> Finding | None:
    """Return the finding of floats that were made of the model before it was quantized: without the update, they are
    what the base's types round to the base's weights.
    """
    told = [
        check
        for check in failing
        if check.comparison.half
        and CODECS[check.base_type].type.block_size > 1
        and abs(check.comparison.kept - 1) < NEARLY
    ]
    if len(told) < len(failing) or not all(rounds_to_base(evidence, check.name) for check in told[:N_EXAMPLES]):
        return None
    found = "weights that the base's type rounds to the base's"
    return Finding("unquantized", tuple(check.name for check in told), "base + update", found)


def rounds_to_base(evidence: Evidence, name: str) -> bool:
    """Tell whether the first rows of a tensor, less their update, come nearer to the base's when they are quantized."""
    tensor = tensor_of(evidence.plan, name)
    source, target = tensor.source, evidence.result.tensors[name]
    chunk = next(changed(tensor), None)
    if chunk is None or not tensor.recipe:
        return False
    stored = evidence.model.reader_of(source.name).read(source, chunk.first, chunk.n_rows)
    after = CODECS[target.type.name].decoded(evidence.result.reader_of(name).read(target, chunk.first, chunk.n_rows))
    codec = CODECS[source.type.name]
    before, unmerged = codec.decoded(stored), after - update_of(chunk, stored)
    importance = np.ones(unmerged.shape[1] if codec.needs_importance else 0, np.float32)
    away, apart = rms(codec.decoded(codec.encoded(unmerged, importance)) - before), rms(unmerged - before)
    return apart > LEAST_APART * stored_step(evidence.model, source) and away < NEARER * apart


def scale_finding(names: tuple[str, ...], factor: float, error: float) -> Finding:
    """Return the finding of tensors that hold ``factor`` times the update, give or take ``error``."""
    found = f"{factor:.2f} times it"
    if abs(factor) <= max(error, 2 * ALLOWED):
        return Finding("other adapter", names, "the adapter's update", f"changes unlike it: kept {factor:.2f}")
    return Finding("sign" if abs(factor + 1) <= max(error, 0.1) else "scale", names, "the adapter's update", found)


def common_scale(adapted: Sequence[Check]) -> Finding | None:
    """Return the factor that explains all of ``adapted``, if there is one and it isn't 1."""
    told = [check.comparison for check in adapted if check.comparison.gridded and check.comparison.standard_error >= 0]
    errors = [max(found.standard_error, ALLOWED / 3) for found in told]
    weights = [(found.dithered / error) ** 2 for found, error in zip(told, errors, strict=False)]
    if not weights or not sum(weights):
        return None
    factor = sum(w * found.kept / found.dithered for w, found in zip(weights, told, strict=False)) / sum(weights)
    wide = max(1.0, abs(factor))
    if any(abs(found.kept - factor * found.dithered) > wide * found.slack for found in told):
        return None
    error = math.sqrt(2 * LOG_ODDS / sum(weights)) * math.sqrt(wide)
    if abs(factor - 1) <= error:
        return None
    names = tuple(check.name for check in adapted if not check.identical)
    return scale_finding(names, factor, error)


def by_adapter(evidence: Evidence, failing: Sequence[Check]) -> Finding | None:
    """Tell how much of each adapter the ``failing`` tensors hold: those that hold another share than 1."""
    n = len(evidence.parts)
    gram, projections, achieved2, n_weights = np.zeros((n, n)), np.zeros(n), 0.0, 0
    chosen = failing[:N_EXAMPLES] or [
        Check(tensor.target.name, "", "", True) for tensor in evidence.plan.merged[:N_EXAMPLES]
    ]
    for check in chosen:
        alone = [tensor_of(plan, check.name) for plan in evidence.parts]
        more = project(evidence, alone)
        gram, projections = gram + more[0], projections + more[1]
        achieved2, n_weights = achieved2 + more[2], n_weights + more[3]
    present = np.flatnonzero(np.diag(gram) > 0)
    if not len(present):
        return None
    inverse = np.linalg.pinv(gram[np.ix_(present, present)])
    factors = inverse @ projections[present]
    rest = max(float(achieved2 - factors @ projections[present]), 0.0) / max(n_weights, 1)
    clipped = 1 - min((check.comparison.dithered for check in failing), default=1.0)
    errors = np.sqrt(np.maximum(np.diag(inverse), 0) * rest * 2 * LOG_ODDS) + ALLOWED + clipped
    wrong = [i for i in range(len(present)) if abs(factors[i] - 1) > errors[i]]
    if not wrong:
        return None
    parts = [f"{factors[i]:.2f} times adapter {present[i] + 1} ({evidence.adapters[present[i]]})" for i in wrong]
    names = tuple(check.name for check in failing)
    signs = all(abs(factors[i] + 1) <= max(errors[i], 0.1) for i in wrong)
    return Finding("sign" if signs else "scale", names, "each adapter's update once", " and ".join(parts))


def tensor_of(plan: Plan, name: str) -> TensorPlan:
    return next(tensor for tensor in plan.tensors if tensor.target.name == name)


def project(evidence: Evidence, tensors: Sequence[TensorPlan]) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Tell what one tensor holds of the updates that ``tensors``, plans of it, would add.

    Returns Σ delta_i·delta_j (n, n), Σ delta_i·achieved (n,), Σ achieved², and the number of weights.
    """
    n = len(tensors)
    gram, projections, achieved2, n_weights = np.zeros((n, n)), np.zeros(n), 0.0, 0
    source = tensors[0].source
    target = evidence.result.tensors[tensors[0].target.name]
    recipe = next(tensor.recipe for tensor in tensors if tensor.recipe)
    for chunks in zip(*(changed(replace(tensor, recipe=recipe)) for tensor in tensors), strict=True):
        first, n_rows = chunks[0].first, chunks[0].n_rows
        stored = evidence.model.reader_of(source.name).read(source, first, n_rows)
        before, after = np.empty((2, n_rows, source.n_cols), np.float32)
        CODECS[source.type.name].decode(stored, before)
        CODECS[target.type.name].decode(evidence.result.reader_of(target.name).read(target, first, n_rows), after)
        deltas = np.empty((n, n_rows * source.n_cols))
        for delta, chunk in zip(deltas, chunks, strict=True):
            delta[:] = update_of(chunk, stored).ravel()
        achieved = (after.astype(np.float64) - before).ravel()
        gram += deltas @ deltas.T
        projections += deltas @ achieved
        achieved2 += float(achieved @ achieved)
        n_weights += achieved.size
    return gram, projections, achieved2, n_weights


def changed(tensor: TensorPlan) -> Iterator[Changed]:
    """Yield the chunks of a tensor's own rows."""
    return (chunk for chunk in cut([whole(tensor)]) if isinstance(chunk, Changed))


def misplaced(evidence: Evidence, failing: Sequence[Check]) -> tuple[list[Finding], list[Check]]:
    """Return the failing tensors that hold an update in the wrong place, by cause; and those left over.

    Only the first few of a kind are read again; what most of them show goes for the others.
    """
    shown: dict[str, list[str | None]] = {}
    for check in failing:
        kind = kind_of(check.name)
        if not check.identical and abs(check.comparison.kept) < 0.7 and len(shown.get(kind, ())) < 3:
            shown.setdefault(kind, []).append(wrong_place(evidence, check.name))
    cause_of = {kind: Counter(found).most_common(1)[0][0] for kind, found in shown.items()}
    groups: dict[str, list[str]] = {}
    left = []
    for check in failing:
        cause = None if check.identical else cause_of.get(kind_of(check.name))
        groups.setdefault(cause, []).append(check.name) if cause else left.append(check)
    wanted = {
        "row order": ("the update in the order of the GGUF's rows", "it in another order"),
        "transposed": ("the update", "it transposed"),
        "other tensor": ("the tensor's own update", "that of another tensor"),
    }
    return [Finding(cause, tuple(names), *wanted[cause]) for cause, names in groups.items()], left


def wrong_place(evidence: Evidence, name: str) -> str | None:
    """Tell which wrong placing of an update explains the tensor ``name``, or None."""
    tensor = tensor_of(evidence.plan, name)
    candidates = [(cause, other) for cause, make in PLACINGS for other in make(evidence, tensor)]
    if not candidates:
        return None
    gram, projections, achieved2, n_weights = project(evidence, [other for _, other in candidates])
    best = None
    for i, (cause, _) in enumerate(candidates):
        if gram[i, i] > 0:
            kept = projections[i] / gram[i, i]
            error = math.sqrt(2 * LOG_ODDS * achieved2 / max(n_weights, 1) / gram[i, i])
            if abs(kept - 1) <= error + 0.1 and kept > max(error, best[0] if best else 0):
                best = kept, cause
    return best[1] if best else None


def other_order(evidence: Evidence, tensor: TensorPlan) -> list[TensorPlan]:
    """Return the update of q or k with the rotary permutation of its rows undone, and done once more."""
    key = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(kind_of(tensor.target.name))
    heads = key and (evidence.model.hparam(key) or evidence.model.hparam("attention.head_count"))
    layer = tensor.target.name.split(".")[1]
    heads = heads[int(layer)] if isinstance(heads, list) and layer.isdigit() and int(layer) < len(heads) else heads
    n_rows = tensor.source.shape[0]
    if not isinstance(heads, int) or heads < 1 or n_rows % (2 * heads) or tensor.updates or not tensor.pairs:
        return []
    order = np.arange(n_rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return [
        with_pairs(tensor, lambda pair, rows=rows: replace(pair, b=pair.b[rows])) for rows in (np.argsort(order), order)
    ]


def turned(_evidence: Evidence, tensor: TensorPlan) -> list[TensorPlan]:
    """Return the update of a square matrix transposed."""
    shape = tensor.source.shape
    if len(shape) != 2 or shape[0] != shape[1] or tensor.updates or not tensor.pairs:
        return []
    return [
        with_pairs(
            tensor, lambda pair: replace(pair, a=np.ascontiguousarray(pair.b.T), b=np.ascontiguousarray(pair.a.T))
        )
    ]


def neighbouring(evidence: Evidence, tensor: TensorPlan) -> list[TensorPlan]:
    """Return the updates of the layer's other tensors of this shape, and of this kind in the next layers."""
    prefix, _, kind = tensor.target.name.removesuffix(".weight").rpartition(".")
    layer = prefix.rpartition(".")[2]
    near = [f"blk.{int(layer) + i}.{kind}.weight" for i in (-1, 1)] if layer.isdigit() else []
    return [
        replace(tensor, pairs=other.pairs, updates=other.updates)
        for other in evidence.plan.merged
        if other is not tensor
        and other.source.shape == tensor.source.shape
        and (other.target.name in near or other.target.name.startswith(f"{prefix}.blk" if not prefix else f"{prefix}."))
    ]


def with_pairs(tensor: TensorPlan, change: Callable) -> TensorPlan:
    return replace(tensor, pairs=[change(pair) for pair in tensor.pairs])


PLACINGS = (("row order", other_order), ("transposed", turned), ("other tensor", neighbouring))
