"""Which known architecture a base of an unknown one is most like, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import SequenceMatcher

from lora_gguf.mapping.architectures import ARCHITECTURES

LEAST = 0.5  # the share of the names below which a guess helps nobody
# names that tell more than that a tensor is there: (in the base, architectures that it speaks for)
SIGNS = {".attn_q.bias": ("qwen2", "qwen2moe")}


def likeliest(architecture: str, names: Collection[str]) -> tuple[str, int] | None:
    """Return the architecture whose tensors are most like ``names``, and how many of these it has; None where none is.

    Of those that fit alike the one with the fewest others counts, and the one whose own name is like it.
    """
    stems = {re.sub(r"\.\d+\.", ".{bid}.", name).removesuffix(".weight").removesuffix(".bias") for name in names}
    signs = {arch for sign, archs in SIGNS.items() if any(name.endswith(sign) for name in names) for arch in archs}
    ranked = []
    for known, its_own in tensor_stems().items():
        common = len(stems & its_own)
        alike = SequenceMatcher(None, architecture, known).ratio()
        ranked.append((common / len(stems) if stems else 0.0, known in signs, 3 * alike + common / len(its_own), known))
    share, *_, best = max(ranked)
    its_own = tensor_stems()[best]
    fitting = sum(re.sub(r"\.\d+\.", ".{bid}.", name).rpartition(".")[0] in its_own for name in names)
    return (best, fitting) if share >= LEAST else None


def tensor_stems() -> dict[str, set[str]]:
    """Return what each known architecture's tensors are called, with ``{bid}`` for the layer."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    named = {name: {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[arch]} for arch, name in MODEL_ARCH_NAMES.items()}
    return {name: named[name] for name in ARCHITECTURES if name in named and name != "clip"}
