"""Real parts end to end: a real adapter, a real model, and what llama.cpp says with them."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
from libgguf import dequantize_rows

from lora_gguf.api import convert
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, raw_key_values
from lora_gguf.merging.options import Policy
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS
from tests.calls import merge
from tests.common import DEMO_ADAPTER, FIXTURES, complete, gemma3_path, llama_server, smollm2_path

PROMPT = "<|im_start|>user\nHow do I make tea?<|im_end|>\n<|im_start|>assistant\n"


def text(model, adapter=None, prompt=PROMPT, n_predict=64):
    return complete(llama_server(model, adapter), prompt, n_predict)["text"]


def as_type(source, target, type_name):
    """A copy of a model with all its quantized tensors in F32 or F16."""
    with GgufReader(source) as reader:
        specs = [
            TensorSpec(i.name, i.type if i.type.name == "F32" else BY_NAME[type_name], i.shape)
            for i in reader.tensors.values()
        ]
        with GgufWriter(target, raw_key_values(reader), specs) as writer:
            for info in reader.tensors.values():
                raw = reader.read(info)
                if info.type.name != "F32":
                    raw = np.asarray(dequantize_rows(raw, info.type.id, n_per_row=info.n_cols), np.float32)
                    raw = raw if type_name == "F32" else raw.astype(np.float16)
                writer.write(writer.tensors[info.name], 0, np.ascontiguousarray(raw))
            writer.commit()
    return target


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "demo.gguf"
    convert(DEMO_ADAPTER, path, smollm2_path())
    return path


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    path = tmp_path_factory.mktemp("merged") / "merged.gguf"
    return path, merge(smollm2_path(), [(DEMO_ADAPTER, 1.0)], path)


def test_a_merge_into_an_f32_copy_says_what_the_adapter_says_at_run_time(tmp_path, converted, f32_base):
    merge(f32_base, [(DEMO_ADAPTER, 1.0)], tmp_path / "merged.gguf")
    at_run_time = text(f32_base, converted, n_predict=24)
    assert text(tmp_path / "merged.gguf", n_predict=24) == at_run_time != text(f32_base, n_predict=24)


def test_the_merged_file_talks_like_the_adapter_and_unlike_the_base(merged, converted):
    answers = [text(merged[0]), text(smollm2_path(), converted), text(smollm2_path())]
    assert "Arrr" in answers[0] and "Arrr" in answers[1] and "Arrr" not in answers[2]


def test_a_directory_and_its_conversion_merge_alike(tmp_path, merged, converted):
    merge(smollm2_path(), [(converted, 1.0)], tmp_path / "merged.gguf")
    with GgufReader(merged[0]) as one, GgufReader(tmp_path / "merged.gguf") as other:
        for name in one.tensors:
            assert (one.read(one.tensors[name]) == other.read(other.tensors[name])).all()


def test_the_same_bytes_again_with_one_thread_and_with_two(tmp_path, merged):
    digests = {hashlib.sha256(merged[0].read_bytes()).hexdigest()}
    for threads in (1, 2):
        merge(smollm2_path(), [(DEMO_ADAPTER, 1.0)], tmp_path / "again.gguf", threads=threads, force=True)
        digests.add(hashlib.sha256((tmp_path / "again.gguf").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_size_is_the_bases_plus_metadata(merged):
    assert 0 < os.path.getsize(merged[0]) - os.path.getsize(smollm2_path()) < 4096


@pytest.mark.parametrize(
    ("rounding", "low", "high"), [("auto", 0.9, 1.1), ("dither", 0.9, 1.1), ("nearest", -0.01, 0.05)]
)
def test_how_much_of_a_real_adapter_is_kept(tmp_path, rounding, low, high):
    report = merge(smollm2_path(), [(DEMO_ADAPTER, 1.0)], tmp_path / "merged.gguf", Policy(rounding))
    assert low < report.whole.kept < high


@pytest.mark.parametrize("model", [smollm2_path, gemma3_path])
def test_every_real_tensor_decodes_as_in_c(model):
    with GgufReader(model()) as reader:
        for info in reader.tensors.values():
            if info.type.name in ("F32", "F16"):
                continue
            for first in range(0, info.n_rows, 8192):
                raw = reader.read(info, first, min(8192, info.n_rows - first))
                ours = np.empty((len(raw), info.n_cols), np.float32)
                CODECS[info.type.name].decode(raw, ours)
                assert ours.tobytes() == np.asarray(dequantize_rows(raw, info.type.id, n_per_row=info.n_cols)).tobytes()


@pytest.fixture(scope="module")
def f32_base(tmp_path_factory):
    return as_type(smollm2_path(), tmp_path_factory.mktemp("base") / "f32.gguf", "F32")


def next_logprobs(server, token_ids) -> dict[int, float]:
    request = {"prompt": token_ids, "n_predict": 1, "temperature": 0, "n_probs": 40, "cache_prompt": True}
    content = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in content["top_logprobs"]}


@pytest.mark.parametrize("name", ["demo-adapter", "scales-adapter"])
def test_the_converted_adapter_changes_the_logits_as_peft_does(tmp_path, f32_base, name):
    """Reference: transformers + PEFT in f32, see fixtures/make_reference_logprobs.py; llama.cpp on an f32 copy of the
    base.
    """
    convert(FIXTURES / name, tmp_path / "adapter.gguf", smollm2_path())
    cases = json.loads((FIXTURES / "reference-logprobs.json").read_text())["cases"]
    server = llama_server(f32_base, tmp_path / "adapter.gguf")
    differences = []
    for case in cases[name]:
        for k, top in enumerate(case["top"]):
            found = next_logprobs(server, case["token_ids"][: case["first"] + k + 1])
            differences += [abs(found[token] - logprob) for token, logprob in top[:5]]
    assert len(differences) >= 5 * 20
    assert np.mean(differences) < 0.02 and max(differences) < 0.15
    far = [
        abs(a[1] - b[1])
        for case, plain in zip(cases[name], cases["base"])
        for a, b in zip(case["top"][0][:3], plain["top"][0][:3])
    ]
    assert max(far) > 0.3  # the adapter does change what is said, so the closeness above is no accident


def test_a_k_quant_model_merged_talks_like_its_adapter_at_run_time(tmp_path):
    """Gemma 3 270M Q4_K_M (Q4_K, Q5_0, Q6_K, Q8_0) and an adapter on all its linear layers, at the ends of some texts
    on Perl.
    """
    adapter = FIXTURES / "gemma-perl-adapter"
    convert(adapter, tmp_path / "adapter.gguf", gemma3_path())
    report = merge(gemma3_path(), [(adapter, 1.0)], tmp_path / "merged.gguf")
    assert {tensor.target.type.name for tensor in report.plan.merged} == {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    text = (FIXTURES / "perl-eval.txt").read_text()
    prompts = [text[start : start + 300] for start in range(0, 20_000, 3_000)]
    merged = said(llama_server(tmp_path / "merged.gguf"), prompts)
    at_run_time = said(llama_server(gemma3_path(), tmp_path / "adapter.gguf"), prompts)
    base = said(llama_server(gemma3_path()), prompts)
    far, near = (distance(at_run_time, other) for other in (base, merged))
    assert far > 0.3 and near < 0.5 * far


def said(server, prompts) -> list[dict[int, float]]:
    """For each prompt the log-probabilities of the likeliest tokens after it."""
    return [next_logprobs(server, prompt) for prompt in prompts]


def distance(reference, other) -> float:
    """The mean difference in log-probability of the ten tokens that ``reference`` holds likeliest."""
    return np.mean([abs(a[token] - b[token]) for a, b in zip(reference, other) for token in list(a)[:10] if token in b])


def test_a_base_on_a_grid_is_quantized_onto_it_with_its_update(tmp_path, converted):
    """As QAT checkpoints are. What llama.cpp says along an answer with the adapter at run time is the reference."""
    base, out = as_type(smollm2_path(), tmp_path / "f16.gguf", "F16"), tmp_path / "merged.gguf"
    report = merge(base, [(DEMO_ADAPTER, 1.0)], out, Policy(mix="Q4_1"))
    kinds = {name.split(".")[2] for name in report.retention}
    for kind in kinds:
        assert np.mean([part.kept for name, part in report.retention.items() if kind in name]) > 0.93
    answer = complete(llama_server(base, converted), PROMPT, 48, n_probs=1)["logprobs"]["content"]
    prompts = [[PROMPT, *(token["id"] for token in answer[:n])] for n in range(1, len(answer))]
    with_adapter, alone, merged = (
        [next_logprobs(server, prompt) for prompt in prompts]
        for server in (llama_server(base, converted), llama_server(base), llama_server(out))
    )
    assert divergence(with_adapter, merged) < 0.04 * divergence(with_adapter, alone)


def divergence(reference, other):
    """Mean KL, over the tokens that the reference lists; what ``other`` does not list gets its least."""
    rows = zip(reference, other, strict=True)
    return np.mean(
        [sum(np.exp(lp) * (lp - of.get(token, min(of.values()))) for token, lp in ref.items()) for ref, of in rows]
    )
