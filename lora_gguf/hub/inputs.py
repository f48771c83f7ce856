"""What a user names, made local: base models and adapters by path, Hub id or reference. The command line and the
library both come through here.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_gguf.arguments import check_number, check_path
from lora_gguf.errors import UsageError
from lora_gguf.hub.adapters import fetch
from lora_gguf.hub.references import gguf_path
from lora_gguf.progress import FileProgress

Name = str | os.PathLike[str]
Scaled = tuple[Name, float]
Adapters = Name | Scaled | Sequence[Name | Scaled]


def scaled_names(adapters: Adapters) -> list[Scaled]:
    """Return ``adapters`` as a list of (name, factor of its scale): a name, such a pair, or a sequence of either.

    Raises ``UsageError`` where it is none of these, or empty.
    """
    single = isinstance(adapters, (str, os.PathLike)) or is_scaled(adapters) or not isinstance(adapters, Iterable)
    found = [item if is_scaled(item) else (item, 1.0) for item in ([adapters] if single else adapters)]
    if not found:
        raise UsageError("no adapter: name at least one")
    for name, scale in found:
        check_path("adapter", name, "a path, a Hub id, or (one of these, scale)")
        check_number("scale", scale)
    return [(name, float(scale)) for name, scale in found]


def is_scaled(item: object) -> bool:
    """Return whether ``item`` is a pair of a name and a number."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], numbers.Real)


def local_adapters(named: Iterable[Scaled], progress: FileProgress | None = None) -> list[tuple[Path, float]]:
    """Each adapter's folder or file, downloaded if need be, with its factor. Raises ``HubError`` and the like."""
    return [(fetch(name, progress=progress), scale) for name, scale in named]


def local_model(source: Name, progress: FileProgress | None = None) -> Path:
    """The path of a model's GGUF, downloaded if need be. Raises ``HubError`` and the like."""
    return gguf_path(source, progress=progress)
