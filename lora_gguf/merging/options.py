"""What a user chooses of a merge: how it rounds and into which types, which files it writes, what it may take.

The objects are checked when they are made; nothing here loads a kernel, so a wrong word is told at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_gguf.arguments import (
    alike,
    check_choice,
    check_flag,
    check_gguf_name,
    check_number,
    check_path,
    check_text,
    check_whole,
    refuse,
)
from lora_gguf.errors import UsageError, printable
from lora_gguf.files.imatrix import Imatrix

if TYPE_CHECKING:
    from concurrent.futures import Executor

ROUNDINGS = ("auto", "dither", "nearest", "fresh")
MAX_GROWTH = 10  # times the base's size


@dataclass(frozen=True)
class Policy:
    """How a merge rounds, which types the tensors get, and how much must be kept.

    ``rounding`` is one of ``ROUNDINGS``. ``type`` is that of the adapted tensors (None keeps the base's), ``mix`` names
    one of llama.cpp's quantization mixes for all tensors; ``imatrix`` tells the importance of their columns.
    ``max_growth`` is the share of the base's size by which promoted tensors may make the file larger,
    ``min_retention`` the share of the update below which the merge is refused.
    """

    rounding: str = "auto"
    seed: int = 0
    type: str | None = None
    mix: str | None = None
    imatrix: Imatrix | None = None
    max_growth: float = 0.0
    min_retention: float = 0.0

    def __post_init__(self) -> None:
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_whole("seed", self.seed, 0, 2**64 - 1)
        check_number("max_growth", self.max_growth, 0, MAX_GROWTH)
        check_number("min_retention", self.min_retention, 0)
        if not isinstance(self.imatrix, Imatrix | None):
            raise refuse("imatrix", "a path or an Imatrix", self.imatrix)
        if self.type is not None:
            from lora_gguf.quants.mixes import MIXES
            from lora_gguf.quants.table import CODECS

            check_type(self.type, CODECS, MIXES)
        if self.mix is not None:
            from lora_gguf.quants.mixes import MIXES

            check_mix(self.mix, MIXES)


@dataclass(frozen=True)
class Writing:
    """What a merge writes: a file at ``path``, or where that is a folder one with its conventional name in it.

    ``max_bytes`` is the most that a shard's tensors take; ``keep_split`` writes the base's shards; ``shard``, such as
    3/5, writes only that one. ``modelfile`` writes one for Ollama beside the file; ``force`` replaces what is there,
    ``skip_existing`` leaves it where the same merge made it.
    """

    path: str | os.PathLike[str]
    max_bytes: int | None = None
    keep_split: bool = False
    shard: str | None = None
    modelfile: bool = False
    force: bool = False
    skip_existing: bool = False

    def __post_init__(self) -> None:
        check_path("out", self.path)
        check_gguf_name(self.path)
        if self.max_bytes is not None:
            check_whole("max_bytes", self.max_bytes, 1)
        for name in ("keep_split", "modelfile", "force", "skip_existing"):
            check_flag(name, getattr(self, name))
        if self.shard is not None:
            check_text("shard", self.shard)
            self.part  # noqa: B018

    @property
    def part(self) -> tuple[int, int] | None:
        """(number, count) of the one shard to write, from 1; None for all. Raises ``UsageError``."""
        if self.shard is None:
            return None
        number, _, count = self.shard.partition("/")
        shown, digits = printable(self.shard, 60), [part.isascii() and part.isdigit() for part in (number, count)]
        if not all(digits) or max(len(number), len(count)) > 9:
            raise UsageError(f"--shard {shown}: expected N/COUNT, such as 3/5 for the third of five")
        if not 1 <= int(number) <= int(count):
            raise UsageError(f"--shard {shown}: there is no shard {int(number)} of {int(count)}: they count from 1")
        return int(number), int(count)

    @property
    def one_file(self) -> str | os.PathLike[str] | None:
        """The one file that is written, where its name is known before the merge."""
        several = self.max_bytes or self.keep_split or self.shard
        return None if several or self.skip_existing or os.path.isdir(self.path) else self.path


@dataclass(frozen=True)
class Resources:
    """What the work may take: ``threads`` (None: all cores), ``memory`` in bytes of the rows in work (None: enough).

    With an ``executor`` (of ``concurrent.futures``) both are of one of its tasks, which has one thread by default.
    """

    threads: int | None = None
    memory: int | None = None
    executor: Executor | None = None

    def __post_init__(self) -> None:
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise refuse("executor", "an Executor of concurrent.futures", self.executor)
        if self.threads is not None:
            check_whole("threads", self.threads, 1)
        if self.memory is not None:
            check_whole("memory", self.memory, 1)


def check_type(type: object, types: Collection[str], mixes: Collection[str]) -> None:
    """Raise ``UsageError`` unless ``type`` is one of the tensors' ``types``; it may be one of the ``mixes`` of them."""
    mix = "" if type in types else alike(type, [*types, *mixes])
    if mix and mix not in types:
        nearest = re.sub(r"_[SML]$", "", mix)
        way = (
            f"--type {nearest} for the adapted tensors, or, of a base in F16, "
            if nearest in types
            else "of a base in F16 "
        )
        raise UsageError(
            f"--type {printable(type, 60)}: a mix of types, not a type: {way}--quantize {mix} for all tensors"
        )
    check_choice("type", type, types)


def check_mix(mix: object, mixes: Collection[str]) -> None:
    """Raise ``UsageError`` unless ``mix`` is one of llama.cpp's ``mixes``."""
    nearest = [
        name for name in mixes if isinstance(mix, str) and mix and re.fullmatch(rf"{re.escape(mix)}_[SML]", name)
    ]
    if nearest and mix not in mixes:
        raise UsageError(f"--quantize {mix}: a type, not a mix of types: name one of {', '.join(nearest)}")
    check_choice("quantize", mix, mixes)


def parse_growth(text: str) -> float:
    """Return ``10%`` or ``0.1`` as 0.1; 10 alone would be a guess. Raises ``UsageError``."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= (MAX_GROWTH if text.endswith("%") else 1):
        raise UsageError(f"--max-growth {printable(text)}: expected a share of the base's size, such as 10%")
    return share
