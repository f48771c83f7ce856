"""What ``doctor`` foretells, against what the merge then does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from lora_gguf.api import doctor
from lora_gguf.checks.tokenizer import compare_tokenizer
from lora_gguf.cli import execute
from lora_gguf.errors import MismatchError, UnsupportedError
from lora_gguf.files.base import Base
from lora_gguf.mapping.sources import placement_of
from lora_gguf.merging.options import ROUNDINGS, Policy
from tests import tiny
from tests.calls import merge
from tests.common import DEMO_ADAPTER, FIXTURES, gemma3_path, smollm2_path
from tests.test_families import ADAPTERS, KINDS
from tests.test_inspect import model_bytes
from tests.test_merge import base_and_adapter

PAIRS = {
    "demo": (smollm2_path, DEMO_ADAPTER),
    "scales": (smollm2_path, FIXTURES / "scales-adapter"),
    "gemma": (gemma3_path, FIXTURES / "gemma-perl-adapter"),
}


def merged(tmp_path, base, adapter, policy):
    report = merge(base, [(adapter, 1.0)], tmp_path / "merged.gguf", policy, force=True)
    return report.whole.kept, report.written[0].stat().st_size


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_foretold_is_what_the_merge_reports(tmp_path, name):
    path, adapter = PAIRS[name]
    report = doctor(path(), [(adapter, 1.0)])
    assert report.ok and report.recommendation.startswith("merge with the defaults")
    for rounding in ROUNDINGS:
        kept, n_bytes = merged(tmp_path, path(), adapter, Policy(rounding))
        foretold = report.outlook(rounding)
        assert abs(foretold.kept - kept) < 0.1, rounding
        assert 0 <= n_bytes - foretold.n_bytes < 2000


@pytest.mark.parametrize("type", ["Q8_0", "BF16"])
def test_other_types_are_foretold_too(tmp_path, type):
    report = doctor(smollm2_path(), [(FIXTURES / "scales-adapter", 0.01)])
    base, adapter = smollm2_path(), [(FIXTURES / "scales-adapter", 0.01)]
    found = merge(base, adapter, tmp_path / "merged.gguf", Policy(type=type))
    foretold = report.outlook(type)
    assert abs(foretold.kept - found.whole.kept) < 0.02 and abs(foretold.noise / found.whole.noise - 1) < 0.05
    assert 0 <= found.written[0].stat().st_size - foretold.n_bytes < 2000


def test_a_tensor_s_update_is_as_large_as_foretold():
    report = doctor(smollm2_path(), [(DEMO_ADAPTER, 1.0)])
    with Base(smollm2_path()) as base:
        norms = {pair.name: float(np.linalg.norm(pair.delta())) for pair in placement_of(DEMO_ADAPTER, base).pairs}
    assert {tensor.name for tensor in report.tensors} == set(norms)
    assert all(abs(tensor.delta_norm / norms[tensor.name] - 1) < 0.6 for tensor in report.tensors)
    whole = sum(tensor.delta_norm**2 for tensor in report.tensors) / sum(norm**2 for norm in norms.values())
    assert abs(whole - 1) < 0.1
    assert all(0 < tensor.delta_per_step < 0.2 and tensor.layer is not None for tensor in report.tensors)


def test_the_memory_is_about_that_of_the_merge(tmp_path):
    report = doctor(smollm2_path(), [(DEMO_ADAPTER, 1.0)], threads=2)
    command = ["merge", smollm2_path(), DEMO_ADAPTER, "-o", tmp_path / "merged.gguf", "-q", "-t", 2]
    # not ru_maxrss: an exec hands on that of the process before, here of all tests so far
    code = f"import lora_gguf.cli as c; c.execute({[str(word) for word in command]!r}); print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)[1]
    assert 0.7 < report.memory_bytes / (int(peak) * 1024) < 1.5
    assert 0 < report.seconds < 600


def test_a_refusal_is_the_merge_s_with_its_exit_code(capsys):
    assert execute(["doctor", str(gemma3_path()), str(DEMO_ADAPTER), "--json"]) == MismatchError.exit_code
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not report["ok"] and report["refusal"]["exit_code"] == MismatchError.exit_code
    assert not report["outlooks"] and "lora-gguf: error: " in err and report["refusal"]["message"] in err


def test_a_kind_that_cannot_be_merged(tmp_path):
    config = json.loads((DEMO_ADAPTER / "adapter_config.json").read_text()) | {"kasa_config": {"beta": 1e-4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").symlink_to(DEMO_ADAPTER / "adapter_model.safetensors")
    report = doctor(smollm2_path(), [(tmp_path, 1.0)])
    assert isinstance(report.refusal, UnsupportedError) and not report.ok


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["no.gguf", "./no"], 7),
        (["base.gguf", "./no"], 7),
        (["adapter.gguf", "base.gguf"], (3, 5)),
        (["base.gguf"], 2),
        ([], 2),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, monkeypatch, arguments, code):
    base_and_adapter(tmp_path, "Q4_0")
    monkeypatch.chdir(tmp_path)
    found = execute(["doctor", *arguments])
    err = capsys.readouterr().err
    assert found in (code if isinstance(code, tuple) else (code,)) and err.count("\n") == 1 and "error" in err


def test_nothing_is_written_and_the_table_reads(tmp_path, capsys, monkeypatch):
    base_and_adapter(tmp_path, "Q4_0")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert execute(["doctor", "base.gguf", "adapter.gguf"]) == 0
    out = capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == before
    assert "ffn_up" in out and "--rounding nearest" in out and out.splitlines()[-1].startswith("merge with")


def test_a_base_on_the_hub_is_not_downloaded(local_hub, tmp_path):
    local_hub.repos["someone/model-GGUF"] = {"model-Q4_1.gguf": model_bytes()}
    local_hub.listing("someone/model-GGUF")
    adapter = FIXTURES / "scales-adapter"
    far, near = doctor("someone/model-GGUF:Q4_1", [(adapter, 1.0)]), doctor(smollm2_path(), [(adapter, 1.0)])
    assert local_hub.n_sent < 0.03 * len(model_bytes())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert far.seconds is None and far.output_bytes == near.output_bytes
    for outlook in near.outlooks:
        assert abs(far.outlook(outlook.name).kept - outlook.kept) < 0.2, outlook.name


@pytest.fixture
def tokenizer(tmp_path):
    """Writes the tokenizer files that go with SmolLM2, changed as told, and returns the remarks on them by topic."""
    with Base(smollm2_path()) as base:
        tokens, template = base.get("tokenizer.ggml.tokens"), base.get("tokenizer.chat_template")
        vocabulary = {"model": {"vocab": {text: i for i, text in enumerate(tokens)}}, "added_tokens": []}
        config = {"eos_token": tokens[2], "bos_token": {"content": tokens[1]}, "chat_template": template}

        def write(vocabulary_changes=(), config_changes=()):
            (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary | dict(vocabulary_changes)))
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | dict(config_changes)))
            return {remark.topic: remark for remark in compare_tokenizer(tmp_path, base)}

        yield write, vocabulary


def test_the_same_tokenizer_is_told_so(tokenizer):
    remarks = tokenizer[0]()
    assert {remarks[topic].level for topic in ("vocabulary", "special tokens", "chat template")} == {"ok"}
    assert "49152" in remarks["vocabulary"].text


def test_another_tokenizer_is_warned_about(tokenizer):
    write, vocabulary = tokenizer
    shifted = {text: i + 1 for text, i in vocabulary["model"]["vocab"].items() if i < 40000}
    remarks = write({"model": {"vocab": shifted}}, {"eos_token": "</s>", "chat_template": "{{ messages }}"})
    assert {remarks[topic].level for topic in ("vocabulary", "special tokens", "chat template")} == {"warning"}
    assert "differ" in remarks["vocabulary"].text and "</s>" in remarks["special tokens"].text


def test_new_tokens_are_counted(tokenizer):
    remarks = tokenizer[0]({"added_tokens": [{"id": 49152, "content": "<new>", "special": True}]})
    assert "1 new token" in remarks["vocabulary"].text and "<new>" in remarks["vocabulary"].text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


@pytest.mark.parametrize("name", [*tiny.NAMES, *ADAPTERS])
def test_every_architecture_and_kind_is_foretold(folder, name):
    family = (KINDS / name / "base").read_text() if name in ADAPTERS else name
    adapter = KINDS / name if name in ADAPTERS else tiny.TINY / name / "adapter"
    report = doctor(
        tiny.base_gguf(folder, family),
        [(adapter, 1.0)],
        base_config=tiny.TINY / family if family == "falcon-h1" else None,
    )
    assert report.ok and report.tensors
    assert abs(report.outlook("auto").kept - 1) < 1e-3 and len(report.outlooks) <= 3  # roundings do not matter to F32
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ok"]
