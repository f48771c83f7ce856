"""``vocabulary``: tokens that an adapter adds, in the base's list and in its embedding and head."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.api import convert
from lora_gguf.errors import MalformedError, MismatchError
from lora_gguf.files.gguf_reader import GgufReader, decode_value
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, raw_key_values
from lora_gguf.mapping.vocabulary import Token, added_tokens, extended, learned_tokens
from tests import tiny
from tests.calls import gguf_pairs
from tests.common import FIXTURES

KINDS = FIXTURES / "kinds"
WORDS = ["<|begin|>", "<|end|>", "new word"]


def place(folder, source, **options):
    base = tiny.base_gguf(folder, (source / "base").read_text())
    with GgufReader(base) as reader:
        return gguf_pairs(read_adapter(source), reader, updates=True, new_tokens=True, tied="shared", **options)


def value(raw, key):
    """The value in a raw key/value pair."""
    start = 8 + len(key)
    return decode_value(raw[start + 4 :], int.from_bytes(raw[start : start + 4], "little"))


@pytest.mark.parametrize(
    ("name", "tensors", "n"),
    [
        ("new-tokens-whole", {"token_embd.weight", "output.weight"}, 3),
        ("new-tokens-lora", {"token_embd.weight", "output.weight"}, 3),
        ("new-tokens-tied", {"token_embd.weight"}, 3),
        ("new-tokens-only", {"token_embd.weight"}, 2),
    ],
)
def test_rows_and_tokens(tmp_path, name, tensors, n):
    placement = place(tmp_path, KINDS / name)
    assert {key: len(rows) for key, rows in placement.new_rows.items()} == dict.fromkeys(tensors, n)
    tokens = value(placement.key_values["tokenizer.ggml.tokens"], "tokenizer.ggml.tokens")
    types = value(placement.key_values["tokenizer.ggml.token_type"], "tokenizer.ggml.token_type")
    scores = value(placement.key_values["tokenizer.ggml.scores"], "tokenizer.ggml.scores")
    assert tokens[288:] == WORDS[:n] and types[288:] == [3, 3, 4][:n] and len(tokens) == len(types) == len(scores)


def test_the_grown_model_runs_in_llama_cpp(tmp_path):
    """A model written with the new rows and pairs: llama.cpp knows the new words as tokens."""
    source = KINDS / "new-tokens-whole"
    placement = place(tmp_path, source)
    with GgufReader(tmp_path / "qwen2.gguf") as base:
        key_values = raw_key_values(base, placement.key_values) + list(placement.key_values.values())
        specs = [
            TensorSpec(t.name, t.type, (t.shape[0] + len(placement.new_rows.get(t.name, ())), *t.shape[1:]))
            for t in base.tensors.values()
        ]
        with GgufWriter(tmp_path / "grown.gguf", key_values, specs) as writer:
            for info in base.tensors.values():
                writer.copy(writer.tensors[info.name], base, info)
                if info.name in placement.new_rows:
                    writer.write(writer.tensors[info.name], info.n_bytes, placement.new_rows[info.name])
            writer.commit()
    server = tiny.server(tmp_path / "grown.gguf")
    request = {"n_predict": 1, "temperature": 0, "n_probs": 5, "cache_prompt": False}
    by_text, by_id = (
        server.handle_completions(request | {"prompt": prompt})
        for prompt in ("<|end|>new word<|begin|>", [1, 289, 290, 288])
    )
    assert by_text["usage"]["prompt_tokens"] == by_id["usage"]["prompt_tokens"] == 4
    assert by_text["choices"][0]["logprobs"] == by_id["choices"][0]["logprobs"]


@pytest.mark.campaign("adapters that do not fit")
def test_convert_refuses_new_tokens(tmp_path):
    with pytest.raises(MismatchError, match="3 new tokens.*merge"):
        convert(KINDS / "new-tokens-lora", tmp_path / "a.gguf", tiny.base_gguf(tmp_path, "qwen2"))


@pytest.mark.campaign("adapters that do not fit")
def test_factors_for_new_tokens_need_their_embedding(tmp_path):
    adapter = read_adapter(KINDS / "new-tokens-lora")
    adapter.originals.clear()
    with GgufReader(tiny.base_gguf(tmp_path, "qwen2")) as reader:
        with pytest.raises(MismatchError, match="save_embedding_layers"):
            gguf_pairs(adapter, reader, updates=True, new_tokens=True)


@pytest.mark.campaign("adapters that do not fit")
def test_head_and_embedding_must_grow_alike(tmp_path):
    adapter = read_adapter(KINDS / "new-tokens-whole")
    adapter.updates = [update for update in adapter.updates if update.name != "lm_head"]
    with GgufReader(tiny.base_gguf(tmp_path, "qwen2")) as reader, pytest.raises(MismatchError, match="save both"):
        gguf_pairs(adapter, reader, updates=True, new_tokens=True)


def test_a_smaller_embedding_changes_the_first_rows_only(tmp_path):
    """Hugging Face pads embeddings; a resize to the tokens in use makes them smaller than the base's."""
    adapter = read_adapter(KINDS / "whole")
    for update in adapter.updates:
        if update.name in ("lm_head", "model.embed_tokens"):
            update.values, update.shape = update.values[:280], (280, 32)
    with GgufReader(tiny.base_gguf(tmp_path, "qwen2")) as reader:
        placement = gguf_pairs(adapter, reader, updates=True)
    update = next(update for update in placement.updates if update.name == "token_embd.weight")
    change = update.change(0, np.zeros((288, 32), np.float32))
    assert change[:280].any(axis=1).all() and not change[280:].any()


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return added_tokens(folder)


