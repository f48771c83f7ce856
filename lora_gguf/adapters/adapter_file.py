"""The adapter GGUF that a user asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lora_gguf.adapters.lora import OUT_TYPES
from lora_gguf.arguments import check_choice, check_flag, check_gguf_name, check_path, check_whole


@dataclass(frozen=True)
class AdapterFile:
    """An adapter GGUF to write at ``path``, its tensors of type ``outtype``; ``auto`` is the smallest that is
    exact.

    ``rank`` is that of what is approximated, None where nothing may be; ``force`` replaces a file that is there. Raises
    ``UsageError`` where a value makes no sense.
    """

    path: str | os.PathLike[str]
    outtype: str = "auto"
    rank: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_path("out", self.path)
        check_gguf_name(self.path)
        check_choice("outtype", self.outtype, OUT_TYPES)
        if self.rank is not None:
            check_whole("rank", self.rank, 1)
        check_flag("force", self.force)
