"""How a Hugging Face weight becomes GGUF tensors: which of its rows and columns go where.

An operation is a function ``op(index, dims) -> index``: it takes the numbers of the weight's rows (or columns) in their
present order and returns those that the GGUF tensor has, in its order. A chain of them is one gather, and on W = B @ A
a gather of rows is ``B[index]``, a gather of columns ``A[:, index]``: exact. ``dims(key)`` is a hyperparameter of the
layer under its GGUF key, without the architecture. An operation raises ``ValueError`` where the count of rows can't be
right.

The layouts are those of llama.cpp's converters; names in the docstrings are Hugging Face's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Dims(Protocol):
    """The hyperparameters of a layer."""

    hparams: Any
    layer: Any

    def __call__(self, key: str) -> int: ...

    def block_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor of the layer's block; None where the base has none such or is not there."""

    def first(self, *keys: str) -> int:
        """Return the first of ``keys`` that is known."""


Op = Callable[[np.ndarray, Dims], np.ndarray]

HEADS, KV_HEADS = "attention.head_count", "attention.head_count_kv"


def rotary(heads: str) -> Op:
    """Turn rotary halves to rotary pairs: per head, row (s, j) of (2, d/2) goes to (j, s). ``heads`` is the key of
    their number."""

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        return index.reshape(dims(heads), 2, -1).swapaxes(1, 2).ravel()

    return op


rotary_q, rotary_k = rotary(HEADS), rotary(KV_HEADS)


