"""How far apart the values are that a type can tell apart: the step, against which an update is large or small."""

from __future__ import annotations

import numpy as np

from lora_gguf.files.base import Base, evenly
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.quants.codec import Codec
from lora_gguf.quants.table import CODECS

STEP_ROWS = 16


def planned_step(tensor: TensorPlan, base: Base) -> tuple[float, float]:
    """Return the rms step of the type that a changed tensor gets, NaN where it has no steps, and the rms of its weights
    in the base, from some rows.
    """
    blocks, source, target = sample(base, tensor.source), tensor.wanted.source, tensor.wanted.target
    weight = rms(source.decoded(blocks))
    if not has_steps(target):
        return float("nan"), weight
    return step_rms(target, blocks if source is target else _encoded(tensor, blocks)), weight


def stored_step(base: Base, info: TensorInfo) -> float:
    """Return the rms step of a tensor as it is in a file, from some rows; NaN where its type has no steps."""
    quant = CODECS.get(info.type.name)
    return step_rms(quant, sample(base, info)) if quant and has_steps(quant) else float("nan")


def weight_rms(base: Base, info: TensorInfo) -> float:
    """Return the rms of a tensor's weights, from some rows; NaN where its type cannot be read."""
    quant = CODECS.get(info.type.name)
    return rms(quant.decoded(sample(base, info))) if quant else float("nan")


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def has_steps(codec: Codec) -> bool:
    """Tell whether a type has steps: a grid, or the values of a half."""
    return codec.grid is not None or codec.half is not None


def step_rms(codec: Codec, blocks: np.ndarray) -> float:
    """Return the rms of ``steps_of``."""
    return rms(steps_of(codec, blocks))


def sample(base: Base, info: TensorInfo, n_rows: int = STEP_ROWS) -> np.ndarray:
    """Return up to ``n_rows`` rows, evenly spaced, as stored: uint8 (rows, row_bytes)."""
    return base.rows(info, evenly(info.n_rows, n_rows))


def steps_of(codec: Codec, blocks: np.ndarray) -> np.ndarray:
    """Return the steps of ``blocks`` uint8 (rows, row_bytes) of a type that has some: f32, one for each group of
    weights, or for each weight of a half.
    """
    steps = np.empty(0, np.float32)
    if codec.half:
        weights, least = codec.decoded(blocks), codec.half.least_exponent
        exponents = np.where(weights == 0, least, np.frexp(weights)[1] - 1)
        steps = np.ldexp(np.float32(1), np.maximum(exponents, least) - codec.half.bits)
    elif grid := codec.grid:
        n_cols = blocks.shape[1] // codec.type.block_bytes * codec.type.block_size
        steps = np.empty((len(blocks), n_cols // grid.group), np.float32)
        grid.unpack(blocks, np.empty((len(blocks), n_cols), np.int8), steps)
        if grid.levels is not None:
            steps = steps * np.sqrt(np.mean(np.square(np.diff(grid.levels.astype(np.float32)))))
    return steps


def _encoded(tensor: TensorPlan, blocks: np.ndarray) -> np.ndarray:
    """Return rows of the base as the merge's target type stores them, but for the update."""
    recipe = tensor.wanted
    importance = np.ones(tensor.source.n_cols if recipe.target.needs_importance else 0, np.float32)
    return recipe.target.encoded(recipe.source.decoded(blocks), importance)
