"""Which input columns of a tensor matter: measured by an imatrix, or guessed from the weights alone.

The residual stream of a language model has a few columns of huge activations, in which one unit of weight noise does
most of the damage. The matrices that read them have learned small weights there: measured on SmolLM2 135M and Gemma 3
270M, the eight columns with the smallest weights in ``attn_v`` and ``ffn_up`` hold 0.8 to 0.9 of the activation energy
that the eight largest hold. So the guess is a negative power of the columns' mean squares.

What makes these activations is a column of some layers' ``ffn_down``: one input, large at the first token, times a few
huge weights ("super weights", Yu et al. 2024, arXiv 2411.07191). The weights that write the residual's heaviest columns
tell it.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from lora_gguf.files.base import Base, evenly
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.merging.chunks import Weigh
from lora_gguf.merging.refit import Weighting, weighting
from lora_gguf.merging.tensor import TensorPlan
from lora_gguf.quants.codec import Codec
from lora_gguf.quants.table import CODECS

POWER = -1.5
ENERGY_ROWS = 64
FLOOR = 1e-3  # of the median: columns of zeros say nothing
# who reads the residual stream in a layer, and which of these tell its large columns best
_RESIDUAL = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps",
    "ffn_gate_shexp", "ffn_up_shexp",
)  # fmt: skip
_TELLING = (("attn_v", "attn_qkv"), ("ffn_up", "ffn_up_exps", "ffn_gate_up_exps"))
_WRITES = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")
# in the guess: it finds the heaviest columns and makes too much of them
TRUST = 0.98
HEAVIEST = 8  # columns of the residual stream
_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def weigher(base: Base) -> Weigh:
    """Return what tells the weighting of each matrix of a tensor; it remembers what it sampled."""
    energies: dict[str, np.ndarray] = {}

    def weigh(tensor: TensorPlan) -> list[Weighting]:
        importances = importance_of(base, tensor.source.name, tensor.wanted.importance, energies)
        return [weighting_of(tensor.wanted.target, importance) for importance in importances]

    return weigh


def weighting_of(codec: Codec, importance: np.ndarray) -> Weighting:
    """Return the weighting of columns of ``importance`` f32 (cols,) on the grid of a type."""
    group = codec.grid.group if codec.grid else codec.type.block_size
    return weighting(importance, codec.type.block_size, group, len(codec.scales_at))


@functools.cache
def even_weighting(type_name: str, n_cols: int) -> Weighting:
    """Return the weighting of ``n_cols`` columns that all count alike."""
    return weighting_of(CODECS[type_name], np.ones(n_cols, np.float32))


def importance_of(base: Base, name: str, measured: np.ndarray | None, energies: dict[str, np.ndarray]) -> np.ndarray:
    """Return the importance of a tensor's columns, f32 (matrices, cols), mean 1; ``measured`` is what an imatrix says
    of it, ``energies`` keeps samples.
    """
    info = base.tensors[name]
    guess = (
        guessed(base, name, energies) * super_columns(base, name, energies)
        if measured is None
        else measured.astype(np.float64)
    )
    scaled = guess / np.maximum(guess.mean(axis=-1, keepdims=True), 1e-30)
    if measured is None:
        scaled = 1 - TRUST + TRUST * scaled
    return np.ascontiguousarray(np.broadcast_to(scaled, (info.n_rows // (1, *info.shape)[-2], info.n_cols)), np.float32)


def guessed(base: Base, name: str, energies: dict[str, np.ndarray]) -> np.ndarray:
    """Return the guess for one tensor, (cols,)."""
    match = _NAME.fullmatch(name)
    telling: list[str] = []
    if match and match[2] in _RESIDUAL:
        candidates = [[f"blk.{match[1]}.{kind}.weight" for kind in kinds] for kinds in _TELLING]
        found = (next((n for n in group if _fits(base, n, name)), None) for group in candidates)
        telling = [n for n in found if n]
    telling = telling or [name]
    energy = np.ones(base.tensors[name].n_cols)
    for tensor in telling:
        if tensor not in energies:
            energies[tensor] = column_energy(base, base.tensors[tensor])
        energy = energy * energies[tensor] ** (1 / len(telling))
    return np.power(energy, POWER * 2 if len(telling) > 1 else POWER)


def super_columns(base: Base, name: str, energies: dict[str, np.ndarray]) -> np.ndarray | float:
    """Tell how far the columns of a tensor that writes the residual stream stand out in the rows of its heaviest
    columns: (matrices, cols).

    1 for other tensors, and where nothing tells these columns.
    """
    match = _NAME.fullmatch(name)
    if not match or match[2] not in _WRITES:
        return 1.0
    info = base.tensors[name]
    readers = (f"blk.{layer}.{kind}.weight" for layer in (int(match[1]) + 1, int(match[1])) for kind in _RESIDUAL)
    next_reader = next((n for n in readers if n in base.tensors and _readable(base.tensors[n], info.shape[-2])), None)
    if next_reader is None:
        return 1.0
    heavy = np.argsort(-guessed(base, next_reader, energies), kind="stable")[:HEAVIEST]
    found = np.empty((info.n_rows // info.shape[-2], info.n_cols))
    for matrix, factors in enumerate(found):
        squares = np.square(decoded_rows(base, info, matrix * info.shape[-2] + heavy), dtype=np.float64)
        largest = (squares / np.maximum(squares.mean(axis=1, keepdims=True), 1e-30)).max(axis=0)
        factors[:] = np.square(np.maximum(largest / max(np.median(largest), 1e-30), 1.0))
    return found


def _fits(base: Base, name: str, like: str) -> bool:
    return name in base.tensors and _readable(base.tensors[name], base.tensors[like].n_cols)


def _readable(info: TensorInfo, n_cols: int) -> bool:
    return info.n_cols == n_cols and info.type.name in CODECS


def column_energy(base: Base, info: TensorInfo) -> np.ndarray:
    """Return the mean square of each column, (cols,), from some rows, relative to their median."""
    energy = np.square(decoded_rows(base, info, evenly(info.n_rows, ENERGY_ROWS)), dtype=np.float64).sum(axis=0)
    median = np.median(energy)
    return np.maximum(energy / median, FLOOR) if np.isfinite(median) and median > 0 else np.ones(info.n_cols)


def decoded_rows(base: Base, info: TensorInfo, rows: np.ndarray) -> np.ndarray:
    """Return some rows of a tensor, f32 (rows, cols)."""
    weights = np.empty((len(rows), info.n_cols), np.float32)
    CODECS[info.type.name].decode(base.rows(info, rows), weights)
    return weights
