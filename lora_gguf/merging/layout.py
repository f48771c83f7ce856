"""Which files a merge writes: one, the base's shards, or shards of a size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.errors import UsageError
from lora_gguf.files.base import Base, shard_path
from lora_gguf.files.gguf_writer import key_value
from lora_gguf.merging.naming import output_path
from lora_gguf.merging.options import Writing
from lora_gguf.merging.plan import Plan
from lora_gguf.merging.tensor import TensorPlan


@dataclass(frozen=True)
class OutputPart:
    """One file to write: its tensors, and its place among the shards."""

    path: Path
    tensors: Sequence[TensorPlan]
    number: int = 0
    count: int = 1

    def key_values(self, metadata: list[bytes], n_tensors: int) -> list[bytes]:
        """Return the file's metadata: all of it in the first shard, the split keys in each of several."""
        if self.count == 1:
            return metadata
        split = [
            key_value("split.no", self.number, "u16"),
            key_value("split.count", self.count, "u16"),
            key_value("split.tensors.count", n_tensors, "i32"),
        ]
        return (metadata if self.number == 0 else []) + split


def output_parts(writing: Writing, base: Base, plan: Plan, adapters: Sequence[str]) -> list[OutputPart]:
    """Return the files that ``writing`` asks for; ``adapters`` are the names that a file in a folder is called by.

    Raises ``UsageError`` where there is no such shard.
    """
    parts = all_parts(output_path(writing.path, base, plan, adapters), writing, base, plan)
    if writing.part is None:
        return parts
    number, count = writing.part
    if count != len(parts):
        raise UsageError(
            f"--shard {number}/{count}: there are {len(parts)} output files: expected --shard N/{len(parts)}"
        )
    return [parts[number - 1]]


def all_parts(out: Path, writing: Writing, base: Base, plan: Plan) -> list[OutputPart]:
    """Return all files of a merge: one, or the base's own shards, or as many as keep each below a size."""
    groups = [plan.tensors]
    if writing.max_bytes:
        groups = _by_size(plan.tensors, writing.max_bytes)
    elif writing.keep_split or writing.shard:
        owners = [base.reader_of(tensor.source.name) for tensor in plan.tensors]
        groups = [
            [t for t, owner in zip(plan.tensors, owners, strict=True) if owner is reader] for reader in base.readers
        ]
    if len(groups) == 1:
        return [OutputPart(out, groups[0])]
    prefix = os.fspath(out).removesuffix(".gguf")
    return [OutputPart(shard_path(prefix, i, len(groups)), group, i, len(groups)) for i, group in enumerate(groups)]


def _by_size(tensors: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.target.n_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.target.n_bytes
    return groups
