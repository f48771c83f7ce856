"""Rows merged without a file: a chunk of a made-up tensor, its update given whole."""

from __future__ import annotations

import numpy as np

from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.merging.chunks import Chunk
from lora_gguf.merging.refit import Weighting
from lora_gguf.merging.rounding import tensor_key
from lora_gguf.merging.rows import move, renew
from lora_gguf.merging.tensor import Recipe, TensorPlan
from lora_gguf.quants.table import CODECS


def recipe(source: str, rounding: str = "auto", target: str = "", seed: int = 0) -> Recipe:
    """How rows of type ``source`` become rows of ``target``, by default the same."""
    return Recipe(CODECS[source], CODECS[target or source], rounding, tensor_key(seed, "t"))


def chunk_of(how: Recipe, shape: tuple[int, int], first: int = 0, weighting: Weighting | None = None) -> Chunk:
    """The rows ``first`` to ``first + shape[0]`` of a tensor."""
    source, target = (TensorInfo("t", codec.type, shape, 0) for codec in (how.source, how.target))
    return Chunk(TensorPlan(source, target, recipe=how), first, shape[0], weighting=weighting)


def merged(how: Recipe, blocks: np.ndarray, delta: np.ndarray, first: int = 0, weighting: Weighting | None = None):
    """The rows ``blocks`` (which stay as they are) with ``delta`` f32 (rows, cols) added, and their sums."""
    way = move if how.keeps_grid else renew
    return way(chunk_of(how, delta.shape, first, weighting), blocks.copy(), delta.copy())
