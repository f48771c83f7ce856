"""A base that is a merged file itself: what it holds already, and whether an adapter would be merged into it twice."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lora_gguf.adapters.adapter import adapter_name
from lora_gguf.errors import UsageError, printable
from lora_gguf.files.base import Base
from lora_gguf.mapping.accounts import Placement
from lora_gguf.merging.identity import adapter_sha256
from lora_gguf.merging.provenance import merges_of

Adapters = Sequence[tuple[str | os.PathLike[str], float]]


def earlier_merges(
    base: Base, adapters: Adapters, placements: Sequence[tuple[Placement, float]], *, again: bool
) -> list[str]:
    """Return warnings on a base that lora-gguf merged adapters into, and on adapters that are named twice.

    Raises ``UsageError`` for an adapter that is among them, unless ``again``.
    """
    lines = twice(adapters, placements) if len(placements) > 1 else []
    merges = merges_of(base)
    if not merges:
        return lines
    held = [name for merge in merges for name in _strings(merge, "adapter.names")]
    hashes = {found for merge in merges for found in _strings(merge, "adapter.sha256")}
    names = [adapter_name(path) for path, _ in adapters]
    same = [name for name, (placement, _) in zip(names, placements, strict=True) if adapter_sha256(placement) in hashes]
    if same and not again:
        raise UsageError(
            f"{base.label}: it holds {same[0]} already: merge into the base that it was made of, with another --scale "
            "if it should be stronger, or give --again"
        )
    lines += [f"{base.label} is a merged file: it holds {printable(', '.join(held), 200)} already, and this adds to it"]
    alike = [name for name in names if name in held and name not in same]
    return lines + [f"{base.label}: an adapter called {name} is in it already: is it the same one?" for name in alike]


def twice(adapters: Adapters, placements: Sequence[tuple[Placement, float]]) -> list[str]:
    """Return a warning for each adapter that is the same as one before it."""
    hashes = [adapter_sha256(placement) for placement, _ in placements]
    return [
        f"{adapter_name(path)} is the same adapter as one before it: its update is added once more"
        for i, (path, _) in enumerate(adapters)
        if hashes[i] in hashes[:i]
    ]


def _strings(merge: dict[str, object], key: str) -> list[str]:
    found = merge.get(key)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []
