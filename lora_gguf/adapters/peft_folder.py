"""Write an adapter as PEFT does: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lora_gguf.adapters.adapter_config import NAME
from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.spellings import PREFIX
from lora_gguf.errors import FileError, printable
from lora_gguf.files.output import write_bytes

WEIGHTS = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # whose layout of packed experts this is
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tok_embeddings", "embed")
ROUTERS = ("gate", "router", "wg")
# the order in which modules of packed experts register their parameters: the last is outermost
OUTERMOST = ("down_proj", "output_linear", "w2")


def is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in EMBEDDINGS


def is_router(path: str) -> bool:
    return path.rpartition(".")[2] in ROUTERS and "shared_expert" not in path


def factors(pair: LoraPair, in_out: bool) -> dict[str, np.ndarray]:
    """Return the tensors of one module's update, by PEFT's names; ``in_out``: packed experts lie (E, in, out)."""
    path = PREFIX + pair.name
    if pair.a.ndim == 3:
        head, _, name = path.rpartition(".")
        inner = "" if name in OUTERMOST else ".base_layer"
        a, b = (pair.b.swapaxes(1, 2), pair.a.swapaxes(1, 2)) if in_out else (pair.a, pair.b)
        flat_b = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        return {f"{head}{inner}.lora_A.weight": a.reshape(-1, a.shape[2]), f"{head}{inner}.lora_B.weight": flat_b}
    if is_embedding(pair.name):
        return {f"{path}.lora_embedding_A": pair.b.T, f"{path}.lora_embedding_B": pair.a.T}
    return {f"{path}.lora_A.weight": pair.a, f"{path}.lora_B.weight": pair.b}


def tensors_of(pairs: Sequence[LoraPair], in_out: bool = False) -> dict[str, np.ndarray]:
    """Return all tensors of the adapter file. A module of packed experts that has one update only has no inner one."""
    found = {key: array for pair in pairs for key, array in factors(pair, in_out).items()}
    lone = {key for key in found if ".base_layer." in key and key.replace(".base_layer", "") not in found}
    return {key.replace(".base_layer", "") if key in lone else key: array for key, array in found.items()}


def config_of(pairs: Sequence[LoraPair], base_model: str, *, turned: bool = False) -> dict[str, object]:
    """Return ``adapter_config.json``: one rank and alpha for most modules, patterns for the others.

    ``turned`` says that the base's class declares Conv1D layers, which hold their weights turned.
    """
    alphas = {pair.name: pair.scale * pair.rank for pair in pairs}
    rank = Counter(pair.rank for pair in pairs).most_common(1)[0][0]
    alpha = Counter(alphas[pair.name] for pair in pairs if pair.rank == rank).most_common(1)[0][0]
    parameters = [pair.name for pair in pairs if pair.a.ndim == 3]
    parameters += [f"{pair.name}.weight" for pair in pairs if pair.a.ndim == 2 and is_router(pair.name)]
    modules = [pair.name for pair in pairs if pair.name not in parameters and f"{pair.name}.weight" not in parameters]
    named = {pair.name: name_in(pair.name, parameters) for pair in pairs}
    return {
        "alpha_pattern": {named[pair.name]: alphas[pair.name] for pair in pairs if alphas[pair.name] != alpha},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "ensure_weight_tying": any(pair.shared for pair in pairs),
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": {named[pair.name]: pair.rank for pair in pairs if pair.rank != rank},
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def name_in(path: str, parameters: list[str]) -> str:
    """Return what a pattern calls the module: a parameter has its own name."""
    return f"{path}.weight" if f"{path}.weight" in parameters else path


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """Return a safetensors file of f32 ``tensors``."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in tensors.items()}
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return b"".join([struct.pack("<Q", len(raw)), raw, *(array.tobytes() for array in arrays.values())])


def write_folder(
    folder: str | os.PathLike[str],
    tensors: dict[str, np.ndarray],
    config: dict[str, object],
    *,
    force: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> list[Path]:
    """Write the two files of an adapter to ``folder``, which is made; each whole or not at all."""
    folder, inputs = Path(folder), list(inputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{printable(folder)}: cannot make it: {error.strerror}: name another folder") from error
    content = {
        folder / WEIGHTS: safetensors_bytes(tensors),
        folder / NAME: (json.dumps(config, indent=2) + "\n").encode(),
    }
    if not force and (there := [path for path in content if path.exists()]):
        raise FileError(f"{printable(there[0])}: it exists: give --force, or name another folder")
    for path, raw in content.items():
        write_bytes(path, raw, force=force, inputs=inputs)
    return list(content)
