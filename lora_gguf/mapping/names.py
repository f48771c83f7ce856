"""From the path of a Hugging Face module to the names and layouts of the GGUF tensors that hold its weight."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from lora_gguf.adapters.lora import EMBEDDING, HEAD, Piece
from lora_gguf.mapping.architectures import ARCHITECTURES, FUSED_EXPERTS, Architecture, Out
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.own_names import OWN_NAMES
from lora_gguf.mapping.tower_names import NOWHERE, WAITING, file_name, projectors, tower_outs

# modules of the towers that stand beside a text model, and go into another GGUF (mmproj) or into none
OTHER_TOWERS_START = (
    "mlp", "vit.", "vpm.", "siglip2.", "conformer.", "merger.", "resampler.", "sound_encoder.", "sound_projection.",
    "speech_embeddings.", "linear_proj.",
)  # fmt: skip
OTHER_TOWERS = (
    "visual.", "vision.", "audio.", "talker.", "vision_", "audio_", "token2wav.", "code2wav.", "projector.",
    "pre_mm_projector_norm", "image_newline", "patch_embed", "patch_merger.", "patch_merge_mlp.", "model.connector.",
    "vqmodel.", "model.aligner.", "generation_", "model.merger.", "sam_model.", "vit_large_projector", "speech_encoder.",
    "speech_audio_adapter.", "ln_speech", "model.encoder.input_linear", "model.encoder.out", "qwen2_model.", ".attn.to_", ".ff1.", ".ff2.", ".conv.up_conv", ".conv.down_conv",
)  # fmt: skip
# parts that make speech or pictures, for which there is no GGUF
GENERATION = ("talker.", "token2wav.", "code2wav.", "vqmodel.", "generation_")
TOWER_WORDS = {"vision": r"vision|visual|(^|\.)(vit|vpm)\.", "audio": r"audio|speech|sound|conformer"}
LAYER = re.compile(r"\.(\d+)\.")
ALTUP = re.compile(r"(?P<head>.*altup_(?:unembed_)?projections)\.(?P<slot>\d+)")
EXPERT = re.compile(
    r"(?P<head>.*\.(?:chunk_experts|experts|moe))\.(?:(?P<slot>\d+)\.(?P<tail>.+)|(?P<list>\w+)s\.(?P<index>\d+))"
)
# an expert's module -> what all experts' weights together are called
EXPERT_TENSORS = {
    "gate_proj": "ffn_gate_exps", "w1": "ffn_gate_exps", "linear": "ffn_gate_exps", "gate": "ffn_gate_exps",
    "down_proj": "ffn_down_exps", "w2": "ffn_down_exps", "linear_1": "ffn_down_exps", "down": "ffn_down_exps",
    "up_proj": "ffn_up_exps", "w3": "ffn_up_exps", "linear_v": "ffn_up_exps", "up": "ffn_up_exps",
    "gate_up_proj": "ffn_gate_up_exps",
}  # fmt: skip
STACKED = ("_exps.weight", "_chexps.weight", "altup_proj.weight", "altup_unembd_proj.weight")
# prefixes of the same module in differently wrapped models: what to take off, what to put in its place
PREFIXES = (
    ("lfm.", "model."), ("ernie.", "model."), ("bert.", ""), ("roberta.", ""), ("distilbert.", ""),
    ("transformer.", ""), ("model.", ""), ("model.", "backbone."), ("model.backbone.", "backbone."), ("", "model."),
    ("model.model.", "model."),
)  # fmt: skip
WRAPPERS = ("language_model.", "text_model.", "thinker.", "llm.")
# a module that holds several weights -> the modules of the same weights apart
TOGETHER = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# a tensor that holds several weights -> the tensors of the same weights apart, in its order
FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
    "ffn_up": ("ffn_gate", "ffn_up"),
}


def is_other_tower(path: str) -> bool:
    """Return whether the module belongs to a vision or audio tower, not to the text model."""
    return path.startswith(OTHER_TOWERS_START) or any(part in path for part in OTHER_TOWERS)


def why_skipped(path: str, hparams: Hparams) -> str | None:
    """Return the reason why a module has no place in a text model's GGUF, or None."""
    if hparams.is_tower:
        return why_left_to_others(path, hparams)
    if is_other_tower(path):
        return NOWHERE if any(part in path for part in GENERATION) else WAITING
    if re.match(r"(model\.)?mtp[._]", path):
        return "multi-token prediction, which the GGUF does not hold"
    if ARCHITECTURES[hparams.architecture].headless and re.match(r"(\w+\.)?(pooler|cls|vocab_\w+)(\.|$)", path):
        return "a head, which the GGUF of an encoder does not hold"
    n_layers, layer = hparams.get("block_count"), layer_of(path)
    extra = hparams.get("config.num_nextn_predict_layers")
    if hparams.tensors is None and extra and layer is not None and n_layers and layer >= n_layers:
        return "multi-token prediction, which the GGUF may not hold"
    return None


