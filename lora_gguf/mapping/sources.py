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
from lora_gguf.mapping.accounts import Placement
from lora_gguf.mapping.placement import adapter_gguf_pairs, gguf_pairs
from lora_gguf.mapping.reading import Reading


def read_base_config(path: str | os.PathLike | None) -> dict | None:
    """Return the base's ``config.json``, or the one in the folder ``path``."""
    if path is None:
        return None
    path = Path(path)
    return read_json(path / "config.json" if path.is_dir() else path)


def is_gguf(path: str | os.PathLike) -> bool:
    """Return whether ``path`` is a file that calls itself a GGUF."""
    return Path(path).is_file() and Path(path).suffix == ".gguf"


def inputs_of(path: str | os.PathLike) -> Path:
    """Return what ``placement_of`` reads: the GGUF, or the folder in which the adapter's files lie."""
    return Path(path) if is_gguf(path) else adapter_directory(path)


def placement_of(path: str | os.PathLike[str], base: Base, reading: Reading = Reading()) -> Placement:
    """Return the updates of the adapter at ``path``, a directory or a GGUF, in the layout of ``base``, as a merge
    carries them out.

    Raises ``UnsupportedError`` for an adapter that cannot be merged.
    """
    if is_gguf(path):
        placement = adapter_gguf_pairs(path, base, reading)
    else:
        adapter = read_adapter(path, reading.expert_b_layout, reading.allow_unused)
        config = read_base_config(reading.base_config)
        placement = gguf_pairs(adapter, base, reading, config=config, updates=True, new_tokens=True)
    if placement.invocation_tokens:
        raise UnsupportedError(
            f"{adapter_name(path)}: an aLoRA, active only after its invocation tokens: it cannot be merged; "
            "use 'lora-gguf convert'"
        )
    return placement
