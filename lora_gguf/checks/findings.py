"""What verification says of one tensor, whether that is right, and how a finding is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lora_gguf.checks.comparison import NOISIER, Comparison
from lora_gguf.checks.remade import Remade
from lora_gguf.checks.sums import ACHIEVED2, ALLOWED_NOISE2, UPDATE2, VARIANCE
from lora_gguf.errors import MismatchError, UnprovedError
from lora_gguf.merging.retention import FAINT, chance, kind_of, layer_of

CAUSES = {
    "other base": "it was merged from another base model",
    "not merged": "the merged file is the base: the adapter was never added",
    "sign": "the update was subtracted: is the scale's sign right?",
    "scale": "it was merged with another scale",
    "other adapter": "it was merged with another adapter",
    "more adapters": "name all that is in it, each with --lora",
    "fewer adapters": "it was merged without one of the adapters that you name",
    "row order": "the rotary permutation of the rows was left out or done twice: merge again with another tool",
    "other tensor": "the update of one tensor was added to another: merge again",
    "transposed": "the update was added transposed: merge again",
    "skipped": "the merge left this tensor out",
    "rows left out": "the merge left these rows out: merge again",
    "unquantized": "it was made of the model before it was quantized: give that one as --base",
    "rounded away": "rounding erased the update here: merge again with --rounding auto",
    "changed": "no adapter touches it: it was changed afterwards, or the base is another one",
    "damaged": "the data are damaged: merge or download it again",
    "shape": "the file lacks a tensor of the base, or has one more: it is of another model",
    "metadata": "the base is another one, or the metadata were edited",
}


@dataclass
class Check:
    """One tensor: ``touched`` by an adapter or not; how many of its bytes differ from the base's; its comparison, and
    that of each matrix (expert).

    ``proved`` says that its bytes are those that a merge gives: the same one made again, of whose bytes ``n_wrong``
    differ, or another tool's, of whose blocks ``n_unexplained`` are none that it gives. ``n_odd`` slices of rows hold
    what no rounding leaves, ``n_erased`` surely not the update: ``n_bare`` of ``n_rows`` rows are in these, which
    ``bare`` compares, ``rest`` the others. ``step`` is the rms step of its type.
    """

    name: str
    base_type: str
    type: str
    touched: bool
    n_different: int = 0
    comparison: Comparison = field(default_factory=Comparison)
    matrices: dict[int, Comparison] = field(default_factory=dict)
    holds: bool = True
    proved: bool = False
    n_wrong: int = 0
    n_unexplained: int = 0
    n_odd: int = 0
    n_erased: int = 0
    n_bare: int = 0
    n_rows: int = 0
    bare: Comparison = field(default_factory=Comparison)
    rest: Comparison = field(default_factory=Comparison)
    step: float = math.nan

    @property
    def identical(self) -> bool:
        return self.n_different == 0

    @property
    def lacks_rows(self) -> bool:
        """Whether some rows are as in the base, within rounding, and nothing speaks against the others."""
        rest_holds = self.rest.sums[UPDATE2] > 0 and not (self.rest.is_off or self.rest.is_damaged)
        bare = self.bare
        unchanged = abs(bare.kept) <= bare.slack and bare.sums[ACHIEVED2] <= NOISIER * bare.sums[ALLOWED_NOISE2]
        return self.n_bare > 0 and rest_holds and bool(unchanged)

    @property
    def is_faint(self) -> bool:
        """Whether less than half of the update is there, by more than chance."""
        found = self.comparison
        if not self.touched or not found.sums[UPDATE2] > 0:
            return False
        measured = not math.isnan(found.sums[VARIANCE])
        return found.kept + (0.0 if measured else chance(found.noise, found.n_weights)) < FAINT

    def add_made(self, made: Remade) -> None:
        """Add a chunk that was made again, and what the merge itself counts of it."""
        self.n_wrong += made.n_wrong
        self.n_different += made.n_different
        if made.sums is not None and self.touched:
            self.comparison += Comparison.of_merge(made.n_weights, made.sums)

    def as_dict(self) -> dict:
        """Return the check as plain data for JSON."""
        found = self.comparison
        return {
            "name": self.name, "layer": layer_of(self.name), "kind": kind_of(self.name),
            "type": self.type, "base_type": self.base_type, "holds": self.holds, "proved": self.proved,
            "weights": found.n_weights, "kept": found.kept,
            "kept_expected": found.nearest if nearest_only(self) else found.dithered,
            "standard_error": found.standard_error, "noise": found.noise, "noise_expected": found.expected_noise,
            "delta_norm": found.delta_norm,
            "delta_per_step": found.delta_rms / self.step if self.step > 0 else math.nan,
            "correlation": found.correlation, "beyond_a_step": found.beyond, "identical": self.identical,
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
    """Tell whether the tensor holds what rounding to nearest leaves, and not what dithering does."""
    return check.comparison.is_nearest and not check.comparison.is_dithered


def tells_dither(checks: Iterable[Check]) -> bool:
    """Tell whether a tensor holds what only chance puts there: then the file was dithered, and none may be less."""
    return any(check.touched and check.comparison.tells_dither for check in checks)


def adapted_holds(check: Check, dithered: bool) -> bool:
    """Tell whether nothing speaks against base + update in a tensor, of a file that was surely ``dithered`` or not."""
    if check.proved and not (dithered and check.comparison.is_erased):
        return True
    parts = [check.comparison, *check.matrices.values()]
    if not all(part.is_finite and not part.is_damaged and not part.is_off for part in parts) or check.n_odd:
        return False
    return not (dithered and (check.n_erased or any(part.is_erased for part in parts)))


def untouched_holds(check: Check) -> bool:
    """Tell whether a tensor that no adapter touches is the base's, or the base's in another type."""
    found = check.comparison
    if check.identical or check.proved:
        return True
    return check.type != check.base_type and found.is_finite and not found.is_damaged and not check.n_odd


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings with one for all tensors of a cause; what was found is told of the first."""
    groups: dict[object, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.cause if finding.tensors else finding, []).append(finding)
    return [replace(group[0], tensors=sum((one.tensors for one in group), ())) for group in groups.values()]


def as_error(label: str, findings: Sequence[Finding]) -> MismatchError:
    """Return the findings as the one line of an error, the others as its details."""
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return MismatchError(f"{label}: {findings[0]}{more}", [str(finding) for finding in findings[1:]])


def as_doubt(label: str, missing: Sequence[str]) -> UnprovedError:
    """Return what is missing of a proof as the one line of an error, the rest as its details."""
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return UnprovedError(f"{label}: cannot be proved: {missing[0]}{more}", missing[1:])