def why_left_to_others(path: str, hparams: Hparams) -> str | None:
    """Return the reason why a module has no place in an mmproj, or None."""
    if outs(path, hparams):
        return None
    if not is_other_tower(path):
        return "part of the text model, which an mmproj does not hold"
    if any(part in path for part in GENERATION):
        return NOWHERE
    for kind, words in TOWER_WORDS.items():
        if re.search(words, path) and not hparams.get(f"has_{kind}_encoder"):
            return f"part of the model's {kind} tower, which this mmproj does not hold"
    return None


def within(path: str, hparams: Hparams) -> str | None:
    """Return a module's path within the text model, its layer counted through all stacks; None where it stands in
    another model of the class."""
    row = ARCHITECTURES[hparams.architecture]
    if row.root:
        head, found, tail = path.partition(row.root)
        if not found or head not in ("", "model.") or tail.startswith("code_predictor."):
            return None
        path = tail
    for i, stack in enumerate(row.stacks):
        match = re.fullmatch(rf"(.*){stack}\.layers\.(\d+)(\..+)", path)
        if match:
            n = hparams.get("hrm.layers_per_stack") or 0
            return f"{match[1]}layers.{int(match[2]) + i * n}{match[3]}"
    return path


def outward(path: str, hparams: Hparams) -> str:
    """Return ``path``, a module's within the text model, as the class calls it: ``within`` undone."""
    row = ARCHITECTURES[hparams.architecture]
    n, layer = hparams.get("hrm.layers_per_stack"), layer_of(path)
    if row.stacks and layer is not None and isinstance(n, int) and n:
        path = path.replace(f"layers.{layer}.", f"{row.stacks[layer // n]}.layers.{layer % n}.", 1)
    return row.root + path


def layer_of(path: str) -> int | None:
    """Return the number of the layer that the module stands in: the first number in its path."""
    match = LAYER.search(path)
    return int(match[1]) if match else None


@lru_cache(maxsize=1)
def name_map() -> dict[str, tuple[tuple[object, str], ...]]:
    """Return module path with ``{bid}`` for the layer -> (tensor enum, GGUF name with ``{bid}``) pairs, over all
    architectures."""
    from gguf.constants import TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    found: dict[str, list] = {}
    for mappings in (TensorNameMap.mappings_cfg, TensorNameMap.block_mappings_cfg):
        for tensor, paths in mappings.items():
            for path in dict.fromkeys(paths):
                found.setdefault(path, []).append((tensor, TENSOR_NAMES[tensor]))
    for path, names in OWN_NAMES.items():
        found.setdefault(path, []).extend((None, name) for name in names)
    return {path: tuple(tensors) for path, tensors in found.items()}


@lru_cache(maxsize=8)
def tensors_of(architecture: str) -> frozenset | None:
    """Return the tensors that the architecture has; None where the gguf package does not know it."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS

    known = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    return None if known is None else frozenset(MODEL_TENSORS[known])


def has_head(architecture: str) -> bool:
    """Return whether a model of the architecture may have a head that is not its embedding."""
    allowed = tensors_of(architecture)
    return allowed is None or any(tensor.name == "OUTPUT" for tensor in allowed)


def candidates(path: str) -> Iterator[str]:
    """Yield the paths under which the name map may know a module."""
    for wrapper in WRAPPERS:
        path = path.replace(wrapper, "")
    yield path
    for old, new in PREFIXES:
        if path.startswith(old):
            yield new + path.removeprefix(old)


def tensor_name(path: str, hparams: Hparams) -> str | None:
    """Return the GGUF name of the weight of the module at ``path``; None where the name map knows none.

    The architecture's own tensors come first, but a base GGUF must have the tensor; what only the base has comes next.
    """
    layer = layer_of(path)
    allowed = tensors_of(hparams.architecture)
    own: list[str] = []
    others: list[str] = []
    for candidate in candidates(path):
        template = candidate if layer is None else LAYER.sub(".{bid}.", candidate, count=1)
        known = [(*entry, ".weight") for entry in name_map().get(template, ())]
        known += [(*entry, "") for entry in name_map().get(f"{template}.weight", ())]
        for tensor, name, suffix in known if allowed is None else reversed(known):
            (own if allowed is None or tensor in allowed else others).append(name.format(bid=layer) + suffix)
    if hparams.tied and path.rpartition(".")[2] == "lm_head":
        return HEAD
    present = [name for name in own + others if not hparams.lacks(name, default=True)]
    within_another = [name for name in others if fused_name(name, hparams)]
    return next(iter(present or own or within_another), None)


def fused_name(name: str, hparams: Hparams) -> str | None:
    """Return the name of the base's tensor that holds the weight ``name`` beside others; None where it has none."""
    block, _, stem = name.removesuffix(".weight").rpartition(".")
    for fused, parts in FUSED.items():
        whole = f"{block}.{fused}.weight"
        if stem in parts and not hparams.lacks(whole, default=True) and hparams.lacks(f"{block}.{parts[0]}.weight"):
            down = f"{block}.ffn_down.weight"  # whose columns are the rows of a gate, or of what has none
            plain = fused == "ffn_up" and not hparams.lacks(down) and _n_out(whole, hparams) == hparams.shape(down)[-1]
            return None if plain else whole
    return None


