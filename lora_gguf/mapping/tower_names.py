"""From the path of a tower's module to the tensors of an mmproj GGUF."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lora_gguf.errors import UnsupportedError, printable
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.mapping.architectures import Out, Rule
from lora_gguf.mapping.towers import REFUSED, TOWERS, UNKNOWN_LAYOUT

PROJECTORS = ("projector_type", "vision.projector_type", "audio.projector_type")
LEGACY = "mlp"  # files from before there was a key are LLaVA's
WAITING = "part of a vision or audio tower: it waits for the model's mmproj"
NOWHERE = "part of what makes speech or pictures, for which llama.cpp has no GGUF"
SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}


def projectors(values: dict[str, Any], label: str) -> tuple[str, ...]:
    """Return the kinds of towers in an mmproj, of its ``values`` by key without ``clip.``. Raises ``UnsupportedError``
    for one that the table lacks.
    """
    found = tuple(dict.fromkeys(str(values[key]) for key in PROJECTORS if values.get(key))) or (LEGACY,)
    for name in found:
        if name not in TOWERS:
            _, why = REFUSED.get(name, ((), UNKNOWN_LAYOUT))
            raise UnsupportedError(f"{label}: projector {printable(name, 40)}: {why}")
    return found


@lru_cache(maxsize=8)
def compiled(names: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], Rule], ...]:
    return tuple((re.compile(rf"(?:^|.*\.){rule.pattern}"), rule) for name in names for rule in TOWERS[name].rules)


def tower_outs(path: str, names: tuple[str, ...], tensors: dict[str, TensorInfo], width: object) -> tuple[Out, ...]:
    """Return the tensors that the module at ``path`` becomes, by the first rule whose tensors are there; empty where no
    rule knows it.

    ``width`` is the tower's: old converters called a layer's second feed-forward part the first, and the first the
    second, which it tells.
    """
    candidates = []
    for pattern, rule in compiled(names):
        if match := pattern.fullmatch(path):
            outs = tuple(replace(out, tensor=numbered(out.tensor or "", match.groups(), tensors)) for out in rule.outs)
            candidates.append(tuple(unswapped(out, tensors, width) for out in outs))
    present = [outs for outs in candidates if all(file_name(out) in tensors for out in outs)]
    return next(iter(present or candidates), ())


def numbered(tensor: str, groups: tuple[str | None, ...], tensors: dict[str, TensorInfo]) -> str:
    """Return ``tensor`` with the number that the pattern found in place of ``#``, or of the file's in that place for
    ``##``.
    """
    number = next((group for group in reversed(groups) if group and group.isdigit()), "")
    if "##" in tensor:
        head, _, tail = tensor.partition("##")
        pattern = re.compile(rf"{re.escape(head)}(\d+){re.escape(tail)}\.weight")
        there = sorted(int(match[1]) for name in tensors if (match := pattern.fullmatch(name)))
        return tensor.replace("##", str(there[int(number)] if int(number) < len(there) else number))
    return tensor.replace("#", number)


def file_name(out: Out) -> str:
    """Return the name of an ``Out`` of a tower in the file. A second frame's convolution is ``weight.1``."""
    tensor = out.tensor or ""
    return tensor if re.search(r"\.weight(\.\d+)?$", tensor) else f"{tensor}.weight"


def unswapped(out: Out, tensors: dict[str, TensorInfo], width: object) -> Out:
    """Return ``out``, or the other of a layer's two feed-forward tensors where the file has each under the other's
    name.
    """
    block, _, stem = (out.tensor or "").rpartition(".")
    down = tensors.get(f"{block}.ffn_down.weight")
    up = tensors.get(f"{block}.ffn_up.weight")
    if stem not in SWAPPED or down is None or up is None or down.shape[-1] != width or up.shape[-1] == width:
        return out
    return replace(out, tensor=f"{block}.{SWAPPED[stem]}")
