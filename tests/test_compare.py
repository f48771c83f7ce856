"""``compare``: llama.cpp with base, adapter at run time and merged file, beside one another."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf import api, errors
from lora_gguf.checks.closeness import Closeness, divergence
from lora_gguf.checks.compared import CompareReport, Spoken
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
    assert report.merged.same >= 0.9 > 0.5 > report.base.same and report.lost < 0.1
    assert report.again.same > report.merged.same and 0.8 < report.merged.strength < 1.1
    assert report.lost / 2 <= report_of_merge.expected_loss <= report.lost * 2  # told from the weights alone


def test_the_answers_are_those_of_llama_cpp_itself(merged):
    report = api.compare(smollm2_path(), DEMO_ADAPTER, merged, [QUESTION], n_predict=12, threads=1)
    turn = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    for name, path in (("base", smollm2_path()), ("merged", merged)):
        assert report.spoken[0].answers[name] == complete(llama_server(path), system + turn, 12)["text"].strip()


def test_a_merge_of_another_base_is_refused(merged, capsys):
    code, out, err = run(capsys, "compare", gemma3_path(), DEMO_ADAPTER, merged)
    assert code == errors.MismatchError.exit_code and not out and err.count("\n") == 1
    assert "llama of 49152 tokens" in err and "gemma3 of 262144 tokens" in err


@pytest.fixture(scope="module")
def gemma_merges(tmp_path_factory):
    """Gemma 3 270M in Q4_K_M with a right merge of an adapter, and wrong ones."""
    adapter, out = FIXTURES / "gemma-perl-adapter", tmp_path_factory.mktemp("gemma")
    weights = load_file(adapter / "adapter_model.safetensors")
    rng = np.random.default_rng(0)
    other = {name: rng.permutation(values) if "lora_B" in name else values for name, values in weights.items()}
    (out / "other").mkdir()
    save_file(other, out / "other" / "adapter_model.safetensors")
    shutil.copy(adapter / "adapter_config.json", out / "other")
    for name, named in (
        ("right", adapter),
        ("half", (adapter, 0.5)),
        ("more", (adapter, 2.0)),
        ("other", out / "other"),
    ):
        api.merge(gemma3_path(), named, out / f"{name}.gguf")
    return {path.stem: path for path in out.glob("*.gguf")} | {"base": gemma3_path()}


@pytest.mark.parametrize(
    ("name", "judgement", "words", "strength"),
    [
        ("right", "yes", "answers as the adapter at run time", (0.9, 1.1)),
        ("base", "no", "answers as the base does, not as the adapter", (0, 0.01)),
        ("half", "no", "of its strength, as of another --scale", (0.3, 0.65)),
        ("more", "no", "of its strength, as of another --scale", (1.3, 2.2)),
        ("other", "no", "answers neither as the base does nor as the adapter", (-0.2, 0.3)),
    ],
)
def test_prompts_that_show_little_of_an_adapter_tell_right_from_wrong(gemma_merges, name, judgement, words, strength):
    adapter = FIXTURES / "gemma-perl-adapter"
    asked = {} if name == "right" else {"prompts": BEGINNINGS[:2], "n_predict": 10}  # English prose, not Perl
    report = api.compare(gemma3_path(), adapter, gemma_merges[name], threads=1, **asked)
    assert report.judgement == judgement and words in report.verdict
    assert strength[0] <= report.merged.strength <= strength[1]
    assert report.again.same > 0.8 and 0.9 < report.again.strength < 1.1  # what the right file is held against
    if name == "right":
        assert report.merged.agreement >= 0.9 and report.merged.same > 0.9 * report.again.same
        assert report.merged.same > report.base.same + 0.05


def test_a_k_quant_base_on_prompts_of_the_adapters_kind(gemma_merges):
    adapter = FIXTURES / "gemma-perl-adapter"
    text = (FIXTURES / "perl-eval.txt").read_text()
    prompts = [text[start : start + 300] for start in range(0, 20_000, 10_000)]
    report = api.compare(gemma3_path(), adapter, gemma_merges["right"], prompts, threads=1)
    assert report.judgement == "yes" and report.merged.agreement >= 0.9 and report.merged.kl < 0.25 * report.base.kl


@pytest.mark.parametrize(("scale", "judgement"), [(0.5, "no"), (0.75, "partly"), (1.5, "no")])
def test_another_scale_is_not_taken_for_the_adapters(tmp_path, scale, judgement):
    api.merge(smollm2_path(), (DEMO_ADAPTER, scale), tmp_path / "scaled.gguf")
    assert api.compare(smollm2_path(), DEMO_ADAPTER, tmp_path / "scaled.gguf", threads=1).judgement == judgement


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
        found.add(adapter, {chosen: math.log(0.9), 1: math.log(0.09)} if chosen > 1 else adapter, adapter)
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


def test_the_strength_of_an_effect_is_found_below_noise():
    rng = np.random.default_rng(1)
    found = {name: Closeness() for name in ("right", "half", "none", "unlike", "more")}
    for _ in range(300):
        plain = dict(enumerate(np.log(rng.dirichlet(np.ones(20)))))
        effect, noise, unlike = rng.normal(size=(3, 20)) * [[0.3], [0.1], [0.3]]
        changes = {"right": effect + noise, "half": effect / 2 + noise, "none": noise, "unlike": unlike}
        changes["more"] = effect * 1.5 + noise
        said = {token: p + effect[token] for token, p in plain.items()}
        for name, change in changes.items():
            found[name].add(said, {token: p + change[token] for token, p in plain.items()}, plain)
    strengths = {name: closeness.strength for name, closeness in found.items()}
    assert strengths == pytest.approx({"right": 1, "half": 0.5, "none": 0, "unlike": 0, "more": 1.5}, abs=0.05)
    assert found["right"].likeness > 0.9 > 0.1 > abs(found["unlike"].likeness)
    assert found["right"].astray == pytest.approx(1 / 9, abs=0.03) and found["unlike"].astray > 1.5


def closeness(n, same, kl, strength, astray):
    """What 100% of effect would be 1 of; ``astray`` gives what else is changed."""
    return Closeness(n, n * same, n * kl, 0, n, n * strength, n * (astray - 1 + 2 * strength))


@pytest.mark.parametrize(
    ("base", "merged", "word", "told"),
    [
        (1.0, (0.01, 1.0, 0.02), "yes: ", "answers as the adapter"),
        (1.0, (0.3, 1.0, 0.3), "partly: ", "--max-growth"),
        (1.0, (0.05, 0.8, 0.1), "partly: ", "80% of the strength"),
        (1.0, (1.0, 0.0, 1.0), "no: ", "as the base does"),
        (1.0, (0.2, 0.5, 0.3), "no: ", "at 50% of its strength"),
        (1.0, (7.0, 1.0, 3.0), "no: ", "neither"),
        (1.0, (0.1, 1.0, 0.6), "no: ", "neither"),
        (0.001, (0.0, 0.3, 1.0), "", "so does the base"),
    ],
)
def test_the_verdict(base, merged, word, told):
    for n, sure in ((10, False), (200, True)):
        near = [closeness(n, 0.5, base, 0, 1), closeness(n, 0.95, 0, 1, 0), closeness(n, 0.9, *merged)]
        report = CompareReport("base.gguf", "merged.gguf", [Spoken("?", {}, *near)])
        assert word in report.verdict and report.ok == (word != "no: ") and report.judgement == word.partition(":")[0]
        assert told in report.verdict
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