def split_expert(path: str) -> tuple[str, int | None]:
    """Return the path of all experts' module and the number of this one: ``experts.7.w1`` is ``experts.w1``, 7. Gemma
    3n's projections between its streams are stacked likewise."""
    if match := ALTUP.fullmatch(path):
        return match["head"], int(match["slot"])
    match = EXPERT.fullmatch(path)
    if not match:
        return path, None
    return f"{match['head']}.{match['tail'] or match['list']}", int(match["slot"] or match["index"])


def pieces(path: str, shape: tuple[int, int], hparams: Hparams) -> list[Piece]:
    """Return where the weight of the module at ``path``, of ``shape`` (out, in), goes; empty where its name is not
    known.

    Raises ``ValueError`` where the shape is not what the base's dimensions make it, ``MalformedError`` where the base
    lacks a dimension.
    """
    whole, slot = split_expert(path)
    apart = apart_in_base(whole, shape, hparams)
    if apart:
        return [
            part for name, first, n in apart for part in shifted(pieces(name, (n, shape[1]), hparams), first, n, slot)
        ]
    found = []
    for out in plain_in_base(outs(whole, hparams), whole, hparams):
        name = out_name(out, whole, slot, hparams)
        if name is None:
            return []
        found += [in_base(piece, shape[0], hparams) for piece in out_pieces(out, name, whole, slot, shape, hparams)]
    return found


def shape_in_base(path: str, hparams: Hparams) -> tuple[int, int] | None:
    """Return (out, in) of the module's weight in Hugging Face's layout, from the base's tensors; None where it has none
    for it."""
    whole, slot = split_expert(path)
    n_rows = n_cols = 0
    for out in plain_in_base(outs(whole, hparams), whole, hparams):
        name = out_name(out, whole, slot, hparams)
        name = EMBEDDING if name == HEAD and hparams.tied else name
        if name is None or hparams.lacks(name, default=True):
            return None
        shape = hparams.shape(name)
        rows, n_cols = (shape[-1], shape[-2]) if out.transpose else (shape[-2] if len(shape) > 1 else 1, shape[-1])
        n_rows += rows * (shape[0] if out.slots else 1)
    return n_rows, n_cols


def outs(path: str, hparams: Hparams) -> tuple[Out, ...]:
    """Return the rule of the architecture, or of all, for ``path``; a single plain tensor where there is none."""
    if hparams.is_tower:
        names = projectors(hparams.values, hparams.label)
        width = hparams.get(f"{'audio' if 'audio' in path else 'vision'}.embedding_length")
        return tower_outs(path, names, hparams.tensors or {}, width)
    row = ARCHITECTURES.get(hparams.architecture, Architecture())
    for rule in row.rules + (() if row.fused_experts else FUSED_EXPERTS):
        if re.search(rf"(^|\.){rule.pattern}$", path) and (rule.needs is None or hparams.get(rule.needs)):
            return rule.outs
    return (Out(),)


def block_name(layer: int | None, tensor: str) -> str:
    return f"{tensor}.weight" if layer is None else f"blk.{layer}.{tensor}.weight"


def plain_in_base(found: tuple[Out, ...], path: str, hparams: Hparams) -> tuple[Out, ...]:
    """Return ``found``, or one plain tensor where the base is of an older layout, from before those tensors were
    split.
    """
    layer = layer_of(path)
    if (
        hparams.is_tower
        or hparams.tensors is None
        or not all(out.tensor and hparams.lacks(block_name(layer, out.tensor)) for out in found)
    ):
        return found
    return (Out(),) if tensor_name(path, hparams) in hparams.tensors else found


def out_name(out: Out, path: str, slot: int | None, hparams: Hparams) -> str | None:
    """Return the GGUF name of ``out``; an expert of a layer that is dense in the base has the dense layer's name."""
    if hparams.is_tower:
        return file_name(out)
    layer = layer_of(path)
    if out.tensor:
        own = block_name(layer, out.tensor)
        return block_name(layer, out.instead) if out.instead and hparams.lacks(own) else own
    name = tensor_name(path, hparams)
    stem = EXPERT_TENSORS.get(path.rpartition(".")[2]) if re.search(r"(^|\.)(experts|moe)\.[^.]+$", path) else None
    if stem and (name is None or hparams.lacks(name)):
        stacked, dense = (f"blk.{layer}.{part}.weight" for part in (stem, stem.removesuffix("_exps")))
        return dense if slot == 0 and hparams.lacks(stacked) and not hparams.lacks(dense) else stacked
    return name


