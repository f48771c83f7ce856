"""Which file of a folder holds an adapter's weights: by the names that PEFT, mlx and others give it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from lora_gguf.errors import FileError, MalformedError, printable
from lora_gguf.files.weights import find_weights

# the first of these that is there is taken
WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin",
    "adapter_model.bin.index.json", "adapters.safetensors",
)  # fmt: skip
# then these, where one alone is there
OTHERS = re.compile(
    r"adapters\.npz|adapter_model\.pt|adapter\.pt|pytorch_model\.bin|model\.safetensors|adapter\.safetensors|"
    r"(?P<step>\d+)_adapters\.(safetensors|npz)|adapter_(?P<epoch>\d+)\.pt"
)
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(safetensors|bin)")
SUFFIXES = (".safetensors", ".bin", ".pt", ".npz")


def weights_among(names: Collection[str]) -> tuple[str, ...]:
    """Return the files of ``names`` that hold an adapter's weights together: one, or all its shards.

    Raises ``FileError`` where several could, or where shards are missing; empty where none could.
    """
    if known := next((name for name in WEIGHTS if name in names), None):
        return (known,)
    found = {name: match for name in sorted(names) if (match := OTHERS.fullmatch(name))}
    steps = {name: match["step"] or match["epoch"] for name, match in found.items()}
    plain = [name for name, step in steps.items() if step is None]
    if len(plain) == 1:
        return (plain[0],)
    if len(plain) > 1:
        raise FileError(f"several files could be the adapter: name one of {', '.join(plain)}")
    if steps:  # mlx's and torchtune's checkpoints: the last
        return (max(steps, key=lambda name: int(steps[name])),)
    return shards_among(names)


def shards_among(names: Collection[str]) -> tuple[str, ...]:
    """Return an adapter's shards where they lie without their index; all of them, or ``FileError``."""
    shards = sorted(name for name in names if SHARD.fullmatch(name))
    if not shards:
        return ()
    stems = {(match["stem"], match["count"]) for name in shards if (match := SHARD.fullmatch(name))}
    if len(stems) > 1:
        raise FileError(
            f"shards of several files ({', '.join(shards[:3])}, …): keep those of one in a folder of their own"
        )
    ((stem, count),) = stems
    if len(shards) != int(count):
        raise FileError(f"{stem}: {len(shards)} of its {int(count)} shards are here: download the rest")
    return tuple(shards)


def weights_of(directory: Path, named: Path | None = None) -> list[Path]:
    """Return the files that hold the weights of the adapter in ``directory``, or the one that the user ``named``.

    Raises ``FileError`` that says which weights lie there, where none are an adapter's.
    """
    if named is not None and named.name != "adapter_config.json":
        return [named]
    names = [path.name for path in directory.iterdir() if path.is_file()]
    try:
        found = weights_among(names)
    except FileError as error:
        raise FileError(f"{printable(directory)}: {error}") from None
    if not found:
        lying = sorted(name for name in names if name.endswith(SUFFIXES))
        there = f"found {', '.join(printable(name, 60) for name in lying[:5])}: name it" if lying else "found none"
        fix = "" if lying else ": download it again"
        raise FileError(f"{printable(directory)}: expected {WEIGHTS[0]} or {WEIGHTS[2]}, {there}{fix}")
    return [directory / name for name in found]


def read_all(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return the tensors of all ``paths`` by name. Raises ``MalformedError`` where one is in two."""
    found: dict[str, np.ndarray] = {}
    for path in paths:
        tensors = find_weights(path)
        if twice := found.keys() & tensors.keys():
            raise MalformedError(f"{printable(path.name)}: {min(twice)} is in two shards: download the adapter again")
        found |= tensors
    return found
