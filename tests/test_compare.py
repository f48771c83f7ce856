"""``compare``: llama.cpp with base, adapter at run time and merged file, beside one another."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import numpy as np
import pytest

from lora_gguf import api, errors
from lora_gguf.checks.closeness import Closeness, CompareReport, Spoken, divergence
from lora_gguf.checks.prompts import BEGINNINGS, Prompts, read_prompts
from tests import tiny
from tests.common import DEMO_ADAPTER, FIXTURES, complete, gemma3_path, llama_server, smollm2_path
from tests.test_cli import run

QUESTION = "What should I eat for breakfast?"


@pytest.fixture(scope="module")
def report_of_merge(tmp_path_factory):
    return api.merge(smollm2_path(), DEMO_ADAPTER, tmp_path_factory.mktemp("merged") / "merged.gguf")


@pytest.fixture(scope="module")
def merged(report_of_merge):
    return report_of_merge.written[0]


def test_the_merged_file_answers_as_the_adapter_at_run_time(merged, report_of_merge):
    report = api.compare(smollm2_path(), DEMO_ADAPTER, merged, threads=1)
    assert report.ok and report.verdict.startswith("yes: merged.gguf")
    assert report.merged.agreement >= 0.9 > 0.5 > report.base.agreement and report.lost < 0.1
    assert report.lost / 2 <= report_of_merge.expected_loss <= report.lost * 2  # told from the weights alone


def test_the_answers_are_those_of_llama_cpp_itself(merged):
    report = api.compare(smollm2_path(), DEMO_ADAPTER, merged, [QUESTION], n_predict=12, threads=1)
    turn = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    for name, path in (("base", smollm2_path()), ("merged", merged)):
        assert report.spoken[0].answers[name] == complete(llama_server(path), system + turn, 12)["text"].strip()


def test_a_k_quant_base_on_prompts_of_the_adapters_kind(tmp_path):
    adapter = FIXTURES / "gemma-perl-adapter"
    api.merge(gemma3_path(), adapter, tmp_path / "merged.gguf")
    text = (FIXTURES / "perl-eval.txt").read_text()
    prompts = [text[start : start + 300] for start in range(0, 40_000, 10_000)]
    report = api.compare(gemma3_path(), adapter, tmp_path / "merged.gguf", prompts, threads=1)
    assert report.ok and report.merged.agreement >= 0.9 and report.merged.kl < 0.25 * report.base.kl
    none = api.compare(gemma3_path(), adapter, gemma3_path(), BEGINNINGS[:1], n_predict=16, threads=1)
    assert none.judgement == "no" and none.lost > 0.9 and "answers as the base does, not as the adapter" in none.verdict


def test_a_base_given_as_merged_is_a_clear_no(tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["compare", smollm2_path(), DEMO_ADAPTER, smollm2_path(), "-p", QUESTION, "-n", "16", "-t", "1"]
    code, out, err = run(capsys, *arguments, "--report", page)
    assert code == errors.MismatchError.exit_code and page.stat().st_size > 10_000
    assert "error: no: " in err and "answers as the base does, not as the adapter" in err and "lora-gguf verify" in err
    assert out.count(f"> {QUESTION}") == 1 and "the merged file" in out


def test_another_scale_is_a_no_and_several_adapters_are_named_with_lora(tmp_path, capsys):
    api.merge(smollm2_path(), (DEMO_ADAPTER, -1.0), tmp_path / "minus.gguf")
    lora = ["--lora", f"{DEMO_ADAPTER}:0.5", "--lora", f"{DEMO_ADAPTER}:0.5"]
    code, out, err = run(
        capsys, "compare", smollm2_path(), tmp_path / "minus.gguf", *lora, "-p", QUESTION, "-n", "8", "--json"
    )
    report = json.loads(out)
    assert code == errors.MismatchError.exit_code and "neither as the base does nor as the adapter" in err
    assert not report["ok"] and report["prompts"][0]["answers"]["adapter"].startswith("Arrr")


def test_what_llama_cpp_cannot_apply_is_refused_with_what_to_do_instead(tmp_path):
    base = tiny.base_gguf(tmp_path, "llama")
    with pytest.raises(errors.UnsupportedError, match="lora-gguf verify"):
        api.compare(base, FIXTURES / "kinds" / "dora", base)


def test_without_the_package_it_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "xllamacpp" else real(name, *rest)
    )
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for name, content, way in (
        ("none", "", "pip install xllamacpp"),
        ("pyvenv.cfg", "home = /usr/bin\nuv = 0.9.1\n", f"uv pip install --python {sys.executable} xllamacpp"),
        ("pipx_metadata.json", "{}", "pipx inject lora-gguf xllamacpp"),
    ):
        (tmp_path / name).write_text(content)
        code, _, err = run(capsys, "compare", "a.gguf", tmp_path, "c.gguf")
        assert code == errors.UnsupportedError.exit_code and err.rstrip().endswith(f": {way}")


def test_tokens_that_the_adapter_holds_as_likely_are_told_from_others():
    adapter = {1: math.log(0.40), 2: math.log(0.35), 3: math.log(0.20)}
    found = Closeness()
    for chosen in (1, 2, 3, 4):
        found.add(adapter, {chosen: math.log(0.9), 1: math.log(0.09)} if chosen > 1 else adapter)
    assert (found.n_tokens, found.n_same, found.n_tied) == (4, 1, 1)
    assert found.same == 0.25 and found.agreement == 0.5


def test_divergence_is_kl_where_all_tokens_are_listed_and_no_larger_where_not():
    rng = np.random.default_rng(0)
    p, q = (np.log(rng.dirichlet(np.ones(50))) for _ in range(2))
    exact = float(np.sum(np.exp(p) * (p - q)))
    everything = [dict(enumerate(map(float, logs))) for logs in (p, q)]
    assert divergence(*everything) == pytest.approx(exact, abs=1e-5)
    few = [dict(sorted(logs.items(), key=lambda item: -item[1])[:12]) for logs in everything]
    assert 0 < divergence(*few) <= exact
    assert divergence(few[0], few[0]) == pytest.approx(0, abs=1e-6)
    apart = {0: math.log(0.9)}, {1: math.log(0.9), 2: math.log(0.05)}
    assert divergence(*apart) > 1


@pytest.mark.parametrize(
    ("base", "merged", "word"),
    [
        (1.0, 0.01, "yes: "),
        (1.0, 0.3, "partly: "),
        (1.0, 1.0, "no: "),
        (1.0, 7.0, "no: "),
        (0.001, 0.0, ""),
    ],
)
def test_the_verdict(base, merged, word):
    for n, sure in ((10, False), (200, True)):
        part = Spoken("?", {}, Closeness(n, n // 2, n * base), Closeness(n, n * 9 // 10, n * merged))
        report = CompareReport("base.gguf", "merged.gguf", [part])
        assert word in report.verdict and report.ok == (word != "no: ") and report.judgement == word.partition(":")[0]
        assert ("of 10 tokens only: give more prompts" in report.verdict) != sure


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text('one\n\n"two\\nlines"\n', encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two\nlines"]
    (tmp_path / "prompts.txt").write_text('"one\n')
    with pytest.raises(errors.MalformedError):
        read_prompts(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(errors.UsageError):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(errors.FileError):
        read_prompts(tmp_path / "none.txt")
    for wrong in (dict(texts=("",)), dict(n_predict=0), dict(raw="no")):
        with pytest.raises(errors.UsageError):
            Prompts(**wrong)
