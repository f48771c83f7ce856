"""New tokens and single rows in a merge: the base's rows as they were, the new ones after them, and llama.cpp knows the
words.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from libgguf import quantize_rows
from safetensors.numpy import save_file

from lora_gguf.api import verify
from lora_gguf.errors import MismatchError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, raw_key_values
from lora_gguf.merging.options import Policy
from lora_gguf.quants.ggml import BY_NAME
from tests import tiny
from tests.calls import merge
from tests.common import FIXTURES, llama_server, smollm2_path

KINDS = FIXTURES / "kinds"
EMBEDDING = "token_embd.weight"
WORDS = {"<|tool|>": 49152, "frobnicate": 49153}


def rows(path, name):
    with Base(path) as base:
        return base.reader_of(name).read(base.tensors[name])


def adapter(folder, n_rows, width, tokens, words):
    """An adapter with LoRA on one module and trained rows for ``tokens``, some of which are new."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    path = "base_model.model.model"
    tensors = {
        f"{path}.layers.0.self_attn.q_proj.lora_A.weight": rng.normal(size=(2, width)),
        f"{path}.layers.0.self_attn.q_proj.lora_B.weight": rng.normal(size=(n_rows, 2)) * 1e-3,
        f"{path}.embed_tokens.token_adapter.trainable_tokens_delta": rng.normal(size=(len(tokens), width)) * 0.1,
    }
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "trainable_token_indices": tokens,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(words))
    return folder, tensors[f"{path}.embed_tokens.token_adapter.trainable_tokens_delta"].astype(np.float32)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """SmolLM2, Q4_1, with two words more and another row for token 17."""
    folder = tmp_path_factory.mktemp("grown")
    source, values = adapter(folder / "words", 576, 576, [17, *WORDS.values()], WORDS)
    merge(smollm2_path(), [(source, 1.0)], folder / "grown.gguf")
    return folder / "grown.gguf", source, values


def test_new_rows_follow_the_bases_own(grown):
    out, _, values = grown
    with Base(out) as model:
        kind = model.tensors[EMBEDDING].type
        assert model.tensors[EMBEDDING].shape == (49154, 576)
    before, after = rows(smollm2_path(), EMBEDDING), rows(out, EMBEDDING)
    changed = (before != after[:49152]).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [17]
    wanted = np.frombuffer(bytes(quantize_rows(values, kind.id)), np.uint8).reshape(3, -1)
    assert np.array_equal(after[[17, 49152, 49153]], wanted)


def test_llama_cpp_knows_the_new_words(grown):
    out, _, _ = grown
    server = llama_server(out)
    request = {"n_predict": 1, "temperature": 0, "n_probs": 5, "cache_prompt": False}
    text, ids = (
        server.handle_completions(request | {"prompt": p})
        for p in ("<|tool|>frobnicate<|tool|>", [49152, 49153, 49152])
    )
    assert text["usage"]["prompt_tokens"] == ids["usage"]["prompt_tokens"] == 3
    assert text["choices"][0]["logprobs"] == ids["choices"][0]["logprobs"]
    assert (
        llama_server(smollm2_path()).handle_completions(request | {"prompt": "frobnicate"})["usage"]["prompt_tokens"]
        > 1
    )


def test_verify_expects_them(grown, tmp_path):
    out, source, _ = grown
    report = verify(out, smollm2_path(), [(source, 1.0)])
    assert report.ok, report.findings
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(out.read_bytes())
    with GgufReader(damaged) as reader:
        info = reader.tensors[EMBEDDING]
        position = reader.data_position + info.offset + 49153 * info.row_bytes
    with open(damaged, "r+b") as file:
        file.seek(position + 2)
        file.write(bytes([200] * 16))
    found = verify(damaged, smollm2_path(), [(source, 1.0)])
    assert not found.ok and found.findings[0].tensors == (EMBEDDING,)


