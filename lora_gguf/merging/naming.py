"""The name of a merged file, by the GGUF naming convention: BaseName-SizeLabel-FineTune-Version-Encoding.gguf.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#gguf-naming-convention. The adapters' names join the
fine-tune. The model's part is what the base's metadata say, or its file's name where that is shorter or they say
nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from lora_gguf.files.base import Base, split_name
from lora_gguf.mapping.towers import CLIP
from lora_gguf.merging.plan import Plan
from lora_gguf.quants.ggml import FILE_TYPES

MAX_LENGTH = 200
_PARTS = ("basename", "size_label", "finetune")
_ENCODING = "|".join(sorted(FILE_TYPES, key=len, reverse=True))
_STEM = re.compile(
    rf"(?P<name>.+?)(?:[-.](?P<version>v\d+(?:\.\d+)*))?(?:[-._](?:UD-)?(?:{_ENCODING}|Q\d_K_X?L))?", re.IGNORECASE
)


def output_path(out: str | os.PathLike[str], base: Base, plan: Plan, adapters: Iterable[str]) -> Path:
    """Return ``out``, or where that is a folder the file in it that the convention names."""
    return Path(out) / merged_name(base, plan, adapters) if os.path.isdir(out) else Path(out)


def merged_name(base: Base, plan: Plan, adapters: Iterable[str]) -> str:
    """Return the conventional name of ``base`` with ``adapters`` (their names) merged into it as ``plan`` says."""
    number = plan.file_type(base.get("general.file_type"))
    encoding = next(name for name, known in FILE_TYPES.items() if known == number)
    model, tail = _joined([*_model(base), *adapters]), _joined([_version(base), encoding])
    return _joined([model[: max(MAX_LENGTH - len(tail) - 1, 0)], tail[-MAX_LENGTH:]]) + ".gguf"


def _joined(parts: Iterable[object]) -> str:
    return "-".join(filter(None, map(_clean, parts)))


def _model(base: Base) -> list[object]:
    parts: list[object] = [_stem(base)["name"]]
    if _by_metadata(base):
        parts = [base.get(f"general.{key}", "") for key in _PARTS]
    # llama.cpp's converter and its downloads know an mmproj by this word
    return ["mmproj", *parts] if base.get("general.architecture") == CLIP and "mmproj" not in str(parts[0]) else parts


def _version(base: Base) -> object:
    return base.get("general.version") if _by_metadata(base) else _stem(base)["version"]


def _by_metadata(base: Base) -> bool:
    """Whether the metadata call the model more shortly than its file's name does."""
    named = _joined(base.get(f"general.{key}", "") for key in (*_PARTS, "version"))
    return bool(base.get("general.basename")) and len(named) <= len(_joined(_stem(base).values()))


def _stem(base: Base) -> dict[str, str | None]:
    split = split_name(base.path.name)
    stem = split[0] if split else base.path.name.removesuffix(".gguf")
    found = _STEM.fullmatch(stem)
    return found.groupdict() if found else {"name": stem, "version": None}


def _clean(part: object) -> str:
    """Return a part of the name with nothing but what is harmless in the name of a file."""
    return re.sub(r"[^\w.+]+", "-", str(part or ""), flags=re.ASCII).strip("-.")
