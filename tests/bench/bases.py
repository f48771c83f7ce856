"""The bases that the fidelity benchmark merges into: as published, and requantized by libgguf to other types."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from libgguf import quantize_rows

from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, raw_key_values
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.quants.ggml import BY_NAME
from tests.bench.oracle import decoded

# what llama.cpp takes for rows that are not a multiple of 256
FALLBACKS = {"Q2_K": "IQ4_NL", "Q4_K": "Q5_0", "Q6_K": "Q8_0"}


def requantized(source: Path, target: Path, type_name: str, imatrix: Imatrix | None = None) -> Path:
    """A copy of ``source`` with its Q4_1 tensors in ``type_name``, quantized with an ``imatrix`` if there is one.

    The weights first get uniform noise of one of their own steps: on the grid that they lie on, a second quantization
    would find that grid again and lose nothing.
    """
    with GgufReader(source) as reader:
        specs = [TensorSpec(i.name, type_of(i, type_name), i.shape) for i in reader.tensors.values()]
        with GgufWriter(target, raw_key_values(reader), specs, force=True) as writer:
            for info in reader.tensors.values():
                raw = reader.read(info)
                if info.type.name == "Q4_1":
                    weights = broken_grid(decoded(reader, info), raw, info.name)
                    importance = (
                        imatrix.importance[info.name][0] if imatrix and info.name in imatrix.importance else None
                    )
                    raw = encoded(weights, writer.tensors[info.name].type, importance)
                writer.write(writer.tensors[info.name], 0, np.ascontiguousarray(raw))
            writer.commit()
    return target


def type_of(info, type_name: str):
    if info.type.name != "Q4_1":
        return info.type
    return BY_NAME[type_name if info.n_cols % BY_NAME[type_name].block_size == 0 else FALLBACKS[type_name]]


def broken_grid(weights: np.ndarray, raw: np.ndarray, name: str) -> np.ndarray:
    step = raw.reshape(len(raw), -1, 20)[:, :, :2].copy().view(np.float16).astype(np.float32)
    noise = np.random.default_rng(zlib.crc32(name.encode())).uniform(-0.5, 0.5, weights.shape).astype(np.float32)
    return weights + noise * np.repeat(step[:, :, 0], 32, axis=1)


def encoded(weights: np.ndarray, type, importance: np.ndarray | None = None) -> np.ndarray:
    if type.name == "F32":
        return weights
    if type.name == "BF16":
        bits = weights.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.asarray(quantize_rows(weights, type.id, imatrix=importance)).view(np.uint8).reshape(len(weights), -1)
