"""What a user may name as an adapter: a PEFT directory, a Hub id, or an adapter GGUF; all three go straight into merge."""

from __future__ import annotations

import os
from pathlib import Path

from lora_gguf.adapters.adapter import adapter_name, read_adapter
from lora_gguf.errors import UnsupportedError
from lora_gguf.files.base import Base
from lora_gguf.mapping.placement import Placement, adapter_gguf_pairs, gguf_pairs


def placement_of(path: str | os.PathLike, base: Base, tied: str = "separate", allow_unused: str | None = None) -> Placement:
    """The updates of the adapter at ``path``, a directory or a GGUF, in the layout of ``base``, as a merge carries them out.

    Raises ``UnsupportedError`` for an adapter that cannot be merged.
    """
    if Path(path).is_file() and Path(path).suffix == ".gguf":
        placement = adapter_gguf_pairs(path, base, tied)
    else:
        placement = gguf_pairs(read_adapter(path), base, updates=True, tied=tied, allow_unused=allow_unused)
    if placement.invocation_tokens:
        raise UnsupportedError(
            f"{adapter_name(path)}: an aLoRA, active only after its invocation tokens: it cannot be merged; use 'lora-gguf convert'"
        )
    return placement
