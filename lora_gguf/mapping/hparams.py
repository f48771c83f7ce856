"""The base model's dimensions: from the header of its GGUF, or from ``config.json`` where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lora_gguf.errors import MalformedError, UnsupportedError, UsageError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader, TensorInfo
from lora_gguf.mapping.architectures import ARCHITECTURES, REFUSED, VARIANTS
from lora_gguf.mapping.likeness import likeliest
from lora_gguf.mapping.tower_names import projectors
from lora_gguf.mapping.towers import CLIP

# GGUF key without the architecture -> names in config.json, the first that is there counts
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"),
    "embedding_length": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "attention.head_count": ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads"),
    "attention.head_count_kv": (
        "num_key_value_heads_per_layer",
        "num_key_value_heads",
        "num_kv_heads",
        "n_head_kv",
        "n_kv_heads",
        "attn_config.kv_n_heads",
    ),
    "attention.key_length": ("head_dim", "attention_head_dim"),
    "attention.value_length": ("v_head_dim", "head_dim"),
    "attention.key_length_mla": (),
    "attention.value_length_mla": ("v_head_dim",),
    "expert_count": (
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "moe_num_experts",
        "ffn_config.moe_num_experts",
    ),
    "rope.dimension_count": ("qk_rope_head_dim",),
    "rescale_every_n_layers": ("rescale_every",),
    "hrm.layers_per_stack": ("num_layers_per_stack", "num_hidden_layers"),
    "attention.indexer.head_count": ("indexer_n_heads", "index_n_heads"),
    "attention.indexer.key_length": ("indexer_head_dim", "index_head_dim"),
    "rope.dimension_sections": ("rope_scaling.mrope_section", "rope_parameters.mrope_section"),
    "ssm.group_count": ("linear_num_key_heads",),
    "ssm.time_step_rank": ("linear_num_value_heads",),
    "ssm.state_size": ("linear_key_head_dim",),
    "ssm.inner_size": (),
}
TEXT_CONFIGS = ("text_config", "llm_config", "lm_config", "language_config", "thinker_config.text_config")
Get = Callable[[str], Any]


def _product(get: Get, *keys: str) -> int | None:
    values = [get(key) for key in keys]
    return math.prod(values) if all(type(value) is int for value in values) else None


def _head_dim(get: Get) -> int | None:
    width, heads = get("embedding_length"), get("attention.head_count")
    return width // heads if type(width) is int and type(heads) is int and heads else None


def _rotary_dim(get: Get) -> int | None:
    part = get("config.partial_rotary_factor") or get("config.rope_parameters.partial_rotary_factor")
    size = _head_dim(get)
    return int(size * part) if part and size is not None else None


def _latent_key(get: Get) -> int | None:
    nope, rope = get("config.qk_nope_head_dim"), get("config.qk_rope_head_dim")
    return nope + rope if type(nope) is int and type(rope) is int else None


# key -> its value where neither file says
DEFAULTS: dict[str, Callable[[Get], object]] = {
    "attention.head_count_kv": lambda get: get("attention.head_count"),
    "attention.key_length": _head_dim,
    "attention.value_length": lambda get: get("attention.key_length"),
    "attention.key_length_mla": _latent_key,
    "rope.dimension_count": _rotary_dim,
    "ssm.inner_size": lambda get: _product(get, "config.linear_num_value_heads", "config.linear_value_head_dim"),
}


class Dims:
    """The hyperparameters of one layer: ``dims(key)`` is a positive number, else ``MalformedError``."""

    def __init__(self, hparams: Hparams, layer: int | None) -> None:
        self.hparams, self.layer = hparams, layer

    def __call__(self, key: str) -> Any:
        value = self.hparams.get(key, self.layer)
        of_config = key.startswith("config.")
        if not (
            (type(value) is int and (value > 0 or of_config))
            or (of_config and type(value) is float and math.isfinite(value))
        ):
            source = "config.json" if key.startswith("config.") else self.hparams.label
            fix = (
                "give it with --base-config"
                if key.startswith("config.")
                else "the base lacks what its layout depends on"
            )
            raise MalformedError(
                f"{source}: {key.removeprefix('config.')}: expected a number, found {printable(value, 40)}: {fix}"
            )
        return value

    def block_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor of the layer's block; None where the base has none such or is not there."""
        info = (self.hparams.tensors or {}).get(f"blk.{self.layer}.{name}.weight")
        return None if info is None else info.shape

    def first(self, *keys: str) -> Any:
        """Return the first of ``keys`` that the base knows."""
        known = [key for key in keys if self.hparams.get(key, self.layer) is not None]
        return self((known or keys)[0])


