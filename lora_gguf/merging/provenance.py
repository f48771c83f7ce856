"""How a file was made, as its metadata say: the keys ``lora_gguf.*``.

    version                 of lora-gguf
    adapter.names           what the adapters were called
    adapter.scales          the factor that multiplied each one's own scale, f32
    adapter.sha256          of the numbers that each adds (``identity.adapter_sha256``)
    base.header_sha256      of all bytes of the base before its data
    base.size               of the base, all shards, in bytes
    base.sha256             of each of the base's files, where the Hub's cache knows it
    rounding, seed          of the merge
    imatrix                 what the importance matrix was called, if there was one
    metadata_sha256         of all key/value pairs before this one, as they stand in the file
    earlier.0.*, …          the same keys of the merges that made the base, the first of them first

With the types that its tensors have, these say all that it takes to make the file again. What is free text, the names,
is vouched for by the last key.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_gguf import __version__
from lora_gguf.files.base import SPLIT_KEYS, Base
from lora_gguf.files.gguf_writer import key_value, raw_key_values
from lora_gguf.mapping.accounts import Placement
from lora_gguf.merging.identity import adapter_sha256, header_sha256, known_sha256, n_file_bytes

if TYPE_CHECKING:
    from lora_gguf.merging.options import Policy
    from lora_gguf.merging.plan import Plan

PREFIX = "lora_gguf."
SEAL = f"{PREFIX}metadata_sha256"
EARLIER = "earlier."
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h


@dataclass(frozen=True)
class Names:
    """What was merged was called so: the adapters, the importance matrix; and the hashes of the base's files."""

    adapters: Sequence[str]
    imatrix: str = ""
    base_sha256: Sequence[str] = ()


def names_of(model: Base, adapters: Sequence[str], policy: Policy) -> Names:
    """Return the names that a merge records of what the user gave it."""
    return Names(adapters, policy.imatrix.label if policy.imatrix else "", known_sha256(model.paths))


def merged_key_values(
    model: Base, plan: Plan, placements: Sequence[tuple[Placement, float]], policy: Policy, names: Names
) -> list[bytes]:
    """Return a merged file's key/value pairs: the base's as they are but for ``general.file_type`` and new tokens, then
    how the file was made.
    """
    changed = dict(plan.key_values)
    if any(tensor.target.type != tensor.source.type for tensor in plan.tensors):
        file_type = key_value("general.file_type", plan.file_type(model.get("general.file_type")), "u32")
        version = key_value("general.quantization_version", QUANTIZATION_VERSION, "u32")
        changed |= {"general.file_type": file_type, "general.quantization_version": version}
    kept = [key for key in model.kv if not key.startswith(PREFIX) and key not in SPLIT_KEYS]
    raw = raw_key_values(model.readers[0], set(model.kv) - set(kept))
    base_pairs = [changed.pop(key, pair) for key, pair in zip(kept, raw, strict=True)]
    own = own_key_values(model, placements, policy, names)
    return sealed(base_pairs + list(changed.values()) + earlier_key_values(model) + own)


def earlier_key_values(model: Base) -> list[bytes]:
    """Return the keys of the merges that made the base, which say of the last one that it is one of the earlier."""
    ours = [key for key in model.kv if key.startswith(PREFIX)]
    number = len(merges_of(model)) - 1
    pairs = dict(zip(ours, raw_key_values(model.readers[0], model.kv.keys() - set(ours)), strict=True))
    own = {key: pair for key, pair in pairs.items() if not key.startswith(PREFIX + EARLIER)}
    moved = [_renamed(f"{PREFIX}{EARLIER}{number}.{key.removeprefix(PREFIX)}", key, pair) for key, pair in own.items()]
    return [pair for key, pair in pairs.items() if key not in own] + moved


def _renamed(new: str, old: str, pair: bytes) -> bytes:
    """Return a key/value pair as it stands in a file under another key."""
    raw = new.encode("utf-8", "surrogateescape")
    return len(raw).to_bytes(8, "little") + raw + pair[8 + len(old.encode("utf-8", "surrogateescape")) :]


def merges_of(model: Base) -> list[dict[str, object]]:
    """Return the keys of each merge that made a file, without their prefix, the first merge first; none where
    lora-gguf did not make it.
    """
    found: dict[float, dict[str, object]] = {}
    for key in model.kv:
        if key.startswith(PREFIX):
            number, name = math.inf, key.removeprefix(PREFIX)
            if match := re.fullmatch(rf"{EARLIER}(\d{{1,6}})\.(.+)", name):
                number, name = int(match[1]), match[2]
            found.setdefault(number, {})[name] = model.get(key)
    return [found[number] for number in sorted(found)]


def own_key_values(
    model: Base, placements: Sequence[tuple[Placement, float]], policy: Policy, names: Names
) -> list[bytes]:
    """Return the keys ``lora_gguf.*`` of a merge, but for the seal."""
    own: dict[str, tuple[object, str]] = {
        "version": (__version__, "str"),
        "adapter.names": (list(names.adapters), "str"),
        "adapter.scales": ([float(scale) for _, scale in placements], "f32"),
        "adapter.sha256": ([adapter_sha256(placement) for placement, _ in placements], "str"),
        "base.header_sha256": (header_sha256(model), "str"),
        "base.size": (n_file_bytes(model), "u64"),
        "base.sha256": (list(names.base_sha256), "str"),
        "rounding": (policy.rounding, "str"),
        "seed": (policy.seed, "u64"),
        "imatrix": (names.imatrix, "str"),
    }
    return [key_value(PREFIX + key, *value) for key, value in own.items() if value[0] not in ("", [])]


def sealed(pairs: list[bytes]) -> list[bytes]:
    """Return the pairs with one more: their sha256."""
    return [*pairs, key_value(SEAL, seal_of(pairs), "str")]


def seal_of(pairs: Sequence[bytes]) -> str:
    """Return the sha256 of key/value pairs as they stand in a file."""
    return hashlib.sha256(b"".join(pairs)).hexdigest()
