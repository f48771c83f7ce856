"""What ``doctor`` found, as data: remarks, what each way to merge would keep, what it costs."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field

from lora_gguf.checks.keeping import GOOD, judgement
from lora_gguf.checks.remarks import Remark
from lora_gguf.errors import LoraGgufError, printable
from lora_gguf.merging.loss import loss_text


@dataclass(frozen=True)
class Outlook:
    """One way to merge, under the ``name`` by which tensors list what they keep of it, and what is expected of it.

    ``kept`` is the share of the update that acts (1: all of it), ``expected_loss`` the share of its effect that is
    lost, within a factor of two (None: not known), ``noise`` what rounding adds relative to the update (rms),
    ``n_bytes`` the size of the file.
    """

    name: str
    options: str
    kept: float
    expected_loss: float | None
    noise: float
    n_bytes: int


@dataclass(frozen=True)
class TensorOutlook:
    """One tensor that the adapter changes; rms and norm are those of the update, ``step`` the rms distance of two
    values that the base's type can tell apart (None where it has no such steps). ``kept`` and ``noise`` are by the
    names of the outlooks.
    """

    name: str
    kind: str
    layer: int | None
    type: str
    shape: tuple[int, ...]
    rank: int
    delta_rms: float
    delta_norm: float
    step: float | None
    kept: dict[str, float]
    noise: dict[str, float]

    @property
    def delta_per_step(self) -> float | None:
        return self.delta_rms / self.step if self.step else None


@dataclass
class DoctorReport:
    """Whether a merge will work: ``refusal`` is the error with which it would end, None where it will work.

    ``inputs`` are the role (base, adapter) and path of what was read. Sizes are in bytes, ``seconds`` on this machine;
    they are None, and the lists empty, where it is refused.
    """

    base: str
    adapters: list[tuple[str, float]]
    inputs: list[tuple[str, str | os.PathLike[str]]] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    outlooks: list[Outlook] = field(default_factory=list)
    tensors: list[TensorOutlook] = field(default_factory=list)
    output_bytes: int | None = None
    free_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    recommendation: str = ""
    refusal: LoraGgufError | None = None

    @property
    def ok(self) -> bool:
        return self.refusal is None

    def outlook(self, name: str) -> Outlook:
        """Return that of ``auto`` (the default), ``dither``, ``nearest``, ``fresh``, ``Q8_0`` or ``BF16``; ``KeyError``
        where it would be the same as the default's.
        """
        return {found.name: found for found in self.outlooks}[name]

    def as_dict(self) -> dict:
        """Return the report as plain data for JSON."""
        error = self.refusal
        refusal = error and {
            "message": str(error), "details": [printable(line) for line in error.details], "exit_code": error.exit_code,
        }  # fmt: skip
        tensors = [{**asdict(tensor), "delta_per_step": tensor.delta_per_step} for tensor in self.tensors]
        fields = {
            name: value
            for name, value in vars(self).items()
            if name not in ("inputs", "refusal", "tensors", "remarks", "outlooks")
        }
        return {
            "ok": self.ok,
            **fields,
            "refusal": refusal,
            "remarks": [asdict(remark) for remark in self.remarks],
            "outlooks": [asdict(found) for found in self.outlooks],
            "tensors": tensors,
        }


def recommend(outlooks: list[Outlook]) -> str:
    """Return what to do, in one line."""
    by_name = {found.name: found for found in outlooks}
    default = by_name["auto"]
    if judgement(default.kept, default.expected_loss) != "good":
        good = [found for found in outlooks if judgement(found.kept, found.expected_loss) == "good"]
        better = min(good, key=lambda found: found.n_bytes, default=None)
        if better is None:
            return f"little is kept whatever the type: the defaults keep {kept_text(default)}"
        return f"merge with {better.options}: it keeps {kept_text(better)}; the defaults keep only {kept_text(default)}"
    lost = [name for name in ("nearest", "fresh") if name in by_name and by_name[name].kept < GOOD - 0.1]
    others = (
        "; " + " and ".join(f"{name} rounding would keep {by_name[name].kept:.2f}" for name in lost) if lost else ""
    )
    return f"merge with the defaults: they keep {kept_text(default)}{others}"


def kept_text(way: Outlook) -> str:
    """Return what a way to merge keeps and loses, as a part of a sentence."""
    loss = way.expected_loss
    lost = "" if loss is None else f", {loss_text(loss)} of its effect lost"
    return f"{way.kept:.2f} of the adapter{lost}"