def out_pieces(
    out: Out, name: str, path: str, slot: int | None, shape: tuple[int, int], hparams: Hparams
) -> list[Piece]:
    """Return the pieces of one ``out``: one, or one for each of its slots."""
    dims = hparams.dims(layer_of(path))
    rows, cols = (gather(ops, n, dims) for ops, n in ((out.rows, shape[0]), (out.cols, shape[1])))
    scale = None if out.scale is None else out.scale(shape[0] if rows is None else len(rows), dims)
    if not name.endswith(STACKED):
        slot = None
    if out.slots is None:
        return [Piece(name, rows, cols, scale, out.transpose, slot, shift=out.shift)]
    index = (np.arange(shape[0]) if rows is None else rows).reshape(dims(out.slots), -1)
    return [Piece(name, part, cols, scale, out.transpose, i) for i, part in enumerate(index)]


def gather(ops: Any, n: int, dims: Any) -> np.ndarray | None:
    """Return the index array that a chain of operations makes of ``n`` rows or columns; None where there is no
    operation.
    """
    if not ops:
        return None
    index = np.arange(n)
    for op in ops:
        index = op(index, dims)
    return index


def apart_in_base(path: str, shape: tuple[int, int], hparams: Hparams) -> list[tuple[str, int, int]]:
    """Return the modules (path, first row, rows) that a module of several weights is in the base; empty where it is one
    there too."""
    head, _, tail = path.rpartition(".")
    if tail not in TOGETHER or hparams.is_tower or hparams.tensors is None or len(outs(path, hparams)) > 1:
        return []
    name = tensor_name(path, hparams)
    paths = [f"{head}.{part}" for part in TOGETHER[tail]]
    names = [tensor_name(part, hparams) for part in paths]
    if any(part is None or hparams.lacks(part) for part in names):
        return []
    sizes = [hparams.tensors[part].shape[-2] for part in names if part is not None]
    if (name in hparams.tensors and hparams.tensors[name].shape[-2] == shape[0]) or sum(sizes) != shape[0]:
        return []
    return list(zip(paths, np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))


def shifted(parts: list[Piece], first: int, n: int, slot: int | None) -> list[Piece]:
    """Return pieces of rows ``first`` to ``first + n`` of a weight as pieces of that weight."""
    return [
        replace(
            piece,
            rows=first + (np.arange(n) if piece.rows is None else piece.rows),
            slot=piece.slot if slot is None else slot,
        )
        for piece in parts
    ]


def in_base(piece: Piece, n_rows: int, hparams: Hparams) -> Piece:
    """Return ``piece``, or its place in the tensor that holds several weights where the base has only that."""
    name = fused_name(piece.name, hparams)
    if name is None:
        return piece
    stems = [full.removesuffix(".weight").rpartition(".")[2] for full in (name, piece.name)]
    parts, stem = FUSED[stems[0]], stems[1]
    n, total = n_rows if piece.rows is None else len(piece.rows), _n_out(name, hparams)
    if total > n:
        after = sum(part_rows(part, n, hparams) for part in parts[parts.index(stem) + 1 :])
        return replace(piece, name=name, offset=0 if stem == parts[0] else total - n - after)
    return piece


def _n_out(name: str, hparams: Hparams) -> int:
    """The rows of a tensor of the base, or of each matrix of a stack; a vector has one."""
    return (1, 1, *hparams.shape(name))[-2]


def gguf_pieces(name: str, n_rows: int, hparams: Hparams) -> list[Piece]:
    """Return where ``n_rows`` rows under a GGUF name go in a base that may hold several weights in one tensor, or them
    apart.
    """
    block, _, stem = name.removesuffix(".weight").rpartition(".")
    parts = [f"{block}.{part}.weight" for part in FUSED.get(stem, ())]
    if parts and not any(hparams.lacks(part, default=True) for part in parts):
        sizes = [_n_out(part, hparams) for part in parts]
        if sum(sizes) == n_rows:
            starts = np.cumsum([0, *sizes])
            return [Piece(part, np.arange(starts[i], starts[i + 1])) for i, part in enumerate(parts)]
    return [in_base(Piece(name), n_rows, hparams)]


def part_rows(part: str, n: int, hparams: Hparams) -> int:
    """Return the rows of ``part`` of a fused tensor, where the part before it has ``n``."""
    heads, width = hparams.get("attention.head_count_kv"), hparams.get("attention.value_length")
    return heads * width if part == "attn_v" and isinstance(heads, int) and isinstance(width, int) else n
