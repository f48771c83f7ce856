"""The base model's dimensions: from the header of its GGUF, or from ``config.json`` where there is none."""

from __future__ import annotations

from collections.abc import Callable

from lora_gguf.architectures import ARCHITECTURES
from lora_gguf.errors import MalformedError, UnsupportedError, printable
from lora_gguf.gguf_reader import GgufReader, TensorInfo

# GGUF key without the architecture -> names in config.json, the first that is there counts
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "embedding_length": ("hidden_size", "n_embd", "d_model", "dim"),
    "attention.head_count": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
}
# key -> the key whose value it has where the file does not say
DEFAULTS = {"attention.head_count_kv": "attention.head_count"}
TEXT_CONFIGS = ("text_config", "llm_config", "lm_config", "language_config")


class Hparams:
    """``architecture`` as GGUF names it, ``tensors`` of the base where its GGUF is there, and the hyperparameters."""

    def __init__(self, architecture: str, look_up: Callable, tensors: dict[str, TensorInfo] | None, label: str):
        self.architecture, self.tensors, self.label, self._look_up = architecture, tensors, label, look_up

    def get(self, key: str, layer: int | None = None):
        """The value of ``key``, of ``layer`` where it differs by layer; None where the base does not say."""
        value = self._look_up(key)
        if isinstance(value, list):
            value = value[layer] if layer is not None and layer < len(value) else None
        if value is None and key in DEFAULTS:
            return self.get(DEFAULTS[key], layer)
        return value

    def dims(self, layer: int | None) -> Callable[[str], int]:
        """A function from a key to its value in ``layer``: a positive whole number, else ``MalformedError``."""

        def look_up(key: str) -> int:
            value = self.get(key, layer)
            if type(value) is not int or value <= 0:
                raise MalformedError(
                    f"{self.label}: {self.architecture}.{key}: expected a positive number, found {printable(value, 40)}"
                )
            return value

        return look_up


def from_base(base: GgufReader) -> Hparams:
    """The hyperparameters of an open base GGUF."""
    if not base.architecture:
        raise MalformedError(f"{base.label}: expected general.architecture, found none: it is no model")
    if base.get("general.type", "model") != "model":
        raise MalformedError(f"{base.label}: expected a model, found general.type {printable(base.get('general.type'), 40)}")
    values = {key.removeprefix(f"{base.architecture}."): base.get(key) for key in base.kv if key.startswith(f"{base.architecture}.")}
    return Hparams(base.architecture, values.get, base.tensors, base.label)


def from_config(config: dict) -> Hparams:
    """The hyperparameters in a model's ``config.json``."""
    text = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), {})

    def look_up(key: str):
        names = CONFIG_KEYS.get(key, ())
        return next((part[name] for part in (text, config) for name in names if part.get(name) is not None), None)

    return Hparams(architecture_of(config, text), look_up, None, "config.json")


def architecture_of(config: dict, text: dict) -> str:
    """The GGUF architecture of the model class that ``config.json`` names."""
    classes = text.get("architectures") or config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise MalformedError("config.json: architectures: expected the model's class, found none: give the base as a GGUF")
    for architecture, row in ARCHITECTURES.items():
        if classes[0] in row.hf:
            return architecture
    raise UnsupportedError(f"config.json: {printable(classes[0], 60)} is not supported: give the base as a GGUF")
