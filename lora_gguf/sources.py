"""What a user may name as an adapter: a PEFT directory, a Hub id, or an adapter GGUF."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lora_gguf.errors import FileError, printable
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.lora import LoraPair

_REPO = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


def locate(adapter: str) -> Path:
    """The local directory or file of ``adapter``; a Hub id is downloaded."""
    if os.path.exists(adapter):
        return Path(adapter)
    if _REPO.match(adapter) and not adapter.startswith("."):
        from lora_gguf.fetch import fetch

        return Path(fetch(adapter))
    raise FileError(f"{printable(adapter)}: no such file or folder, and not a Hub id (user/name): check the path")


def adapter_name(adapter: str) -> str:
    """A short name for files and metadata: the last part of a path or Hub id."""
    name = os.path.basename(os.path.normpath(adapter.split("@")[0]))
    return printable(name.removesuffix(".gguf"), 100)


def pairs_of(source: Path, base: GgufReader) -> Sequence[LoraPair]:
    """The adapter at ``source`` as pairs that fit ``base``."""
    if source.is_file():
        from lora_gguf.lora import read_adapter_gguf

        return read_adapter_gguf(source, base)
    from lora_gguf.adapter import read_adapter
    from lora_gguf.names import gguf_pairs

    return gguf_pairs(read_adapter(source), base)