def test_splits_and_single_shards(grown, tmp_path):
    out, source, _ = grown
    written = merge(smollm2_path(), [(source, 1.0)], tmp_path / "s.gguf", max_bytes=20_000_000).written
    with Base(written[0]) as parts, Base(out) as whole:
        assert list(parts.tensors) == list(whole.tensors) and len(written) == 5
        assert parts.get("tokenizer.ggml.tokens") == whole.get("tokenizer.ggml.tokens")
        for name in whole.tensors:
            assert np.array_equal(
                parts.reader_of(name).read(parts.tensors[name]), whole.reader_of(name).read(whole.tensors[name])
            )
    (alone,) = merge(smollm2_path(), [(source, 1.0)], tmp_path / "t.gguf", max_bytes=20_000_000, shard="1/5").written
    assert alone.read_bytes() == written[0].read_bytes()


def quantized(folder, name, type_name):
    """A tiny model with its matrices in ``type_name``."""
    source = tiny.base_gguf(folder, name)
    with GgufReader(source) as reader:
        fits = {i.name for i in reader.tensors.values() if len(i.shape) == 2 and i.n_cols % 32 == 0}
        specs = [
            TensorSpec(i.name, BY_NAME[type_name] if i.name in fits else i.type, i.shape)
            for i in reader.tensors.values()
        ]
        with GgufWriter(folder / f"{type_name}.gguf", raw_key_values(reader), specs) as writer:
            for info in reader.tensors.values():
                raw = reader.read(info)
                if info.name in fits:
                    raw = np.frombuffer(bytes(quantize_rows(raw.view(np.float32), BY_NAME[type_name].id)), np.uint8)
                writer.write(writer.tensors[info.name], 0, raw)
            writer.commit()
    return folder / f"{type_name}.gguf"


@pytest.mark.parametrize("rounding", ["auto", "nearest", "fresh"])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "IQ4_NL"])
@pytest.mark.parametrize("name", ["tokens", "tokens-tied", "only-tokens"])
def test_rows_that_were_not_trained_keep_their_bytes(tmp_path, name, type_name, rounding):
    base = quantized(tmp_path, (KINDS / name / "base").read_text(), type_name)
    merge(base, [(KINDS / name, 1.0)], tmp_path / "out.gguf", Policy(rounding))
    changed = (rows(base, EMBEDDING) != rows(tmp_path / "out.gguf", EMBEDDING)).any(axis=1)
    assert np.flatnonzero(changed).tolist() == ([3, 8] if name == "only-tokens" else [5, 17, 200])


def test_a_row_replaced_beside_lora_does_not_coarsen_the_others(tmp_path):
    """Two adapters on the embedding: single rows, and LoRA, whose share the rows' new grid must not erase."""
    base = quantized(tmp_path, "qwen2", "Q4_0")
    report = merge(base, [(KINDS / "embedding", 0.01), (KINDS / "tokens", 1.0)], tmp_path / "out.gguf")
    alone = merge(base, [(KINDS / "embedding", 0.01)], tmp_path / "alone.gguf")
    assert alone.retention[EMBEDDING].kept > 0.8 and report.retention[EMBEDDING].kept > 0.8
    both = [
        (KINDS / "embedding", 1.0),
        (KINDS / "tokens", 1.0),
    ]  # without the random numbers, which are of what is merged
    merge(base, both, tmp_path / "out.gguf", Policy("nearest"), force=True)
    merge(base, both[:1], tmp_path / "alone.gguf", Policy("nearest"), force=True)
    same = (rows(tmp_path / "out.gguf", EMBEDDING) == rows(tmp_path / "alone.gguf", EMBEDDING)).all(axis=1)
    assert np.flatnonzero(~same).tolist() == [5, 17, 200]


def test_a_mix_of_types_holds_new_rows(tmp_path):
    base = tiny.base_gguf(tmp_path, "qwen2")
    merge(base, [(KINDS / "new-tokens-whole", 1.0)], tmp_path / "out.gguf", Policy(mix="Q8_0"))
    with Base(tmp_path / "out.gguf") as model:
        assert model.tensors[EMBEDDING].shape == model.tensors["output.weight"].shape == (291, 32)
        assert model.tensors["output.weight"].type.name == "Q8_0" and len(model.get("tokenizer.ggml.tokens")) == 291


