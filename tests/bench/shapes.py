"""Generated bases and adapters of real models' shapes: random weights, valid blocks, tokenizer-sized metadata."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.files import gguf_writer
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, key_value
from lora_gguf.quants.ggml import BY_NAME


@dataclass(frozen=True)
class Shape:
    """A llama-shaped model."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int

    @property
    def n_kv(self) -> int:
        return self.n_embd // self.n_head * self.n_head_kv

    def linears(self) -> dict[str, tuple[int, int]]:
        """Kind of tensor -> (out, in)."""
        e, f, kv = self.n_embd, self.n_ff, self.n_kv
        return {
            "attn_q": (e, e), "attn_k": (kv, e), "attn_v": (kv, e), "attn_output": (e, e),
            "ffn_gate": (f, e), "ffn_up": (f, e), "ffn_down": (e, f),
        }  # fmt: skip

    @property
    def n_linear_weights(self) -> int:
        return self.n_layer * sum(n_out * n_in for n_out, n_in in self.linears().values())


TINY = Shape(2, 256, 512, 4, 2, 512)
LLAMA_1B = Shape(22, 2048, 5632, 32, 4, 32000)
LLAMA_7B = Shape(32, 4096, 11008, 32, 32, 32000)
LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128256)


def mixed_type(kind: str, layer: int, n_layer: int) -> str:
    """Which type a Q4_K_M file gives a linear layer: half of attn_v and ffn_down are Q6_K."""
    more_bits = layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    return "Q6_K" if kind in ("attn_v", "ffn_down") and more_bits else "Q4_K"


def specs(shape: Shape, type_of=mixed_type) -> list[TensorSpec]:
    tensors = [TensorSpec("token_embd.weight", BY_NAME["Q4_K"], (shape.n_vocab, shape.n_embd))]
    for layer in range(shape.n_layer):
        for kind, dims in shape.linears().items():
            tensors.append(TensorSpec(f"blk.{layer}.{kind}.weight", BY_NAME[type_of(kind, layer, shape.n_layer)], dims))
        for norm in ("attn_norm", "ffn_norm"):
            tensors.append(TensorSpec(f"blk.{layer}.{norm}.weight", BY_NAME["F32"], (shape.n_embd,)))
    tensors.append(TensorSpec("output_norm.weight", BY_NAME["F32"], (shape.n_embd,)))
    return [*tensors, TensorSpec("output.weight", BY_NAME["Q6_K"], (shape.n_vocab, shape.n_embd))]


def metadata(shape: Shape) -> list[bytes]:
    words = [f"t{i}" for i in range(shape.n_vocab)]
    numbers = {
        "block_count": shape.n_layer, "embedding_length": shape.n_embd, "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head, "attention.head_count_kv": shape.n_head_kv, "context_length": 2048,
        "rope.dimension_count": shape.n_embd // shape.n_head, "vocab_size": shape.n_vocab,
    }  # fmt: skip
    return [
        key_value("general.architecture", "llama", "str"),
        key_value("general.file_type", 15, "u32"),
        *(key_value(f"llama.{key}", value, "u32") for key, value in numbers.items()),
        key_value("llama.attention.layer_norm_rms_epsilon", 1e-5, "f32"),
        key_value("tokenizer.ggml.model", "gpt2", "str"),
        key_value("tokenizer.ggml.pre", "smollm", "str"),
        key_value("tokenizer.ggml.tokens", words, "str"),
        key_value("tokenizer.ggml.token_type", [1] * len(words), "i32"),
        key_value("tokenizer.ggml.merges", ["t 0"], "str"),
    ]


def write_base(path: Path, shape: Shape, type_of=mixed_type, seed: int = 0, *, sparse: bool = False) -> None:
    """A GGUF of ``shape``: each tensor repeats some rows that ggml quantized from a normal distribution, or has them
    once and then holes, blocks of zeros that take no room on the disk.
    """
    from libgguf import quantize_rows

    rng = np.random.default_rng(seed)
    tiles: dict[tuple[str, int], np.ndarray] = {}
    with mock.patch.object(gguf_writer, "check_space") if sparse else contextlib.nullcontext():
        writer = GgufWriter(path, metadata(shape), specs(shape, type_of), force=True)
    with writer:
        for tensor in writer.tensors.values():
            key = (tensor.type.name, tensor.n_cols)
            if key not in tiles:
                rows = (rng.normal(size=(64 if len(tensor.shape) > 1 else 1, tensor.n_cols)) * 0.02).astype(np.float32)
                raw = rows if tensor.type.name == "F32" else quantize_rows(rows, tensor.type.id)
                tiles[key] = np.frombuffer(bytes(raw), np.uint8).reshape(len(rows), -1)
            tile = tiles[key]
            for row in range(0, len(tile) if sparse else tensor.n_rows, len(tile)):
                writer.write(tensor, row * tensor.row_bytes, np.ascontiguousarray(tile[: tensor.n_rows - row]))
        writer.commit()


def write_adapter(path: Path, shape: Shape, rank: int = 16, seed: int = 1) -> None:
    """An adapter GGUF on all linear layers, its update about 0.06 of a Q4_K step, as a trained one's."""
    rng = np.random.default_rng(seed)
    pairs = []
    for layer in range(shape.n_layer):
        for kind, (n_out, n_in) in shape.linears().items():
            a = (rng.normal(size=(rank, n_in)) * 0.02).astype(np.float32)
            b = (rng.normal(size=(n_out, rank)) * 0.002).astype(np.float32)
            pairs.append(LoraPair(f"blk.{layer}.{kind}.weight", a, b, 2.0))
    write_adapter_gguf(path, pairs, "llama", "f16", force=True)
