"""``patterns``: the same answers as PEFT's own expression in Python's engine, without its worst case."""

from __future__ import annotations

import random
import re
import time

import pytest

from lora_gguf.adapters import patterns
from lora_gguf.adapters.patterns import all_matches, first_match, matcher
from lora_gguf.errors import MalformedError, UnsupportedError

KEYS = (
    "q_proj", ".*q_proj", "self_attn.q_proj", r"layers\.[0-3]\..*", "(q|k)_proj", r".*\.gate_up_proj", "", "^model.*",
    r"layers\.\d+\.mlp\.\w+", r"[^.]+_proj", "a{2,3}_proj|q_proj", "(?:model.)?layers.1.*", "x*?q_proj", "(q_proj)?",
    "q_proj|k_proj$", r"\w+\.\D+", "model.layers.0.self_attn.q_proj", "(a|b)*c+", "[a-c]{2}", "q_pro[^k]",
)  # fmt: skip
MODULES = (
    "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.gate_up_proj", "q_proj", "aa_proj", "xq_proj", "lm_head",
    "model.layers.1.self_attn.k_proj", "a.b-q_proj", ".", "", "ababcc", "x.bb",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_matches_as_peft_does(key):
    for module in MODULES:
        assert matcher(key)(module) == bool(re.match(rf"(.*\.)?({key})$", module)), module


def test_matches_as_peft_does_on_random_keys():
    rng = random.Random(1)
    pieces = ["a", "b", ".", r"\.", "(a|b)", "[ab]", ".*", "a?", "b+", "(ab)*", "c{1,2}", r"\w", "$"]
    for _ in range(300):
        key = "".join(rng.choices(pieces, k=rng.randint(1, 5)))
        for _ in range(20):
            module = "".join(rng.choices("abc.", k=rng.randint(0, 7)))
            assert matcher(key)(module) == bool(re.match(rf"(.*\.)?({key})$", module)), (key, module)


@pytest.mark.parametrize(
    "key",
    ["(.*)*(.*)*x", "([a-z_.0-9]+)+!", "(a|a)*b", "((a*)*)*b", "(aa|a)" * 100 + "b", "a?" * 99 + "b", "a*" * 50 + "b"],
)
def test_is_immune_to_backtracking(key):
    start = time.process_time()
    assert not matcher(key)("a" * 200)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "key", ["(?=x)", r"(x)\1", "x{100000}", "(?i:x)", r"\bq", "(x{1000}){1000}", "a" * 20000, "a" * 20000 + "*"]
)
def test_refuses_what_it_cannot_match_in_linear_time(key):
    with pytest.raises(UnsupportedError):
        matcher(f"({key})*")


@pytest.mark.parametrize("key", ["(", "[a", "*", "a{2,1}", "(?P<x"])
def test_refuses_what_is_no_expression(key):
    with pytest.raises(MalformedError):
        matcher(key)


def test_the_first_key_wins():
    assert first_match({"k_proj": 1, ".*_proj": 2, "q_proj": 3}, "model.q_proj") == ".*_proj"
    assert first_match({"k_proj": 1}, "model.q_proj") is None


def test_many_keys_answer_as_the_first_of_them_that_matches():
    rng = random.Random(2)
    names = ["".join(rng.choices("ab._", k=rng.randint(0, 8))) for _ in range(400)]
    for n_keys in (1, 3, 30, 300):
        keys = dict.fromkeys(rng.choices([*names, ".*a", "b+$", "(a|b).", "a*b*"], k=n_keys))
        for module in names:
            expected = [key for key in keys if re.match(rf"(.*\.)?({key})$", module)]
            assert all_matches(keys, module) == expected, (module, n_keys)
            assert first_match(keys, module) == (expected[0] if expected else None), (module, n_keys)


def test_overlapping_keys_answer_as_pefts_own_function():
    other = pytest.importorskip("peft.utils.other")
    keys = {".*_proj": 1, "q_proj": 2, "self_attn.q_proj": 3, r"layers\.0\..*": 4, "k_proj": 5}
    for order in (list(keys), sorted(keys), sorted(keys, reverse=True)):
        pattern = {key: keys[key] for key in order}
        for module in MODULES:
            found = first_match(pattern, module)
            assert pattern.get(other.get_pattern_key(pattern.keys(), module)) == pattern.get(found), (order, module)


def test_tens_of_thousands_of_plain_names_cost_little():
    keys = {
        f"model.layers.{i}.mlp.experts.{j}.{p}_proj": 8 for i in range(60) for j in range(256) for p in ("up", "down")
    }
    start = time.process_time()
    assert all(first_match(keys, key) == key for key in list(keys)[::10])
    assert first_match(keys, "xmodel.layers.3.mlp.experts.0.up_proj") is None
    assert first_match(keys, "x.model_layers.3.mlp.experts.0.up_proj") == "model.layers.3.mlp.experts.0.up_proj"
    assert time.process_time() - start < 1


def test_all_matches_of_a_map_have_a_time_together(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS_OF_MAP", -1.0)
    with pytest.raises(UnsupportedError, match="too many to match"):
        patterns.all_matches(["q_proj", "(q|k)_proj"], "layers.0.k_proj")
    assert patterns.first_match(["q_proj", "(q|k)_proj"], "layers.0.q_proj") == "q_proj"  # nothing else is tried
