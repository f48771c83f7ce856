"""What verification says of one tensor, whether that is right, and how a finding is told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lora_gguf.checks.comparison import Comparison
from lora_gguf.errors import MismatchError
from lora_gguf.merging.retention import kind_of, layer_of

CAUSES = {
    "other base": "it was merged from another base model",
    "not merged": "the merged file is the base: the adapter was never added",
    "sign": "the update was subtracted: is the scale's sign right?",
    "scale": "it was merged with another scale",
    "other adapter": "it was merged with another adapter",
    "row order": "the rotary permutation of the rows was left out or done twice: merge again with another tool",
    "other tensor": "the update of one tensor was added to another: merge again",
    "transposed": "the update was added transposed: merge again",
    "skipped": "the merge left this tensor out",
    "rounded away": "rounding erased the update here: merge again with --rounding auto",
    "changed": "no adapter touches it: it was changed afterwards, or the base is another one",
    "damaged": "the data are damaged: merge or download it again",
    "shape": "the file lacks a tensor of the base, or has one more: it is of another model",
    "metadata": "the base is another one, or the metadata were edited",
}


@dataclass
class Check:
    """One tensor: ``touched`` by an adapter or not; how many of its bytes differ from the base's; its comparison.

    ``reproduced`` says that it holds because the same merge gives the same bytes. ``step`` is the rms step of its type.
    """

    name: str
    base_type: str
    type: str
    touched: bool
    n_different: int = 0
    comparison: Comparison = field(default_factory=Comparison)
    holds: bool = True
    reproduced: bool = False
    step: float = float("nan")

    @property
    def identical(self) -> bool:
        return self.n_different == 0

    def as_dict(self) -> dict:
        found = self.comparison
        return {
            "name": self.name, "layer": layer_of(self.name), "kind": kind_of(self.name),
            "type": self.type, "base_type": self.base_type, "holds": self.holds, "weights": found.n_weights,
            "kept": found.kept, "kept_expected": found.nearest if nearest_only(self) else found.dithered,
            "standard_error": found.standard_error, "noise": found.noise, "noise_expected": found.expected_noise,
            "delta_norm": found.delta_norm, "delta_per_step": found.delta_rms / self.step if self.step > 0 else math.nan,
            "correlation": found.correlation, "beyond_a_step": found.beyond, "identical": self.identical,
            "reproduced": self.reproduced,
        }  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something wrong: ``cause`` is a key of ``CAUSES``; ``tensors`` are those concerned, none for the whole file."""

    cause: str
    tensors: tuple[str, ...]
    expected: str
    found: str

    def __str__(self) -> str:
        names = self.tensors
        where = (
            f"{len(names)} tensors, such as {names[0]}: " if len(names) > 1 else "".join(f"{name}: " for name in names)
        )
        return f"{where}expected {self.expected}, found {self.found}: {CAUSES[self.cause]}"

    def as_dict(self) -> dict:
        return {
            "cause": self.cause, "tensors": list(self.tensors), "expected": self.expected, "found": self.found,
            "text": str(self),
        }  # fmt: skip


def nearest_only(check: Check) -> bool:
    return check.comparison.is_nearest and not check.comparison.is_dithered


def rounded_to_nearest(adapted: Sequence[Check]) -> bool:
    """Whether the file was rounded to nearest, rather than dithered: what most tensors say that tell the two apart."""
    found = [check.comparison for check in adapted]
    votes = Counter(sums.is_nearest for sums in found if sums.is_nearest != sums.is_dithered)
    return votes[True] > votes[False]


def adapted_holds(check: Check, nearest: bool) -> bool:
    """Whether a tensor holds base + update within its type's rounding, in a file ``nearest`` or dithered as a whole."""
    found = check.comparison
    if not found.is_finite or found.is_damaged:
        return False
    if not found.gridded:
        return found.likeness > 0.9 and found.kept > -found.slack
    kept_enough = nearest or check.type != check.base_type or found.kept > 0.5
    return found.is_dithered or found.is_auto or (found.is_nearest and kept_enough)


def is_requantized(check: Check) -> bool:
    """Whether an untouched tensor is the base's in another type, each weight at a neighbour on the new grid."""
    found = check.comparison
    if check.type == check.base_type or not found.is_finite:
        return False
    return not found.is_damaged if found.gridded else found.likeness > 0.9


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """The findings with one for all tensors of a cause; what was found is told of the first."""
    groups: dict[object, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.cause if finding.tensors else finding, []).append(finding)
    return [replace(group[0], tensors=sum((one.tensors for one in group), ())) for group in groups.values()]


def as_error(label: str, findings: Sequence[Finding]) -> MismatchError:
    """The findings as the one line of an error, the others as its details."""
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return MismatchError(f"{label}: {findings[0]}{more}", [str(finding) for finding in findings[1:]])
