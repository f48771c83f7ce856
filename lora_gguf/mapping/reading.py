"""How adapters are read: the choices that a user has where an adapter, or a base, does not say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import get_close_matches

from lora_gguf.arguments import check_choice, check_flag, check_path, check_pattern, refuse
from lora_gguf.mapping.architectures import ARCHITECTURES

TIED = ("separate", "shared", "refuse")
EXPERT_B_LAYOUTS = ("rank-major", "expert-major")
EXPERT_A_AXES = ("in", "out")


@dataclass(frozen=True)
class Reading:
    """How adapters are read. Raises ``UsageError`` where a value is none that is known.

    ``tied`` says what becomes of an adapted head that the base shares with its embedding: ``separate`` gives it a
    tensor of its own, ``shared`` changes the one tensor, ``refuse`` refuses. Adapter tensors that fit nowhere are left
    out where the regular expression ``allow_unused`` finds their name. ``expert_b_layout`` tells how lora_B of fused
    experts lies, ``base_config`` is the base's ``config.json``, or its folder, for what its GGUF does not say.
    ``expert_a_axis`` tells which side of square fused experts lora_A is on, where nothing else does; ``layout_of`` is
    the architecture whose layout a base of an unknown one has; ``again`` lets an adapter in that the base already
    holds. ``mmproj`` is the GGUF of the model's towers, where a merge takes it along.
    """

    tied: str = "separate"
    allow_unused: str | None = None
    expert_b_layout: str | None = None
    base_config: str | os.PathLike[str] | None = None
    expert_a_axis: str | None = None
    layout_of: str | None = None
    again: bool = False
    mmproj: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_choice("tied", self.tied, TIED)
        if self.allow_unused is not None:
            check_pattern("allow_unused", self.allow_unused)
        if self.expert_b_layout is not None:
            check_choice("expert_b_layout", self.expert_b_layout, EXPERT_B_LAYOUTS)
        if self.expert_a_axis is not None:
            check_choice("expert_a_axis", self.expert_a_axis, EXPERT_A_AXES)
        check_flag("again", self.again)
        if self.layout_of is not None:
            check_architecture(self.layout_of)
        for name in ("base_config", "mmproj"):
            if getattr(self, name) is not None:
                check_path(name, getattr(self, name))


class AsFound(Reading):
    """A reading for a file that is already merged, where a tied head is what that file makes of it."""


def check_architecture(name: object) -> None:
    """Raise ``UsageError`` unless ``name`` is an architecture of the table."""
    if name not in ARCHITECTURES:
        alike = get_close_matches(str(name)[:40], ARCHITECTURES, n=3, cutoff=0.0)
        raise refuse("layout_of", f"an architecture of docs/supported.md, such as {', '.join(alike)}", name)
