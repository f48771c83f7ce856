"""``convert``: what llama.cpp says with the converted adapter is what transformers says with PEFT's merged model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lora_gguf.adapters.lora import read_adapter_gguf
from lora_gguf.api import convert
from lora_gguf.errors import MismatchError, UnsupportedError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.hparams import from_config
from tests import tiny
from tests.common import FIXTURES, smollm2_path
from tests.test_adapter import directory, tensors

KINDS = FIXTURES / "kinds"
DECODERS = [name for name in tiny.NAMES if name != "bert"]
# llama.cpp's GELU is a table in F16
TOLERANCE = dict.fromkeys(("bloom", "falcon", "gpt2", "gptneox", "starcoder2", "gemma", "gemma2", "gemma3"), 5e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def assert_top(found, wanted, atol):
    """The same tokens, and the same log-probabilities of all that are among the five likeliest on both sides."""
    assert [step[0][0] for step in found] == [step[0][0] for step in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        theirs = dict(theirs)
        for token, logprob in ours[:4]:
            assert abs(theirs[token] - logprob) < atol


@pytest.mark.parametrize("name", DECODERS)
def test_llama_cpp_agrees_with_transformers_and_peft(name, folder):
    """The base proves the layouts (nothing of ours is between transformers and llama.cpp but them), the adapter the
    rest."""
    atol = TOLERANCE.get(name, 1e-4)
    base, out = tiny.base_gguf(folder, name), folder / f"{name}-adapter.gguf"
    assert_top(tiny.generate(base), tiny.expected(name)["base"]["top"], atol)
    placement = convert(tiny.TINY / name / "adapter", out, base, base_config=tiny.TINY / name, outtype="f32")
    if name == "deepseek2":
        assert any("attn_kv_a_mqa" in warning for warning in placement.warnings)
    else:
        assert_top(tiny.generate(base, out), tiny.expected(name)["merged"]["top"], atol)


@pytest.mark.parametrize("name", DECODERS)
def test_merged_weights_in_llama_cpp(name, folder):
    model = from_config(tiny.config_of(name))
    weights = tiny.tensors_of(name, model) | tiny.tensors_of(name, model, "merged")
    merged = tiny.write_gguf(folder / f"{name}-merged.gguf", name, weights)
    assert_top(tiny.generate(merged), tiny.expected(name)["merged"]["top"], TOLERANCE.get(name, 1e-4))


def test_an_encoder(folder):
    base, out = tiny.base_gguf(folder, "bert"), folder / "bert-adapter.gguf"
    convert(tiny.TINY / "bert" / "adapter", out, base)
    for adapter, what in ((None, "base"), (out, "merged")):
        np.testing.assert_allclose(tiny.embed(base, adapter), tiny.expected("bert")[what]["embedding"], atol=2e-4)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_types(tmp_path, outtype):
    convert(tiny.TINY / "llama" / "adapter", tmp_path / "a.gguf", base_config=tiny.TINY / "llama", outtype=outtype)
    with GgufReader(tmp_path / "a.gguf") as file:
        assert {info.type.name for info in file.tensors.values()} == {outtype.upper()}


def test_refusals_write_nothing(tmp_path):
    source = directory(tmp_path)
    out = tmp_path / "out" / "a.gguf"
    out.parent.mkdir()
    with pytest.raises(UsageError, match="--base"):
        convert(source, out)
    with pytest.raises(UsageError, match="q4_k"):
        convert(source, out, smollm2_path(), outtype="q4_k")
    with pytest.raises(MismatchError, match="the base it was trained on"):
        convert(source, out, smollm2_path())
    assert not list(out.parent.iterdir())


def test_the_base_is_not_overwritten(tmp_path):
    base = tiny.base_gguf(tmp_path, "llama")
    before = base.read_bytes()
    with pytest.raises(Exception, match="input"):
        convert(tiny.TINY / "llama" / "adapter", base, base, force=True)
    assert base.read_bytes() == before


def test_activated_lora_keeps_its_tokens(tmp_path):
    shutil.copytree(tiny.TINY / "llama" / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alora_invocation_tokens": [5, 6, 7]}))
    placement = convert(tmp_path / "adapter", tmp_path / "a.gguf", base_config=tiny.TINY / "llama")
    with GgufReader(tmp_path / "a.gguf") as file:
        assert file.get("adapter.alora.invocation_tokens") == [5, 6, 7] == placement.invocation_tokens
        assert file.kv["adapter.alora.invocation_tokens"].type == 9


def test_a_kind_that_is_not_low_rank_is_refused_by_name(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = tensors("model.layers.0.self_attn.q_proj", n_in=32, n_out=32) | {
        f"{name}.lora_magnitude_vector": np.ones(32, np.float32)
    }
    source = directory(tmp_path, weights, use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA.*merge"):
        convert(source, tmp_path / "a.gguf", tiny.base_gguf(tmp_path, "llama"))


def test_scales_of_all_modules_survive_one_alpha(tmp_path):
    shutil.copytree(tiny.TINY / "llama" / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    changed = {"alpha_pattern": {"q_proj": 3, r".*layers\.1\..*": 1.5}, "use_rslora": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    placement = convert(tmp_path / "adapter", tmp_path / "a.gguf", base_config=tiny.TINY / "llama")
    assert {pair.scale for pair in placement.pairs} == {3.0, 1.5, 0.75}
    for before, after in zip(placement.pairs, read_adapter_gguf(tmp_path / "a.gguf")[0], strict=True):
        np.testing.assert_allclose(after.delta(), before.delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "dora-fused", "oft", "boft"])
def test_what_is_not_low_rank_at_a_stated_rank(tmp_path, kind):
    """At full rank the approximation is exact; at a lower one its error is the one that it states."""
    name = (KINDS / kind / "base").read_text()
    base = tiny.base_gguf(tmp_path, name)
    model = from_config(tiny.config_of(name))
    weights = tiny.tensors_of(name, model)
    wanted = {
        key: array - weights[key]
        for key, array in tiny.tensors_from(KINDS / kind / "merged.safetensors", model).items()
    }
    with pytest.raises(UnsupportedError, match="--rank"):
        convert(KINDS / kind, tmp_path / "a.gguf", base)
    for rank in (32, 5):
        placement = convert(KINDS / kind, tmp_path / "a.gguf", base, rank=rank, force=True)
        for pair in read_adapter_gguf(tmp_path / "a.gguf")[0]:
            error = np.linalg.norm(pair.delta() - wanted[pair.name]) / np.linalg.norm(wanted[pair.name])
            assert pair.rank == min(rank, *pair.shape) and abs(error - placement.approximations[pair.name]) < 1e-5
            assert (error < 1e-5) == (rank == 32)


@pytest.mark.parametrize("kind", ["loha", "lokr", "vera", "adalora", "embedding", "rslora-patterns"])
def test_what_is_low_rank_after_all_is_exact(tmp_path, kind):
    name = (KINDS / kind / "base").read_text()
    convert(KINDS / kind, tmp_path / "a.gguf", tiny.base_gguf(tmp_path, name))
    model = from_config(tiny.config_of(name))
    base, merged = tiny.tensors_of(name, model), tiny.tensors_from(KINDS / kind / "merged.safetensors", model)
    for pair in read_adapter_gguf(tmp_path / "a.gguf")[0]:
        np.testing.assert_allclose(base[pair.name] + pair.delta(), merged[pair.name], atol=3e-6)


@pytest.mark.parametrize("kind", ["whole", "lora-bias", "norms", "bias-all", "ia3"])
def test_vectors_are_refused_with_any_rank(tmp_path, kind):
    name = (KINDS / kind / "base").read_text()
    with pytest.raises(UnsupportedError, match="merge it into the base"):
        convert(KINDS / kind, tmp_path / "a.gguf", tiny.base_gguf(tmp_path, name), rank=8)
