"""Two more questions to a merge by ``auto``: is it as good as the proper way, and what of text that is not the adapter's?

    python -m tests.bench.further [--types Q4_K,Q8_0] [--models SmolLM2] [--seeds 3] [--windows 6]

The proper way needs the model before it was quantized: here SmolLM2 with its grid broken by a step of noise. Of each type,
for bases made without and with an importance matrix: KL(original + adapter || X), X the base alone, the merge of the
original quantized anew, the quantized base with the adapter at run time, and merges into the quantized base. ``ratio`` is
the KL over that of the adapter at run time. Then each adapter on each text: ``share`` as in ``fidelity.py``. The matrices
are measured on ``fixtures/texts/calibration.txt``, which is none of the texts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from libgguf import dequantize_rows

from lora_gguf.files.imatrix import Imatrix
from lora_gguf.merging.options import Policy
from lora_gguf.quants.ggml import BY_NAME
from tests.bench.bases import FALLBACKS, encoded, requantized
from tests.bench.oracle import MODULES, Oracle, linear_weights, peft_deltas
from tests.calls import merge
from tests.common import DEMO_ADAPTER, FIXTURES, gemma3_path, smollm2_path

TYPES = ("Q4_K", "Q4_1", "Q4_0", "Q6_K", "Q8_0")
TEXTS = {name: FIXTURES / "texts" / f"{name}.txt" for name in ("chat", "python", "licence")}
TEXTS["perl"] = FIXTURES / "perl-eval.txt"
CALIBRATION = FIXTURES / "texts" / "calibration.txt"
MODELS = {
    "SmolLM2": (smollm2_path, {"perl": FIXTURES / "perl-adapter", "pirate": DEMO_ADAPTER}),
    "Gemma": (gemma3_path, {"perl": FIXTURES / "gemma-perl-adapter"}),
}
# way -> how it rounds, and how many seeds are merged
MERGES: dict[str, tuple[dict, int]] = {
    "fresh": ({"rounding": "fresh"}, 1),
    "dither": ({"rounding": "dither"}, 3),
    "auto": ({}, 3),
    "auto --imatrix": ({}, 3),
}
UNWEIGHED = ("Q8_0",)  # its quantizer takes no importance matrix
KINDS = {module: kind for kind, module in MODULES.items()}


def gguf_name(parameter: str) -> str:
    """The tensor of a linear layer, as transformers names its weight or module."""
    _, _, layer, *module = parameter.removesuffix(".weight").split(".")
    return f"blk.{layer}.{KINDS['.'.join(module)]}.weight"


@torch.no_grad()
def measured(oracle: Oracle, gguf: Path) -> Imatrix:
    """What llama-imatrix would find on the calibration text: E[x^2] of the columns of each linear layer."""
    sums, counts, hooks = {}, {}, []
    for name, module in oracle.model.named_modules():
        if f"{name}.weight" in oracle.parameters and name.startswith("model.layers.") and name.endswith("_proj"):

            def note(_module, args, key=gguf_name(name)):
                x = args[0].reshape(-1, args[0].shape[-1]).double()
                sums[key], counts[key] = sums.get(key, 0) + x.square().sum(0), counts.get(key, 0) + len(x)

            hooks.append(module.register_forward_pre_hook(note))
    oracle.set(linear_weights(gguf))
    for window in oracle.windows_of(CALIBRATION.read_text()):
        oracle.model(window[None])
    for hook in hooks:
        hook.remove()
    importance = {key: (total / counts[key]).float().numpy()[None] for key, total in sums.items()}
    return Imatrix("measured", importance)


def quantized(weights: dict[str, torch.Tensor], type_name: str, imatrix: Imatrix | None) -> dict[str, torch.Tensor]:
    """``weights`` quantized by libgguf, as llama-quantize would, and back."""
    found = {}
    for name, weight in weights.items():
        n_cols = weight.shape[1]
        type = BY_NAME[type_name if n_cols % BY_NAME[type_name].block_size == 0 else FALLBACKS[type_name]]
        importance = imatrix.importance[gguf_name(name)][0] if imatrix else None
        raw = encoded(np.ascontiguousarray(weight.numpy(), np.float32), type, importance)
        rows = np.asarray(dequantize_rows(raw, type.id, n_per_row=n_cols), np.float32)
        found[name] = torch.from_numpy(rows.reshape(weight.shape))
    return found


def added(weights: dict[str, torch.Tensor], deltas: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight + deltas[name] for name, weight in weights.items()}


def merged(base: Path, adapter: Path, way: dict, seeds: int, folder: Path) -> list[Path]:
    """A merge by each seed."""
    found = [folder / f"merged-{seed}.gguf" for seed in range(seeds)]
    for seed, path in enumerate(found):
        merge(base, [(adapter, 1.0)], path, Policy(seed=seed, **way), force=True)
    return found


def divergences(oracle: Oracle, paths: list[Path]) -> np.ndarray:
    """The KL of each merged file."""
    return np.array([oracle.judge(linear_weights(path))["kl"] for path in paths])


def proper_rows(oracle: Oracle, options, folder: Path) -> Iterator[str]:
    """The table of the proper way, a line a way."""
    source, adapter = smollm2_path(), FIXTURES / "perl-adapter"
    deltas, imatrix = peft_deltas(adapter), measured(oracle, source)
    original = linear_weights(requantized(source, folder / "original.gguf", "F32"))
    oracle.remember(added(original, deltas))
    for type_name in options.types:
        for used in (None,) if type_name in UNWEIGHED else (None, imatrix):
            base = requantized(source, folder / "base.gguf", type_name, used)
            plain = linear_weights(base)
            at_run_time = oracle.judge(added(plain, deltas))["kl"]
            ways = {
                "base": [oracle.judge(plain)["kl"]],
                "original merged": [oracle.judge(quantized(added(original, deltas), type_name, used))["kl"]],
                "adapter at run time": [at_run_time],
            }
            for way, (policy, seeds) in MERGES.items():
                policy = {**policy, "imatrix": imatrix} if "imatrix" in way else policy
                ways[way] = divergences(oracle, merged(base, adapter, policy, min(seeds, options.seeds), folder))
            for way, kl in ways.items():
                made = "with" if used else "without"
                figures = f"{np.mean(kl):8.5f} {np.std(kl):8.5f} {np.mean(kl) / at_run_time:6.2f}"
                yield f"{type_name:6} {made:8} {way:20} {figures}"


def text_rows(model: str, oracle: Oracle, options, folder: Path) -> Iterator[str]:
    """The shares of each adapter of a model on each text, a line a text."""
    find, adapters = MODELS[model]
    base, imatrix = find(), measured(oracle, find())
    plain = linear_weights(base)
    for name, adapter in adapters.items():
        with_adapter = added(plain, peft_deltas(adapter))
        files = []
        for number, way in enumerate(({"rounding": "dither"}, {}, {"imatrix": imatrix})):
            (folder / str(number)).mkdir(exist_ok=True)
            files.append(merged(base, adapter, way, options.seeds, folder / str(number)))
        for text, path in TEXTS.items():
            oracle.tokens = oracle.windows_of(path.read_text())[: options.windows]
            oracle.remember(with_adapter)
            untouched = oracle.judge(plain)["kl"]
            shares = [divergences(oracle, paths) / untouched for paths in files]
            figures = "  ".join(f"{share.mean():.4f} ± {share.std():.4f}" for share in shares)
            yield f"{model:8} {name:7} {text:8} {untouched:8.4f}  {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES, type=lambda text: text.split(",") if text else [])
    parser.add_argument("--models", default=list(MODELS), type=lambda text: text.split(",") if text else [])
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.types:
            print("type   imatrix  way                        KL        ±  ratio", flush=True)
            oracle = Oracle(smollm2_path(), TEXTS["perl"].read_text(), options.windows)
            for row in proper_rows(oracle, options, folder):
                print(row, flush=True)
        if options.models:
            print("model    adapter text     KL(base)  dither           auto             auto --imatrix", flush=True)
        for model in options.models:
            oracle = Oracle(MODELS[model][0](), TEXTS["perl"].read_text(), options.windows)
            for row in text_rows(model, oracle, options, folder):
                print(row, flush=True)


if __name__ == "__main__":
    main()