def rotary_k_xverse(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Reorder as ``rotary``, in heads // kv_heads groups where the two differ."""
    heads, kv_heads = dims(HEADS), dims(KV_HEADS)
    return index.reshape(heads if heads == kv_heads else heads // kv_heads, 2, -1).swapaxes(1, 2).ravel()


def rotary_partial(heads: str) -> Op:
    """Turn GLM's pairs to halves: of each head's first ``rope.dimension_count`` rows the even ones, then the odd ones;
    the rest stays."""

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        by_head = index.reshape(dims(heads), -1)
        n = dims("rope.dimension_count")
        return np.concatenate([by_head[:, :n:2], by_head[:, 1:n:2], by_head[:, n:]], axis=1).ravel()

    return op


def part(i: int, n: int) -> Op:
    """Return the ``i``-th of ``n`` equal blocks: halves of gate and up, thirds of q, k, v."""
    return lambda index, dims: index.reshape(n, -1)[i]


def every(i: int, n: int) -> Op:
    """Take rows i, i + n, i + 2n, …: gpt-oss interleaves gate and up."""
    return lambda index, dims: index.reshape(-1, n)[:, i]


def block(i: int, *sizes: Callable[[Dims], int]) -> Op:
    """Return the ``i``-th of consecutive blocks of ``sizes``, which together are all rows."""

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        ends = np.cumsum([0, *(size(dims) for size in sizes)])
        if ends[-1] != len(index):
            raise ValueError(f"expected {ends[-1]} rows, found {len(index)}")
        return index[ends[i] : ends[i + 1]]

    return op


def rotary_qkv(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Take q, k, v one below the other, the rows of q and k as by ``rotary``."""
    q, k = q_rows(dims), kv_rows(dims)
    return np.concatenate([rotary_q(index[:q], dims), rotary_k(index[q : q + k], dims), index[q + k :]])


def indexer(part: str) -> Op:
    """Return the q or k rows of a sparse attention's indexer, which lie q, then k."""

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        n_q = dims("attention.indexer.head_count") * dims("attention.indexer.key_length")
        return index[:n_q] if part == "q" else index[n_q:]

    return op


def head_dim(dims: Dims) -> int:
    return dims("attention.key_length")


def q_rows(dims: Dims) -> int:
    return dims(HEADS) * head_dim(dims)


def kv_rows(dims: Dims) -> int:
    return dims(KV_HEADS) * head_dim(dims)


def by_head(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Turn q, k, v interleaved by head, (heads, 3, d), to q, then k, then v."""
    return index.reshape(dims(HEADS), 3, -1).swapaxes(0, 1).ravel()


def grouped(part: str) -> Op:
    """Return one of q, k, v, or all three in a row, out of (kv_heads, q heads of the group + k + v, d)."""
    cuts = {"q": slice(None, -2), "k": slice(-2, -1), "v": slice(-1, None)}

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        groups = index.reshape(dims(KV_HEADS), dims(HEADS) // dims(KV_HEADS) + 2, -1)
        return np.concatenate([groups[:, cuts[name]].ravel() for name in part])

    return op


def n_values_per_key(dims: Dims) -> int:
    return dims("ssm.time_step_rank") // dims("ssm.group_count")


def value_dim(dims: Dims) -> int:
    return dims("ssm.inner_size") // dims("ssm.time_step_rank")


def value_heads(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Turn linear attention's value heads, grouped by key head, to tiled: (k, v per k, d) to (v per k, k, d)."""
    return index.reshape(dims("ssm.group_count"), n_values_per_key(dims), -1).swapaxes(0, 1).ravel()


def value_heads_of_qkv(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Return ``value_heads`` on the v rows of q, k, v."""
    n = 2 * dims("ssm.group_count") * dims("ssm.state_size")
    return np.concatenate([index[:n], value_heads(index[n:], dims)])


def qkvz(parts: str) -> Op:
    """Take some of q, k, v, z, one after the other, out of rows that lie q, k, v, z for each key head (Qwen3-Next)."""

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        key, value = dims("ssm.state_size"), n_values_per_key(dims) * value_dim(dims)
        ends = dict(zip("qkvz", np.cumsum([key, key, value, value]), strict=True))
        sizes = {"q": key, "k": key, "v": value, "z": value}
        groups = index.reshape(dims("ssm.group_count"), ends["z"])
        return np.concatenate([groups[:, ends[p] - sizes[p] : ends[p]].ravel() for p in parts])

    return op


def frame(i: int, n: int) -> Op:
    """Return the columns of frame ``i`` of ``n``, in a convolution over (3 colours, n frames, pixels)."""
    return lambda index, dims: index.reshape(3, n, -1)[:, i].ravel()


def channels_first(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Return a square patch's columns, (height, width, 3 colours), to (3, height, width), as a convolution has them."""
    side = math.isqrt(len(index) // 3)
    return index.reshape(side, side, 3).transpose(2, 0, 1).ravel()


def moonvit_qkv(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Turn rotary over two axes, in q and k of q, k, v: per head, (d/4, 2 axes, 2) to (2 axes, d/4, 2)."""
    q, k, v = index.reshape(3, -1)
    turned = [part.reshape(dims("vision.attention.head_count"), -1, 2, 2).swapaxes(1, 2).ravel() for part in (q, k)]
    return np.concatenate([*turned, v])


def minimax_qk(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Turn rotary over three axes: per head, halves of (3 axes, n) each to axes of (2 halves, n); the rest stays."""
    by_head = index.reshape(dims("vision.attention.head_count"), -1)
    n = by_head.shape[1] // 2 * 2 // 3 // 2
    turned = by_head[:, : 6 * n].reshape(len(by_head), 2, 3, n).swapaxes(1, 2).reshape(len(by_head), -1)
    return np.concatenate([turned, by_head[:, 6 * n :]], axis=1).ravel()


def plamo(index: np.ndarray, dims: Dims) -> np.ndarray:
    """Reorder PLaMo-13B's query heads, (8, 5, 128) to (5, 8, 128)."""
    return index.reshape(8, 5, 128).swapaxes(0, 1).ravel()


def latent(part: str) -> Op:
    """Return the k (without rotary) or v rows of each head of multi-head latent attention's ``kv_b_proj``."""

    def op(index: np.ndarray, dims: Dims) -> np.ndarray:
        n_heads, nope, value = latent_sizes(dims)
        heads = index.reshape(n_heads, nope + value)
        return (heads[:, :nope] if part == "k" else heads[:, nope:]).ravel()

    return op


def latent_sizes(dims: Dims) -> tuple[int, int, int]:
    """Return heads, and the rows of each head's k and v: as the base's tensors have them, or its hyperparameters."""
    k, v = (dims.block_shape(name) for name in ("attn_k_b", "attn_v_b"))
    if k is not None and v is not None and len(k) == len(v) == 3:
        return k[0], k[2], v[1]
    return (
        dims(HEADS),
        dims("attention.key_length_mla") - dims("rope.dimension_count"),
        dims("attention.value_length_mla"),
    )


Scale = Callable[[int, Dims], np.ndarray]


def times(*keys: str) -> Scale:
    """Return all rows times the product of these numbers of config.json."""
    return lambda n, dims: np.full(n, np.prod([dims(f"config.{key}") for key in keys]))


def jais_embedding(n: int, dims: Dims) -> np.ndarray:
    """Return what Jais multiplies the embedding by: one of two numbers of config.json."""
    return np.full(n, dims.first("config.mup_embeddings_scale", "config.embeddings_scale"))


def jais_head(n: int, dims: Dims) -> np.ndarray:
    """Return what Jais multiplies the head by: one number of config.json, or by two."""
    if dims.hparams.get("config.mup_output_alpha") is None:
        return np.full(n, dims("config.width_scale"))
    return np.full(n, dims("config.mup_output_alpha") * dims("config.mup_width_scale"))


def rwkv6_rescaled(n: int, dims: Dims) -> np.ndarray:
    """Return RWKV-6 halves what each block adds to the residual stream, once more every so many layers."""
    every = dims.hparams.get("rescale_every_n_layers")
    return np.full(n, 2.0 ** -(dims.layer // every) if every else 1.0)


def second_half_negated(n: int, dims: Dims) -> np.ndarray:
    """Negate the second half of each head's rows: Talkie turns its rotary the other way."""
    width = dims("attention.key_length")
    return np.tile(np.where(np.arange(width) < width // 2, 1.0, -1.0), n // width)


def falcon_h1_in_proj(n: int, dims: Dims) -> np.ndarray:
    """Return the factor of each row of Mamba's ``in_proj``: z, x, B, C, dt blocks, each with its own."""
    inner, state = dims("config.mamba_d_ssm"), dims("config.mamba_n_groups") * dims("config.mamba_d_state")
    sizes = [inner, inner, state, state]
    if sum(sizes) > n:
        raise ValueError(f"expected more than {sum(sizes)} rows, found {n}")
    factors = [dims(f"config.ssm_multipliers.{i}") for i in range(5)]
    return dims("config.ssm_in_multiplier") * np.repeat(factors, [*sizes, n - sum(sizes)])
