"""What a user may name as an adapter: a PEFT directory, a Hub id, or an adapter GGUF; all three go straight into merge."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from lora_gguf.adapter import read_adapter
from lora_gguf.errors import UsageError, printable
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.placement import Placement, adapter_gguf_pairs, gguf_pairs


def adapter_name(source: str | os.PathLike) -> str:
    """A short name for files and metadata: the last part of a path or Hub id."""
    name = os.path.basename(os.path.normpath(os.fspath(source).split("@")[0]))
    return printable(name.removesuffix(".gguf"), 100)


def placement_of(path: str | os.PathLike, base: GgufReader, scale: float = 1.0) -> Placement:
    """The updates of the adapter at ``path``, a directory or a GGUF, in the layout of ``base``, ``scale`` times as large."""
    if not math.isfinite(scale):
        raise UsageError(f"scale: expected a finite number, found {scale}")
    if Path(path).is_file():
        placement = adapter_gguf_pairs(path, base)
    else:
        placement = gguf_pairs(read_adapter(path), base)
    return replace(placement, pairs=[replace(pair, scale=pair.scale * scale) for pair in placement.pairs])