class Hparams:
    """What the base is like: ``architecture`` as GGUF names it, its hyperparameters, and its ``tensors`` if its GGUF is
    there.

    The GGUF's header decides; ``config`` (config.json) is asked for what it does not say. ``stated`` is the
    architecture that the base itself names, where it borrows the layout of another.
    """

    def __init__(
        self, architecture: str, values: dict, tensors: dict[str, TensorInfo] | None, config: dict, label: str
    ) -> None:
        self.architecture, self.values, self.tensors, self.label = architecture, values, tensors, label
        self.stated = architecture
        text = next((part for key in TEXT_CONFIGS if isinstance(part := _at(config, key), dict)), {})
        self.configs = (text, config)

    def get(self, key: str, layer: int | None = None) -> Any:
        """Return the value of ``key``, of ``layer`` where it differs by layer; None where the base does not say.

        A key that starts with ``config.`` is a name in config.json.
        """
        value = self.values.get(key)
        for name in (key.removeprefix("config."),) if key.startswith("config.") else CONFIG_KEYS.get(key, ()):
            if value is None:
                value = next((found for part in self.configs if (found := _at(part, name)) is not None), None)
        if isinstance(value, list) and layer is not None and key != "rope.dimension_sections":
            value = value[layer] if layer < len(value) else None
        if value is None and key in DEFAULTS:
            return DEFAULTS[key](lambda other: self.get(other, layer))
        return value

    @property
    def is_tower(self) -> bool:
        """Whether it is an mmproj: vision and audio towers beside a text model."""
        return self.architecture == CLIP

    @property
    def kind(self) -> str:
        """What it is, in a few words: the architecture, or the projectors of an mmproj."""
        return f"{' and '.join(projectors(self.values, self.label))} mmproj" if self.is_tower else self.architecture

    @property
    def tied(self) -> bool:
        """Whether one tensor is both the embedding and the head."""
        if ARCHITECTURES[self.architecture].headless:
            return False
        if self.tensors is None:
            return any(part.get("tie_word_embeddings") is True for part in self.configs)
        return "token_embd.weight" in self.tensors and "output.weight" not in self.tensors

    def dims(self, layer: int | None) -> Dims:
        return Dims(self, layer)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the base's tensor ``name``, which it must have."""
        return (self.tensors or {})[name].shape

    def lacks(self, name: str, default: bool = False) -> bool:
        """Return whether the base has no tensor ``name``; ``default`` where its tensors are not known."""
        return default if self.tensors is None else name not in self.tensors


def _at(config: Any, path: str) -> Any:
    """The value at a dotted path; a number picks from a list. None where there is none."""
    for step in path.split("."):
        if isinstance(config, list) and step.isdigit() and int(step) < len(config):
            config = config[int(step)]
        else:
            config = config.get(step) if isinstance(config, dict) else None
    return config