def test_added_tokens_of_every_file(tmp_path):
    assert write(tmp_path, added_tokens={"<|x|>": 5, "plain": 6}) == {5: Token("<|x|>", True), 6: Token("plain", False)}
    config = {"added_tokens_decoder": {"6": {"content": "plain", "special": True}, "7": {"content": "y"}}}
    assert write(tmp_path, tokenizer_config=config)[6] == Token("plain", True)
    tokenizer = {"added_tokens": [{"id": 7, "content": "z", "special": False}], "model": {}}
    assert write(tmp_path, tokenizer=tokenizer)[7] == Token("z", False)
    assert added_tokens(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"x": "5"}},
        {"added_tokens": {"x": -1}},
        {"added_tokens": {"x": 1 << 40}},
        {"tokenizer_config": {"added_tokens_decoder": {"a": {"content": "x"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"1": {"content": 5}}}},
        {"tokenizer": {"added_tokens": [{"id": True, "content": "x"}]}},
        {"tokenizer": {"added_tokens": {"id": 1}}},
    ],
)
def test_malformed_tokenizer_files(tmp_path, files):
    with pytest.raises(MalformedError):
        write(tmp_path, **files)


def base_with(tmp_path, tokens, types=None):
    from lora_gguf.files.gguf_writer import key_value

    entries = [key_value("general.architecture", "llama", "str"), key_value("llama.vocab_size", len(tokens), "u32")]
    entries.append(key_value("tokenizer.ggml.tokens", tokens, "str"))
    entries += [key_value("tokenizer.ggml.token_type", types, "i32")] if types else []
    with GgufWriter(tmp_path / "v.gguf", entries, [], force=True) as writer:
        writer.commit()
    return GgufReader(tmp_path / "v.gguf")


def test_fillers_are_renamed_and_tokens_in_use_are_not(tmp_path):
    with base_with(tmp_path, ["a", "b", "[PAD2]", "<|reserved_special_token_0|>"], [1, 1, 5, 3]) as base:
        found = extended(base, {1: Token("b", False), 2: Token("new", False), 3: Token("<|tool|>", True)}, 6)
        assert value(found["tokenizer.ggml.tokens"], "tokenizer.ggml.tokens") == [
            "a",
            "b",
            "new",
            "<|tool|>",
            "[PAD4]",
            "[PAD5]",
        ]
        assert value(found["tokenizer.ggml.token_type"], "tokenizer.ggml.token_type") == [1, 1, 4, 3, 5, 5]
        assert value(found["llama.vocab_size"], "llama.vocab_size") == 6 and "tokenizer.ggml.scores" not in found
        with pytest.raises(MismatchError, match="token 1.*'b'.*'other'"):
            extended(base, {1: Token("other", False)}, 4)


def test_learned_tokens_bring_their_merges(tmp_path):
    from lora_gguf.files.gguf_writer import key_value

    entries = [
        key_value("general.architecture", "llama", "str"),
        key_value("tokenizer.ggml.tokens", ["a", "b", "ab"], "str"),
    ]
    entries += [key_value("tokenizer.ggml.merges", ["a b"], "str")]
    with GgufWriter(tmp_path / "v.gguf", entries, []) as writer:
        writer.commit()
    model = {"vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3}, "merges": [["a", "b"], ["ab", "a"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    tokens, merges = learned_tokens(tmp_path, 3)
    assert tokens == {3: Token("aba", False, True)}
    with GgufReader(tmp_path / "v.gguf") as base:
        found = extended(base, tokens, 4, merges)
        assert value(found["tokenizer.ggml.merges"], "tokenizer.ggml.merges") == ["a b", "ab a"]
        assert value(found["tokenizer.ggml.token_type"], "tokenizer.ggml.token_type") == [1, 1, 1, 1]
        with pytest.raises(MismatchError, match="another tokenizer"):
            extended(base, tokens, 4, ["b a", "ab a"])
        assert extended(base, {}, 3) == {}


@pytest.mark.campaign("adapters that do not fit")
def test_another_tokenizer_is_refused(tmp_path):
    source = tmp_path / "adapter"
    shutil.copytree(KINDS / "new-tokens-whole", source)
    (source / "added_tokens.json").write_text(json.dumps({"something else": 17}))
    with pytest.raises(MismatchError, match="tokenizer is not that of the base"):
        place(tmp_path, source)
