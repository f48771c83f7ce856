"""How much of a fine-tune each rounding keeps: KL from the run-time adapter's logits, on text that it was not trained on.

    python -m tests.bench.fidelity [--bases "SmolLM2 Q4_1"] [--scales 1] [--roundings auto,dither] [--windows 6] [--seeds 3]

The reference is base + scale·B@A in f32, unrounded, as llama.cpp computes it with the adapter at run time. ``share`` is
KL(reference ‖ merged) / KL(reference ‖ base): 0 is perfect, 1 means that nothing of the adapter acts. Logits come from
transformers in f32 with the merged file's dequantized weights; the last line compares one file with llama.cpp itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gguf.base import Base
from lora_gguf.ggml import BY_NAME
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.gguf_writer import GgufWriter, TensorSpec, raw_key_values
from lora_gguf.merge import merge
from lora_gguf.plan import Policy
from lora_gguf.quants import QUANTS
from lora_gguf.sources import placement_of
from tests.common import FIXTURES, complete, gemma3_path, llama_server, smollm2_path

LENGTH = 256
ROUNDINGS = ("fresh", "nearest", "dither", "auto", "Q8_0")
NO_IMPORTANCE = np.empty(0, np.float32)
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# base -> (the real file, its adapter, the type that its linear layers are requantized to, if any)
BASES: dict[str, tuple[Callable[[], Path], str, Callable[[str], str] | None]] = {
    "SmolLM2 Q4_1": (smollm2_path, "perl-adapter", None),
    "Gemma 3 270M Q4_K_M": (gemma3_path, "gemma-perl-adapter", None),
    "SmolLM2 Q4_K + Q5_0": (smollm2_path, "perl-adapter", lambda kind: "Q4_K" if kind == "ffn_down" else "Q5_0"),
    **{f"SmolLM2 {name}": (smollm2_path, "perl-adapter", lambda _, name=name: name) for name in ("Q5_0", "Q8_0", "IQ4_NL", "BF16")},
    "SmolLM2 Q2_K + IQ4_NL": (smollm2_path, "perl-adapter", lambda kind: "Q2_K" if kind == "ffn_down" else "IQ4_NL"),
}


def kind_of(name: str) -> str | None:
    """attn_q of ``blk.3.attn_q.weight``; None for what is no linear layer of a block."""
    parts = name.split(".")
    return parts[2] if len(parts) == 4 and parts[2] in MODULES and parts[3] == "weight" else None


def dequantized(base: Base, name: str) -> np.ndarray:
    info = base.tensors[name]
    out = np.empty((info.n_rows, info.n_cols), np.float32)
    QUANTS[info.type.name].decode(base.reader_of(name).read(info), out)
    return out


def requantized(source: Path, target: Path, type_of: Callable[[str], str]) -> Path:
    """A copy with the linear layers in other types, moved off their old grid by uniform noise of one step first."""
    rng = np.random.default_rng(0)
    with Base(source) as base:
        reader = base.readers[0]
        types = {name: type_of(kind) if (kind := kind_of(name)) else info.type.name for name, info in base.tensors.items()}
        specs = [TensorSpec(name, BY_NAME[types[name]], info.shape) for name, info in base.tensors.items()]
        with GgufWriter(target, raw_key_values(reader), specs) as writer:
            for name, info in base.tensors.items():
                rows = reader.read(info)
                if kind_of(name):
                    weights = dequantized(base, name)
                    step = np.sort(np.abs(np.diff(np.sort(weights, axis=1), axis=1)), axis=1)[:, -16:].mean(axis=1, keepdims=True)
                    weights += (rng.uniform(-0.5, 0.5, weights.shape) * step).astype(np.float32)
                    rows = np.empty((info.n_rows, BY_NAME[types[name]].row_bytes(info.n_cols)), np.uint8)
                    QUANTS[types[name]].encode(weights, NO_IMPORTANCE, rows)
                writer.write(writer.tensors[name], 0, rows)
            writer.commit()
    return target


class Judge:
    """A transformers model whose linear layers are set from GGUFs, and windows of text to judge them on."""

    def __init__(self, path: Path, n_windows: int):
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        self.model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
        tokens = AutoTokenizer.from_pretrained(**source)((FIXTURES / "perl-eval.txt").read_text(), add_special_tokens=False).input_ids
        with GgufReader(path) as reader:
            self.architecture, bos = reader.architecture, reader.get("tokenizer.ggml.bos_token_id")
            self.heads = {"attn_q": reader.hparam("attention.head_count"), "attn_k": reader.hparam("attention.head_count_kv")}
            first = [bos] if reader.get("tokenizer.ggml.add_bos_token", self.architecture == "gemma3") else []
        size = LENGTH - len(first)
        self.windows = [torch.tensor(first + tokens[i * size : (i + 1) * size]) for i in range(n_windows)]
        self.parameters = dict(self.model.named_parameters())

    def load(self, weights: Iterator[tuple[str, np.ndarray]]) -> None:
        """Set linear layers, given by GGUF name and in GGUF's layout."""
        for name, array in weights:
            layer, kind = name.split(".")[1:3]
            tensor = torch.from_numpy(array)
            if self.architecture == "llama" and kind in self.heads:
                tensor = tensor.reshape(self.heads[kind], -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            self.parameters[f"model.layers.{layer}.{MODULES[kind]}.weight"].data.copy_(tensor)

    @torch.no_grad()
    def logprobs(self) -> list[torch.Tensor]:
        return [torch.log_softmax(self.model(window[None]).logits[0], -1) for window in self.windows]

    def compare(self, reference: list[torch.Tensor]) -> dict[str, float]:
        """KL(reference ‖ what is loaded), its perplexity, and how often both say the same next token."""
        kl, loss, same = [], [], []
        for window, ref, own in zip(self.windows, reference, self.logprobs(), strict=True):
            kl.append((ref.exp() * (ref - own)).sum(-1))
            loss.append(-own[:-1].gather(1, window[1:, None])[:, 0])
            same.append((ref.argmax(-1) == own.argmax(-1)).float())
        return {"kl": float(torch.cat(kl).mean()), "ppl": float(torch.cat(loss).mean().exp()), "top": float(torch.cat(same).mean())}


def linear_layers(path: Path, adapter: Path | None = None, scale: float = 0.0) -> Iterator[tuple[str, np.ndarray]]:
    """The dequantized linear layers of a GGUF, with the adapter's update added, unrounded."""
    with Base(path) as base:
        pairs = {pair.name: pair for pair in placement_of(adapter, base).pairs} if adapter else {}
        for name in filter(kind_of, base.tensors):
            weights = dequantized(base, name)
            yield name, weights + np.float32(scale) * pairs[name].delta() if name in pairs else weights


def merged_figures(judge: Judge, base: Path, adapter: Path, scale: float, way: str, seed: int, folder: Path, reference) -> dict:
    """Merge by one rounding, or promote to a type, and judge the file."""
    policy = Policy(type=way, seed=seed) if way in QUANTS else Policy(way, seed=seed)
    report = merge(base, [(adapter, scale)], folder / "merged.gguf", policy, force=True)
    judge.load(linear_layers(folder / "merged.gguf"))
    size = (folder / "merged.gguf").stat().st_size / base.stat().st_size
    return {**judge.compare(reference), "kept": report.whole.kept, "size": size}


def rows_of(name: str, scale: float, options, folder: Path) -> Iterator[dict]:
    source, adapter, type_of = BASES[name]
    base, adapter = source(), FIXTURES / adapter
    judge = Judge(base, options.windows)
    if type_of:
        base = requantized(base, folder / "base.gguf", type_of)
    judge.load(linear_layers(base, adapter, scale))
    reference = judge.logprobs()
    own = judge.compare(reference)
    judge.load(linear_layers(base))
    plain = judge.compare(reference)
    label = {"base": name, "scale": scale}
    yield {**label, "way": "adapter at run time", **own, "share": 0.0, "kept": 1.0, "size": 1.0}
    yield {**label, "way": "base", **plain, "share": 1.0, "kept": 0.0, "size": 1.0}
    for way in options.roundings:
        seeds = range(options.seeds if way in ("dither", "auto") else 1)
        runs = [merged_figures(judge, base, adapter, scale, way, seed, folder, reference) for seed in seeds]
        mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        spread = float(np.std([run["kl"] / plain["kl"] for run in runs]))
        yield {**label, "way": way, **mean, "share": mean["kl"] / plain["kl"], "spread": spread}
    if base != source():
        base.unlink()


def cross_check(folder: Path) -> str:
    """The merged file in transformers and in llama.cpp: both continue the text's beginning alike."""
    merge(smollm2_path(), [(FIXTURES / "perl-adapter", 1.0)], folder / "merged.gguf", force=True)
    judge = Judge(smollm2_path(), 1)
    judge.load(linear_layers(folder / "merged.gguf"))
    start = judge.windows[0][:64]
    with torch.no_grad():
        ours = judge.model.generate(start[None], max_new_tokens=16, do_sample=False)[0, 64:].tolist()
    tokens = complete(llama_server(folder / "merged.gguf"), start.tolist(), 16, n_probs=1)["logprobs"]["content"]
    theirs = [token["id"] for token in tokens]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(theirs))
    return f"llama.cpp and transformers say the same {same} of 16 tokens with the merged file"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--scales", default="0.25,1,4,16")
    parser.add_argument("--roundings", default=",".join(ROUNDINGS), type=lambda text: text.split(","))
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    head = f"{'base':22} {'scale':>5} {'way':20} {'share':>7} {'±':>6} {'KL':>8} {'perplexity':>10} {'same top':>8} {'kept':>6} {'size':>5}"
    print(head, flush=True)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name in options.bases.split(","):
            for scale in map(float, options.scales.split(",")):
                for row in rows_of(name, scale, options, Path(folder)):
                    rows.append(row)
                    print(
                        f"{name:22} {scale:5g} {row['way']:20} {row['share']:7.4f} {row.get('spread', 0):6.4f} {row['kl']:8.4f} "
                        f"{row['ppl']:10.2f} {row['top']:8.3f} {row['kept']:6.3f} {row['size']:5.2f}",
                        flush=True,
                    )
        print(cross_check(Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
