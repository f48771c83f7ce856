"""How far apart the values are that a type can tell apart: the step, against which an update is large or small."""

from __future__ import annotations

import numpy as np

from lora_gguf.files.base import Base, evenly
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.quants.codec import Codec
from lora_gguf.quants.table import CODECS

STEP_ROWS = 16


def planned_step(tensor: TensorPlan, base: Base) -> float:
    """The rms step of the type that a changed tensor gets, from some rows; NaN where its weights are not coded one by
    one.
    """
    target = tensor.recipe.target
    if not has_steps(target):
        return float("nan")
    blocks = sample(base, tensor.source)
    return step_rms(target, blocks if tensor.recipe.source is target else _encoded(tensor, blocks))


def stored_step(base: Base, info: TensorInfo) -> float:
    """The rms step of a tensor as it is in a file, from some rows; NaN where its weights are not coded one by one."""
    quant = CODECS.get(info.type.name)
    return step_rms(quant, sample(base, info)) if quant and has_steps(quant) else float("nan")


def has_steps(quant: Codec) -> bool:
    return quant.grid is not None or quant.half is not None


def step_rms(quant: Codec, blocks: np.ndarray) -> float:
    """The rms of ``steps_of``."""
    return float(np.sqrt(np.mean(np.square(steps_of(quant, blocks), dtype=np.float64))))


def sample(base: Base, info: TensorInfo, n_rows: int = STEP_ROWS) -> np.ndarray:
    """Up to ``n_rows`` rows, evenly spaced, as stored: uint8 (rows, row_bytes)."""
    return base.rows(info, evenly(info.n_rows, n_rows))


def steps_of(quant: Codec, blocks: np.ndarray) -> np.ndarray:
    """The steps of ``blocks`` uint8 (rows, row_bytes): f32, one for each group of weights, or for each weight of a
    float.
    """
    n_cols = blocks.shape[1] // quant.type.block_bytes * quant.type.block_size
    if quant.grid is None:
        weights = np.empty((len(blocks), n_cols), np.float32)
        quant.decode(blocks, weights)
        bits, least = quant.half.bits, quant.half.least_exponent
        exponents = np.where(weights == 0, least, np.frexp(weights)[1] - 1)
        return np.ldexp(np.float32(1), np.maximum(exponents, least) - bits)
    codes, steps = (
        np.empty((len(blocks), n_cols), np.int8),
        np.empty((len(blocks), n_cols // quant.grid.group), np.float32),
    )
    quant.grid.unpack(blocks, codes, steps)
    return (
        steps
        if quant.grid.levels is None
        else steps * np.sqrt(np.mean(np.square(np.diff(quant.grid.levels.astype(np.float32)))))
    )


def _encoded(tensor: TensorPlan, blocks: np.ndarray) -> np.ndarray:
    """Rows of the base as the merge's target type stores them, but for the update."""
    source, target, n_cols = tensor.recipe.source, tensor.recipe.target, tensor.source.n_cols
    weights = np.empty((len(blocks), n_cols), np.float32)
    source.decode(blocks, weights)
    encoded = np.empty((len(blocks), target.type.row_bytes(n_cols)), np.uint8)
    target.encode(weights, np.ones(n_cols if target.needs_importance else 0, np.float32), encoded)
    return encoded
