"""What a model says with given weights: transformers in f32, weights in and log-probabilities out.

Neither the placement of adapters nor the decoding of blocks is ours: PEFT's tensors are added under their own names,
and libgguf decodes. Needs torch and transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from libgguf import dequantize_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gguf.files.gguf_reader import GgufReader

MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def linear_weights(gguf: Path) -> dict[str, torch.Tensor]:
    """The linear layers of a GGUF in f32, by transformers' parameter names."""
    found = {}
    with GgufReader(gguf) as reader:
        heads = {"attn_q": reader.hparam("attention.head_count"), "attn_k": reader.hparam("attention.head_count_kv")}
        for info in reader.tensors.values():
            match = _TENSOR.fullmatch(info.name)
            if not match or match[2] not in MODULES:
                continue
            weight = torch.from_numpy(decoded(reader, info))
            if reader.architecture == "llama" and match[2] in heads:  # the rotary halves lie interleaved in such a GGUF
                weight = weight.reshape(heads[match[2]], -1, 2, info.n_cols).transpose(1, 2).reshape(info.shape)
            found[f"model.layers.{match[1]}.{MODULES[match[2]]}.weight"] = weight
    return found


def decoded(reader: GgufReader, info) -> np.ndarray:
    raw = reader.read(info)
    if info.type.name == "F32":
        return raw.view(np.float32).reshape(info.shape)
    if info.type.name == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(info.shape)
    return np.asarray(dequantize_rows(raw, info.type.id, n_per_row=info.n_cols), np.float32).reshape(info.shape)


def peft_deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """scale * B @ A of every module of a plain LoRA, by transformers' parameter names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    deltas = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            deltas[key.removeprefix("base_model.model.").replace("lora_A.", "")] = scale * (b.float() @ a.float())
    return deltas


class Oracle:
    """A model whose linear layers can be exchanged, and a text to judge them by."""

    def __init__(self, gguf: Path, text: str, n_windows: int, length: int = 256):
        self.tokenizer, self.length = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), length
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        self.model, self.tokens = model.eval(), self.windows_of(text)[:n_windows]
        self.parameters = dict(self.model.named_parameters())

    def windows_of(self, text: str) -> torch.Tensor:
        """``text`` in tokens, cut into windows (n_windows, length), without BOS: none is a beginning."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        starts = range(0, len(ids) - self.length + 1, self.length)
        return torch.tensor([ids[start : start + self.length] for start in starts])

    def set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.parameters[name].data.copy_(weight)

    @torch.no_grad()
    def log_probs(self, window: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.model(window[None]).logits[0], -1)

    def remember(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """Make ``weights`` the reference of ``judge``."""
        self.set(weights)
        self.reference = [self.log_probs(window) for window in self.tokens]
        return {"ppl": perplexity(self.reference, self.tokens), "kl": 0.0, "top": 1.0}

    def judge(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """Perplexity, mean KL(reference || these weights) in nats a token, how often both put the same token first."""
        self.set(weights)
        found, kl, top = [], [], []
        for window, reference in zip(self.tokens, self.reference):
            log_probs = self.log_probs(window)
            kl.append((reference.exp() * (reference - log_probs)).sum(-1))
            top.append((reference.argmax(-1) == log_probs.argmax(-1)).float())
            found.append(log_probs[:-1].gather(1, window[1:, None]))
        return {
            "ppl": float(torch.cat(found).mean().neg().exp()),
            "kl": float(torch.cat(kl).mean()),
            "top": float(torch.cat(top).mean()),
        }


def perplexity(log_probs: list[torch.Tensor], tokens: torch.Tensor) -> float:
    of_next = [rows[:-1].gather(1, window[1:, None]) for rows, window in zip(log_probs, tokens)]
    return float(torch.cat(of_next).mean().neg().exp())