def copied(kind, folder, words):
    """A fixture's adapter with other words for its tokens, or none."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((KINDS / kind / name).read_bytes())
    if words:
        (folder / "added_tokens.json").write_text(json.dumps({word: 288 + i for i, word in enumerate(words)}))
    return folder


def new_rows(base, adapters, out, name):
    report = merge(base, [(adapter, 1.0) for adapter in adapters], out, force=True)
    return rows(out, name).view(np.float32)[288:], report


@pytest.mark.parametrize("name", [EMBEDDING, "output.weight"])
def test_two_adapters_with_the_same_tokens_share_their_rows(tmp_path, name):
    base, out = tiny.base_gguf(tmp_path, "qwen2"), tmp_path / "out.gguf"
    kinds = [KINDS / "new-tokens-whole", KINDS / "new-tokens-lora"]
    (one, _), (other, _) = (new_rows(base, [kind], out, name) for kind in kinds)
    both, report = new_rows(base, kinds, out, name)
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    assert any("3 new tokens are in several adapters" in line for line in report.plan.warnings)
    with GgufReader(out) as reader:
        assert reader.get("tokenizer.ggml.tokens")[288:] == ["<|begin|>", "<|end|>", "new word"]


@pytest.mark.parametrize("name", [EMBEDDING, "output.weight"])
def test_two_adapters_with_other_tokens_bring_them_all(tmp_path, name):
    base, out = tiny.base_gguf(tmp_path, "qwen2"), tmp_path / "out.gguf"
    first, second = (
        KINDS / "new-tokens-whole",
        copied("new-tokens-lora", tmp_path / "b", ["<|call|>", "<|end|>", "third"]),
    )
    (one, _), (other, _) = (new_rows(base, [adapter], out, name) for adapter in (first, second))
    both, _ = new_rows(base, [first, second], out, name)
    expected = np.concatenate([one[:1], (one[1:2] + other[1:2]) / 2, one[2:], other[:1], other[2:]])
    np.testing.assert_allclose(both, expected, atol=1e-6)
    with GgufReader(out) as reader:
        found = reader.get("tokenizer.ggml.tokens")
    assert found[288:] == ["<|begin|>", "<|end|>", "new word", "<|call|>", "third"]
    answer = tiny.server(out).handle_completions({"prompt": [1, 292], "n_predict": 1})
    assert answer["usage"]["prompt_tokens"] == 2


@pytest.mark.campaign("adapters that do not fit")
def test_two_adapters_whose_tokens_have_no_names_are_refused(tmp_path):
    base, second = tiny.base_gguf(tmp_path, "qwen2"), copied("new-tokens-lora", tmp_path / "b", [])
    with pytest.raises(MismatchError, match="two adapters add tokens.*merge one, then the other"):
        merge(base, [(KINDS / "new-tokens-whole", 1.0), (second, 1.0)], tmp_path / "out.gguf")


def test_added_tokens_rename_fillers_without_trained_rows(tmp_path):
    """A tokenizer that was given names for rows which the base has anyway, and one for which nobody trained a row."""
    source, _ = adapter(tmp_path / "a", 32, 32, [5], {"<|call|>": 287, "[PAD]": 288})
    base = tiny.base_gguf(tmp_path, "qwen2")
    with GgufReader(base) as reader:
        texts = reader.get("tokenizer.ggml.tokens")
    with pytest.raises(MismatchError, match="token 287"):
        merge(base, [(source, 1.0)], tmp_path / "out.gguf")
    (source / "added_tokens.json").write_text(json.dumps({texts[286]: 286, "[PAD]": 288}))
    report = merge(base, [(source, 1.0)], tmp_path / "out.gguf")
    assert any("'[PAD]'" in warning and "left out" in warning for warning in report.plan.warnings)
    with GgufReader(tmp_path / "out.gguf") as reader:
        assert reader.get("tokenizer.ggml.tokens") == texts


def test_a_tied_base_gets_a_head_with_the_new_tokens(tmp_path):
    model = tiny.from_config(tiny.config_of("qwen2"))
    tensors = tiny.tensors_of("qwen2", model)
    del tensors["output.weight"]
    base = tiny.write_gguf(tmp_path / "tied.gguf", "qwen2", tensors)
    merge(base, [(KINDS / "new-tokens-whole", 1.0)], tmp_path / "out.gguf")
    wanted = tiny.tensors_from(KINDS / "new-tokens-whole" / "merged.safetensors", model)
    for name in ("token_embd.weight", "output.weight"):
        found = rows(tmp_path / "out.gguf", name).view(np.float32)
        np.testing.assert_allclose(found, wanted[name], atol=3e-6)
    answer = tiny.server(tmp_path / "out.gguf").handle_completions({"prompt": [1, 290], "n_predict": 1})
    assert answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("words", [{}, {"<image_soft_token>": 288}, {"<image_soft_token>": 288, "<call>": 290}])
def test_a_gguf_without_the_last_rows_of_hugging_faces_vocabulary(tmp_path, words, whole):
    """Gemma 3's GGUFs leave out rows that only images use: they stay out, unless tokens were added after them."""
    base = tiny.base_gguf(tmp_path, "gemma3")
    folder, rng = tmp_path / "a", np.random.default_rng(2)
    folder.mkdir()
    path, original = "base_model.model.model.embed_tokens", rng.standard_normal((296, 32)).astype(np.float32)
    original[:288] = rows(base, EMBEDDING).view(np.float32)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 296), (32, 2)))
    after = original + (b @ a).T
    factors = {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b, f"{path}.base_layer.weight": original}
    save_file({f"{path}.weight": after} if whole else factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 2, "modules_to_save": ["embed_tokens"]})
    )
    (folder / "added_tokens.json").write_text(json.dumps(words))
    merge(base, [(folder, 1.0)], tmp_path / "out.gguf", tied="shared")
    n = 291 if "<call>" in words else 288
    found = rows(tmp_path / "out.gguf", EMBEDDING).view(np.float32)
    np.testing.assert_allclose(found, after[:n], atol=1e-5)
    with Base(tmp_path / "out.gguf") as model:
        assert len(model.get("tokenizer.ggml.tokens")) == n and ("<call>" in model.get("tokenizer.ggml.tokens")) == (
            n == 291
        )


