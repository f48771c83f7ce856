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
import os
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
PARENT = "general.base_model."
MAX_PARENTS = 1000
HUB = "https://huggingface.co/"
# words in a model's name by which llama.cpp chooses how its special tokens take the spaces beside them
TELLING_NAMES = ("phi-3", "phi3", "modern-bert")
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h


@dataclass(frozen=True)
class Names:
    """What the adapters and the importance matrix were called, and the hashes of the base's files.

    ``repos`` are the repositories on the Hub of the base and of each adapter, as far as they are known; ``base`` is
    what the base's file was called, for a base that has no name of its own.
    """

    adapters: Sequence[str]
    imatrix: str = ""
    base_sha256: Sequence[str] = ()
    repos: Sequence[str] = ()
    base: str = ""


def names_of(model: Base, adapters: Sequence[str], policy: Policy, repos: Sequence[str] = ()) -> Names:
    """Return the names that a merge records of what the user gave it."""
    label = policy.imatrix.label if policy.imatrix else ""
    return Names(adapters, label, known_sha256(model.paths), repos, model.path.name.removesuffix(".gguf"))


def merged_key_values(
    model: Base, plan: Plan, placements: Sequence[tuple[Placement, float]], policy: Policy, names: Names
) -> list[bytes]:
    """Return a merged file's key/value pairs: the base's but for its types, new tokens and what the file is called,
    then how the file was made.
    """
    changed = dict(plan.key_values) | description(model, names)
    if any(tensor.target.type != tensor.source.type for tensor in plan.tensors):
        file_type = key_value("general.file_type", plan.file_type(model.get("general.file_type")), "u32")
        version = key_value("general.quantization_version", QUANTIZATION_VERSION, "u32")
        changed |= {"general.file_type": file_type, "general.quantization_version": version}
    kept = [key for key in model.kv if not key.startswith((PREFIX, PARENT)) and key not in SPLIT_KEYS]
    raw = raw_key_values(model.readers[0], set(model.kv) - set(kept))
    base_pairs = [changed.pop(key, pair) for key, pair in zip(kept, raw, strict=True)]
    own = own_key_values(model, placements, policy, names)
    return sealed(base_pairs + list(changed.values()) + earlier_key_values(model) + own)


def description(model: Base, names: Names) -> dict[str, bytes]:
    """Return the pairs ``general.*`` that tell a merged file from its base: its name, its fine-tune, and the base and
    the adapters as what it was made of.
    """
    base = str(model.get("general.name") or names.base)
    finetune = [str(model.get("general.finetune") or ""), *names.adapters]
    found: dict[str, tuple[object, str]] = {
        "general.name": (called(model, " + ".join([base, *names.adapters])), "str"),
        "general.finetune": ("-".join(filter(None, finetune)), "str"),
        f"{PARENT}count": (1 + len(names.adapters), "u32"),
    }
    repos = [*names.repos, *[""] * (1 + len(names.adapters))]
    for i, name in enumerate([base, *names.adapters]):
        url = HUB + repos[i] if repos[i] else str(model.get("general.repo_url") or "") if i == 0 else ""
        owner = _repo(url).partition("/")[0] or (str(model.get("general.organization") or "") if i == 0 else "")
        entries = {"name": name, "organization": owner, "repo_url": url}
        found |= {f"{PARENT}{i}.{key}": (value, "str") for key, value in entries.items() if value}
    return {key: key_value(key, *value) for key, value in found.items() if value[0] != ""}


def called(model: Base, name: str) -> str:
    """Return ``name``, or the base's own ('' for none) where llama.cpp would read tokens in another way for it."""
    own = str(model.get("general.name") or "")
    gained = [word for word in TELLING_NAMES if word in name.lower() and word not in own.lower()]
    return own if gained else name


def repos_of(result: Base) -> list[str]:
    """Return the repositories on the Hub of what a merged file says it was made of; empty where it does not."""
    count = result.get(f"{PARENT}count")
    numbers = range(min(count, MAX_PARENTS)) if type(count) is int else ()
    return [_repo(result.get(f"{PARENT}{i}.repo_url")) for i in numbers]


def _repo(url: object) -> str:
    found = re.fullmatch(rf"{re.escape(HUB)}([\w.-]+/[\w.-]+)", str(url or ""), re.ASCII)
    return found[1] if found else ""


def imatrix_label(path: str | os.PathLike[str]) -> str:
    """Return what the importance matrix was called by which a file says that it was merged; '' for none."""
    with Base(path) as model:
        return str(model.get(PREFIX + "imatrix") or "")


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