def from_base(base: GgufReader | Base, config: dict | None = None, layout_of: str | None = None) -> Hparams:
    """Return the hyperparameters of an open base GGUF; ``config`` may add what its header does not say.

    ``layout_of`` is the architecture whose layout a base of an unknown one has. Raises ``MalformedError``,
    ``UnsupportedError`` for an unknown architecture, ``UsageError`` where it is known and another is given.
    """
    if not base.architecture:
        raise MalformedError(f"{base.label}: expected general.architecture, found none: it is no model")
    kind = base.get("general.type", "model")
    if kind != "model" and (kind, base.architecture) != ("mmproj", CLIP):
        raise MalformedError(
            f"{base.label}: expected a model, found general.type {printable(base.get('general.type'), 40)}: "
            "name the base model first, then the adapter"
        )
    architecture = layout_of or base.architecture
    if base.architecture in REFUSED:
        raise UnsupportedError(f"{base.label}: {base.architecture}: {REFUSED[base.architecture]}")
    if base.architecture not in ARCHITECTURES and layout_of is None:
        raise UnsupportedError(unknown(base))
    if base.architecture in ARCHITECTURES and architecture != base.architecture:
        raise UsageError(
            f"{base.label}: --layout-of {architecture}: the layout of {base.architecture} is known: leave it out"
        )
    prefix = f"{base.architecture}."
    values = {key.removeprefix(prefix): base.get(key) for key in base.kv if key.startswith(prefix)}
    if base.architecture == CLIP:
        projectors(values, base.label)
    found = Hparams(architecture, values, base.tensors, config or {}, base.label)
    found.stated = base.architecture
    return found


def unknown(base: GgufReader | Base) -> str:
    """Return why a base of an unknown architecture is refused, and what may be tried."""
    named = printable(base.architecture, 40)
    line = f"{base.label}: architecture {named}: the layout of its weights is not known to us"
    guess = likeliest(base.architecture, set(base.tensors))
    if guess is None:
        return f"{line}: give --layout-of ARCH if it is that of another architecture"
    arch, n = guess
    return f"{line}: if it is that of {arch}, whose names fit {n} of its {len(base.tensors)} tensors, give --layout-of {arch}"


def borrowed_layout(hparams: Hparams) -> list[str]:
    """Return the warning that a layout was taken on the user's word."""
    if hparams.stated == hparams.architecture:
        return []
    return [
        f"{hparams.label}: {printable(hparams.stated, 40)} is read with the layout of {hparams.architecture} "
        "(--layout-of): every shape is checked, the order of rows cannot be: try the result"
    ]


def from_config(config: dict) -> Hparams:
    """Return the hyperparameters in a model's ``config.json``."""
    architecture = architecture_of(config)
    return Hparams(architecture, key_value_heads(architecture, config), None, config, "config.json")


def key_value_heads(architecture: str, config: dict) -> dict[str, object]:
    """Return their number where ``config.json`` tells it in a way of its own."""
    if architecture == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        return {"attention.head_count_kv": 1}  # Falcon 7B, whose num_kv_heads means nothing
    blocks, heads = config.get("block_configs"), config.get("num_attention_heads")
    if architecture != "deci" or not isinstance(blocks, list) or type(heads) is not int:
        return {}
    sizes = [_at(block, "attention.n_heads_in_group") for block in blocks]
    return {"attention.head_count_kv": [heads // size if type(size) is int and size > 0 else 0 for size in sizes]}


def architecture_of(config: dict) -> str:
    """Return the GGUF architecture of the model class that ``config.json`` names."""
    text = next((part for key in TEXT_CONFIGS if isinstance(part := _at(config, key), dict)), {})
    classes = text.get("architectures") or config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise MalformedError(
            "config.json: architectures: expected the model's class, found none: give the base as a GGUF"
        )
    if classes[0] in REFUSED:
        raise UnsupportedError(f"config.json: {classes[0]}: {REFUSED[classes[0]]}")
    for architecture, row in ARCHITECTURES.items():
        if classes[0] in row.hf:
            return variant(architecture, {**config, **text})
    raise UnsupportedError(f"config.json: {printable(classes[0], 60)} is not supported: give the base as a GGUF")


def variant(architecture: str, config: dict) -> str:
    """Return the architecture that a model of one class becomes, by its configuration."""
    for (name, field), other in VARIANTS.items():
        if name == architecture and config.get(field):
            return other
    layers = config.get("layers_block_type") or config.get("layer_types")
    if architecture == "granitehybrid" and isinstance(layers, list) and "mamba" not in layers:
        return "granitemoe" if config.get("num_experts_per_tok") and config.get("num_local_experts") else "granite"
    return architecture
