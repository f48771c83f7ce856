"""How much of a fine-tune each rounding keeps: KL from the run-time adapter's logits, on text it was not trained on.

    python -m tests.bench.fidelity [--bases "SmolLM2 Q4_1"] [--scales 1] [--roundings auto,dither] [--windows 6]

The reference is base + scale·B@A in f32, unrounded, as llama.cpp computes it with the adapter at run time. ``share`` is
KL(reference ‖ merged) / KL(reference ‖ base): 0 is perfect, 1 means that nothing of the adapter acts. Logits come from
transformers in f32 with the merged file's weights (``oracle.py``); the last line has llama.cpp itself judge one file.
At other scales than 1, half of the windows are judged, and only the roundings of the table.
Some 8 GB of memory and a quarter of an hour on two cores; minutes with one base and ``--scales 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lora_gguf.api import convert
from lora_gguf.merging.options import Policy
from lora_gguf.quants.table import CODECS
from tests.bench.bases import requantized
from tests.bench.oracle import Oracle, linear_weights, peft_deltas
from tests.calls import merge
from tests.common import FIXTURES, gemma3_path, llama_server, smollm2_path

ROUNDINGS = ("fresh", "nearest", "dither", "auto", "Q8_0")
RANDOM = ("dither", "auto")
AT_SCALE_1 = ("nearest", "Q8_0")  # no table asks for these at other scales
# base -> (the real file, its adapter, the type that its linear layers are requantized to, if any)
BASES = {
    "SmolLM2 Q4_1": (smollm2_path, "perl-adapter", None),
    "Gemma 3 270M Q4_K_M": (gemma3_path, "gemma-perl-adapter", None),
    "SmolLM2 Q4_K + Q5_0": (smollm2_path, "perl-adapter", "Q4_K"),
    "SmolLM2 Q5_0": (smollm2_path, "perl-adapter", "Q5_0"),
    "SmolLM2 Q8_0": (smollm2_path, "perl-adapter", "Q8_0"),
    "SmolLM2 IQ4_NL": (smollm2_path, "perl-adapter", "IQ4_NL"),
    "SmolLM2 BF16": (smollm2_path, "perl-adapter", "BF16"),
    "SmolLM2 Q2_K + IQ4_NL": (smollm2_path, "perl-adapter", "Q2_K"),
}
HEAD = "base                   scale way                    share      ±       KL perplexity same top   kept  size"


def line(row: dict) -> str:
    name = f"{row['base']:22} {row['scale']:5g} {row['way']:20}"
    distance = f"{row['share']:7.4f} {row['spread']:6.4f} {row['kl']:8.5f}"
    return f"{name} {distance} {row['ppl']:10.3f} {row['top']:8.3f} {row['kept']:6.3f} {row['size']:5.2f}"


def merged_figures(oracle: Oracle, base: Path, adapter: Path, scale: float, way: str, seed: int, folder: Path) -> dict:
    """Merge by one rounding, or promote to a type, and judge the file."""
    policy = Policy(type=way, seed=seed) if way in CODECS else Policy(way, seed=seed)
    out = folder / "merged.gguf"
    report = merge(base, [(adapter, scale)], out, policy, force=True)
    figures = oracle.judge(linear_weights(out))
    return {**figures, "kept": report.whole.kept, "size": out.stat().st_size / base.stat().st_size}


def rows_of(name: str, oracle: Oracle, base: Path, adapter: Path, options, folder: Path) -> Iterator[dict]:
    plain, deltas, windows = linear_weights(base), peft_deltas(adapter), oracle.tokens
    for scale in options.scales:
        oracle.tokens = windows if scale == 1 else windows[: -(-len(windows) // 2)]
        label = {"base": name, "scale": scale, "spread": 0.0, "size": 1.0}
        reference = oracle.remember({key: plain[key] + scale * delta for key, delta in deltas.items()})
        untouched = oracle.judge(plain)
        yield {**label, "way": "adapter at run time", **reference, "share": 0.0, "kept": 1.0}
        yield {**label, "way": "base", **untouched, "share": 1.0, "kept": 0.0}
        for way in options.roundings:
            if way in AT_SCALE_1 and scale != 1:
                continue
            seeds = range(options.seeds if way in RANDOM else 1)
            runs = [merged_figures(oracle, base, adapter, scale, way, seed, folder) for seed in seeds]
            mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            shares = [run["kl"] / untouched["kl"] for run in runs]
            yield {**label, "way": way, **mean, "share": float(np.mean(shares)), "spread": float(np.std(shares))}
    oracle.tokens = windows


def table(options, text: str, folder: Path) -> Iterator[dict]:
    """The rows of all bases; those of one model share its transformers model."""
    oracles: dict[Path, Oracle] = {}
    for name in options.bases:
        find, adapter, type_name = BASES[name]
        source = find()
        if source not in oracles:
            oracles = {source: Oracle(source, text, options.windows)}
        base = requantized(source, folder / "base.gguf", type_name) if type_name else source
        yield from rows_of(name, oracles[source], base, FIXTURES / adapter, options, folder)


def cross_check(text: str, folder: Path) -> str:
    """llama.cpp's own share of the base's KL that ``auto`` leaves on SmolLM2's Q4_1, beside transformers' figure."""
    base, adapter, merged = smollm2_path(), FIXTURES / "perl-adapter", folder / "merged.gguf"
    convert(adapter, folder / "adapter.gguf", base, force=True)
    merge(base, [(adapter, 1.0)], merged, force=True)
    oracle = Oracle(base, text, 2)
    plain, deltas = linear_weights(base), peft_deltas(adapter)
    oracle.remember({key: plain[key] + delta for key, delta in deltas.items()})
    untouched = oracle.judge(plain)["kl"]
    ours = oracle.judge(linear_weights(merged))["kl"] / untouched
    prompts = [window[:k] for window in oracle.tokens.tolist() for k in range(4, len(window) + 1, 4)]
    at_run_time = llama_cpp_says(base, folder / "adapter.gguf", prompts)
    of_base, of_merged = (divergence(at_run_time, llama_cpp_says(path, None, prompts)) for path in (base, merged))
    return (
        f"llama.cpp on {len(prompts)} positions: KL of the base {of_base:.4f}, of auto {of_merged:.4f}, "
        f"share {of_merged / of_base:.3f}; transformers on the same text: {untouched:.4f}, share {ours:.3f}"
    )


def divergence(reference: list[dict], other: list[dict]) -> float:
    """KL in nats a token, over the tokens that the reference lists; what ``other`` does not list gets its least."""
    total = 0.0
    for wanted, found in zip(reference, other, strict=True):
        least = min(found.values())
        total += sum(np.exp(lp) * (lp - found.get(token, least)) for token, lp in wanted.items())
    return total / len(reference)


@contextlib.contextmanager
def no_log():
    """Without llama.cpp's log, which goes to stderr."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@no_log()
def llama_cpp_says(model: Path, adapter: Path | None, prompts: list[list[int]]) -> list[dict]:
    """The 200 likeliest next tokens of each prompt, and their log-probabilities, as llama.cpp has them."""
    server = llama_server(model, adapter)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 200, "cache_prompt": True}
        top = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({entry["id"]: entry["logprob"] for entry in top})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default=list(BASES), type=lambda text: text.split(","))
    parser.add_argument("--scales", default=[0.25, 1, 4, 16], type=lambda text: [float(x) for x in text.split(",")])
    parser.add_argument("--roundings", default=ROUNDINGS, type=lambda text: text.split(","))
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-cross-check", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text, rows = (FIXTURES / "perl-eval.txt").read_text(), []
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for row in table(options, text, Path(folder)):
            rows.append(row)
            print(line(row), flush=True)
        if not options.no_cross_check:
            print(cross_check(text, Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
