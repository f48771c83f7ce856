"""Read a PEFT adapter directory: its configuration, and its tensors as low-rank updates of Hugging Face modules."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_gguf import adapter_config
from lora_gguf.errors import FileError, MalformedError, NumericError, printable
from lora_gguf.lora import LoraPair, check_finite
from lora_gguf.patterns import first_match
from lora_gguf.weights import read_weights

WEIGHTS = ("adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin")
PREFIX = "base_model.model."
# a PEFT tensor: module path, factor, and the adapter's name where it was not removed when saving
TENSOR = re.compile(
    r"(?P<path>.+?)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?"
)


@dataclass
class Adapter:
    """An adapter in Hugging Face terms.

    ``pairs`` are named by module path (``model.layers.0.self_attn.q_proj``), in the layout that the module's weight has in
    Hugging Face: (out, in). ``ignored`` maps tensors that are no update to the reason.
    """

    label: str
    directory: Path
    config: dict
    pairs: list[LoraPair]
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def base_model(self) -> str:
        """What the adapter says that it was trained on; an empty string where it does not say."""
        return printable(self.config.get("base_model_name_or_path", ""), 100)


def read_adapter(directory: str | os.PathLike) -> Adapter:
    """Read ``adapter_config.json`` and the weights beside it.

    Raises ``MalformedError``, ``UnsupportedError`` (a kind of adapter), ``NumericError`` (NaN, infinity), ``FileError``.
    """
    directory = adapter_directory(directory)
    config = adapter_config.read_config(directory)
    adapter_config.check_supported(config)
    weights_path = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if weights_path is None:
        raise FileError(f"{printable(directory)}: expected {WEIGHTS[0]} or {WEIGHTS[2]}, found neither: download it again")
    tensors = {name: as_f32(name, array) for name, array in read_weights(weights_path).items()}
    check_all_finite(tensors, weights_path.name)
    pairs, ignored = lora_pairs(tensors, config, weights_path.name)
    return Adapter(printable(directory.resolve().name), directory, config, pairs, ignored)


def adapter_directory(path: str | os.PathLike) -> Path:
    """The directory that holds ``adapter_config.json``: ``path``, or the folder of the file that it names."""
    path = Path(path)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise FileError(f"{printable(path)}: no such directory: check the path")
    if (path / adapter_config.NAME).is_file():
        return path
    inner = sorted(found.parent.name for found in path.glob(f"*/{adapter_config.NAME}"))
    hint = f"use one of its folders: {printable(', '.join(inner))}" if inner else "it is no PEFT adapter"
    raise FileError(f"{printable(path)}: expected {adapter_config.NAME}, found none: {hint}")


def as_f32(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f":
        raise MalformedError(f"{printable(name)}: expected floating-point numbers, found {array.dtype}: download it again")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def check_all_finite(tensors: dict[str, np.ndarray], label: str) -> None:
    found = [place for name, array in tensors.items() if (place := check_finite(name, array, label))]
    if found:
        raise NumericError(f"{found[0]}: expected finite numbers: the adapter is broken, train or download it again", found)


def lora_pairs(tensors: dict[str, np.ndarray], config: dict, label: str) -> tuple[list[LoraPair], dict[str, str]]:
    """The updates in ``tensors``, and the tensors that are none with the reason. Raises with all offenders."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    ignored, strange = {}, []
    for name in tensors:
        match = TENSOR.fullmatch(name)
        if match:
            _add_factor(modules[module_path(match["path"])], match["factor"], name, strange)
        elif ".base_layer." in name:
            ignored[name] = "a copy of the base's own weight"
        else:
            strange.append(f"{name}: neither lora_A nor lora_B")
    pairs = []
    for path, factors in modules.items():
        try:
            pairs.append(_pair(path, factors, tensors, config))
        except MalformedError as error:
            strange.append(str(error))
    if strange:
        raise MalformedError(f"{label}: {strange[0]}", strange if len(strange) > 1 else ())
    if not pairs:
        raise MalformedError(f"{label}: expected lora_A and lora_B tensors, found none: it is no LoRA adapter")
    return pairs, ignored


def module_path(path: str) -> str:
    """The path of a module in the base model: PEFT's wrapper and compilers' wrappers stripped."""
    return path.removeprefix(PREFIX).replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def _add_factor(factors: dict[str, str], factor: str, name: str, strange: list[str]) -> None:
    if factor in factors:
        strange.append(f"{name}: the same factor as {factors[factor]}: save one adapter alone")
    factors[factor] = name


def _pair(path: str, factors: dict[str, str], tensors: dict[str, np.ndarray], config: dict) -> LoraPair:
    embedding = "lora_embedding_A" in factors or "lora_embedding_B" in factors
    wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(factors) != set(wanted):
        raise MalformedError(f"{path}: expected {wanted[0]} and {wanted[1]}, found {', '.join(factors)}: save it again")
    a, b = (tensors[factors[key]] for key in wanted)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape or 0 in b.shape:
        raise MalformedError(f"{path}: {wanted[0]} {a.shape} and {wanted[1]} {b.shape} do not multiply: save it again")
    scale = module_scale(path, a.shape[0], config)
    if embedding:
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    return LoraPair(path, a, b, scale, (factors[wanted[0]], factors[wanted[1]]))


def module_scale(path: str, rank: int, config: dict) -> float:
    """PEFT's scale of a module: alpha / r, or alpha / sqrt(r); ``rank`` is what the tensors have and must be r."""
    for required in ("r", "lora_alpha"):
        if required not in config:
            raise MalformedError(f"{adapter_config.NAME}: {required}: expected a number, found nothing: correct the file")
    expected = pattern_value(config.get("rank_pattern"), path, config["r"])
    if expected != rank:
        raise MalformedError(
            f"{path}: expected rank {expected} ({adapter_config.NAME}), found {rank}: the two files are not of one adapter"
        )
    alpha = pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def pattern_value(pattern: dict | None, path: str, default):
    """The value of the first key of ``pattern`` that matches ``path`` as in PEFT; else ``default``."""
    key = first_match(pattern, path) if pattern else None
    return default if key is None else pattern[key]
