"""Rows merged without a file: a chunk of a made-up tensor, its update given whole."""

from __future__ import annotations

import numpy as np

from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.merging.chunks import Changed
from lora_gguf.merging.refit import Weighting
from lora_gguf.merging.rows import move, renew
from lora_gguf.merging.tensor import Recipe, TensorPlan, tensor_key
from lora_gguf.quants.table import CODECS


def recipe(source: str, rounding: str = "auto", target: str = "", seed: int = 0) -> Recipe:
    """How rows of type ``source`` become rows of ``target``, by default the same."""
    return Recipe(CODECS[source], CODECS[target or source], rounding, tensor_key(seed, "t"))


def chunk_of(how: Recipe, shape: tuple[int, int], first: int = 0, weighting: Weighting | None = None) -> Changed:
    """The rows ``first`` to ``first + shape[0]`` of a tensor."""
    source, target = (TensorInfo("t", codec.type, shape, 0) for codec in (how.source, how.target))
    none_a, none_b = np.empty((0, shape[1]), np.float32), np.empty((shape[0], 0), np.float32)
    tensor = TensorPlan(source, target, recipe=how)
    return Changed(tensor, first, shape[0], how, 0, none_a, none_b, weighting)


def merged(how: Recipe, blocks: np.ndarray, delta: np.ndarray, first: int = 0, weighting: Weighting | None = None):
    """The rows ``blocks`` (which stay as they are) with ``delta`` f32 (rows, cols) added, and their sums."""
    way = move if how.keeps_grid else renew
    return way(chunk_of(how, delta.shape, first, weighting), blocks.copy(), delta.copy())
