"""From the path of a Hugging Face module to the names and layouts of the GGUF tensors that hold its weight."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from lora_gguf.architectures import ARCHITECTURES, Architecture, Out
from lora_gguf.hparams import Hparams
from lora_gguf.transforms import Piece

# modules of the towers that stand beside a text model, and go into another GGUF (mmproj) or into none
OTHER_TOWERS_START = (
    "mlp", "vit.", "vpm.", "siglip2.", "conformer.", "merger.", "resampler.", "sound_encoder.", "sound_projection.",
    "speech_embeddings.",
)  # fmt: skip
OTHER_TOWERS = (
    "visual.", "vision.", "audio.", "talker.", "vision_", "audio_", "token2wav.", "code2wav.", "projector.",
    "pre_mm_projector_norm", "image_newline", "patch_embed", "patch_merger.", "patch_merge_mlp.", "model.connector.",
)  # fmt: skip
LAYER = re.compile(r"\.(\d+)\.")


def is_other_tower(path: str) -> bool:
    """Whether the module belongs to a vision or audio tower, not to the text model."""
    return path.startswith(OTHER_TOWERS_START) or any(part in path for part in OTHER_TOWERS)


def layer_of(path: str) -> int | None:
    """The number of the layer that the module stands in: the first number in its path."""
    match = LAYER.search(path)
    return int(match[1]) if match else None


@lru_cache(maxsize=1)
def name_map() -> dict[str, tuple[tuple[object, str], ...]]:
    """Module path with ``{bid}`` for the layer -> (tensor enum, GGUF name with ``{bid}``) pairs, over all architectures."""
    from gguf.constants import TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    found: dict[str, list] = {}
    for mappings in (TensorNameMap.mappings_cfg, TensorNameMap.block_mappings_cfg):
        for tensor, paths in mappings.items():
            for path in dict.fromkeys(paths):
                found.setdefault(path, []).append((tensor, TENSOR_NAMES[tensor]))
    return {path: tuple(tensors) for path, tensors in found.items()}


@lru_cache(maxsize=8)
def tensors_of(architecture: str) -> frozenset | None:
    """The tensors that the architecture has; None where the gguf package does not know it."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS

    known = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    return None if known is None else frozenset(MODEL_TENSORS[known])


def candidates(path: str) -> list[str]:
    """The paths under which the name map may know a module."""
    plain = path.replace("language_model.", "").replace("text_model.", "")
    return list(dict.fromkeys((path, plain, f"model.{plain}", plain.removeprefix("model."))))


def tensor_name(path: str, hparams: Hparams) -> str | None:
    """The GGUF name of the weight of the module at ``path``; None where the name map knows none.

    With a base GGUF, a name that the base has wins; without one, the architecture's own tensors decide.
    """
    layer = layer_of(path)
    allowed = tensors_of(hparams.architecture)
    names = []
    for candidate in candidates(path):
        template = candidate if layer is None else LAYER.sub(".{bid}.", candidate, count=1)
        for tensor, name in name_map().get(template, ()):
            full = f"{name.format(bid=layer)}.weight"
            if hparams.tensors is not None and full in hparams.tensors:
                return full
            if allowed is None or tensor in allowed:
                names.append(full)
    return names[0] if names else None


def pieces(path: str, shape: tuple[int, int], hparams: Hparams) -> list[Piece]:
    """Where the weight of the module at ``path``, of ``shape`` (out, in), goes; empty where its name is not known.

    Raises ``ValueError`` where the shape is not what the base's dimensions make it, ``MalformedError`` where the base
    lacks a dimension.
    """
    row = ARCHITECTURES.get(hparams.architecture, Architecture(()))
    found = next((rule.outs for rule in row.rules if re.search(rf"(^|\.){rule.pattern}$", path)), (Out(),))
    layer = layer_of(path)
    placed = []
    for out in found:
        name = tensor_name(path, hparams) if out.tensor is None else f"blk.{layer}.{out.tensor}.weight"
        if name is None:
            return []
        rows, cols = (gather(ops, n, hparams, layer) for ops, n in ((out.rows, shape[0]), (out.cols, shape[1])))
        placed.append(Piece(name, rows, cols))
    return placed


def gather(ops, n: int, hparams: Hparams, layer: int | None) -> np.ndarray | None:
    """The index array that a chain of operations makes of ``n`` rows or columns; None where there is no operation."""
    if not ops:
        return None
    index = np.arange(n)
    for op in ops:
        index = op(index, hparams.dims(layer))
    return index
