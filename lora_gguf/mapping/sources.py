"""What a user may name as an adapter: a PEFT directory, a Hub id, or an adapter GGUF; all three go straight into
merge.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_gguf.adapters.adapter import adapter_directory, adapter_name, read_adapter
from lora_gguf.adapters.adapter_config import read_json
from lora_gguf.errors import UnsupportedError
from lora_gguf.files.base import Base
from lora_gguf.mapping.placement import Placement, adapter_gguf_pairs, gguf_pairs


def read_base_config(path: str | os.PathLike | None) -> dict | None:
    """The base's ``config.json``, or the one in the folder ``path``."""
    if path is None:
        return None
    path = Path(path)
    return read_json(path / "config.json" if path.is_dir() else path)


def _is_gguf(path: str | os.PathLike) -> bool:
    return Path(path).is_file() and Path(path).suffix == ".gguf"


def inputs_of(path: str | os.PathLike) -> Path:
    """What ``placement_of`` reads: the GGUF, or the folder in which the adapter's files lie."""
    return Path(path) if _is_gguf(path) else adapter_directory(path)


def placement_of(
    path: str | os.PathLike,
    base: Base,
    tied: str = "separate",
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
    base_config: str | os.PathLike | None = None,
) -> Placement:
    """The updates of the adapter at ``path``, a directory or a GGUF, in the layout of ``base``, as a merge carries them
    out.

    ``tied`` and ``allow_unused`` are those of ``gguf_pairs``, ``expert_b_layout`` that of ``read_adapter``;
    ``base_config`` is the base's ``config.json``, or the folder that holds it, for what its GGUF does not say. Raises
    ``UnsupportedError`` for an adapter that cannot be merged.
    """
    if _is_gguf(path):
        placement = adapter_gguf_pairs(path, base, tied, allow_unused)
    else:
        adapter, config = read_adapter(path, expert_b_layout, allow_unused), read_base_config(base_config)
        wanted = dict(updates=True, new_tokens=True, tied=tied, allow_unused=allow_unused)
        placement = gguf_pairs(adapter, base, config=config, **wanted)
    if placement.invocation_tokens:
        raise UnsupportedError(
            f"{adapter_name(path)}: an aLoRA, active only after its invocation tokens: it cannot be merged; "
            "use 'lora-gguf convert'"
        )
    return placement