def test_an_adapter_of_a_tied_embedding_beside_one_that_unties_it(tmp_path):
    """Single rows trained for embedding and head at once change both, though another adapter gives the head a
    tensor.
    """
    model = tiny.from_config(tiny.config_of("qwen2"))
    tensors = tiny.tensors_of("qwen2", model)
    del tensors["output.weight"]
    base = tiny.write_gguf(tmp_path / "tied.gguf", "qwen2", tensors)
    adapters = [(KINDS / "embedding", 1.0), (KINDS / "tokens", 1.0)]
    merge(base, [(KINDS / "embedding", 1.0)], tmp_path / "one.gguf")
    report = merge(base, adapters, tmp_path / "two.gguf")
    assert any("output.weight" in line and "MB" in line and "--tied" in line for line in report.plan.warnings)
    for name in ("token_embd.weight", "output.weight"):
        same = (rows(tmp_path / "one.gguf", name) == rows(tmp_path / "two.gguf", name)).all(axis=1)
        assert np.flatnonzero(~same).tolist() == [5, 17, 200]


def test_a_head_of_its_own_gets_the_type_of_the_mix(tmp_path):
    model = tiny.from_config(tiny.config_of("qwen2"))
    tensors = tiny.tensors_of("qwen2", model)
    del tensors["output.weight"]
    base = tiny.write_gguf(tmp_path / "tied.gguf", "qwen2", tensors)
    merge(base, [(KINDS / "embedding", 1.0)], tmp_path / "out.gguf", Policy(mix="Q4_0"))
    with Base(tmp_path / "out.gguf") as merged:
        assert merged.tensors["output.weight"].type.block_size > 1
