"""Hostile and damaged adapter directories: every one ends in one line, soon, in little memory, with the input
untouched.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.errors import FileError, LoraGgufError, MalformedError, NumericError, UnsupportedError
from tests.test_weights import REFUSED, STRICTER, UNSUPPORTED

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
MODULES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(30) for p in "qkvo"]
PREFIX = "base_model.model."


def tensors(modules=MODULES[:1]) -> dict[str, np.ndarray]:
    shapes = {"A": (4, 6), "B": (10, 4)}
    return {
        f"{PREFIX}{module}.lora_{x}.weight": np.ones(shape, np.float32)
        for module in modules
        for x, shape in shapes.items()
    }


def config(**fields) -> bytes:
    return json.dumps({**CONFIG, **fields}).encode()


def literal(field: str, text: str) -> bytes:
    """A configuration with a field whose value is ``text`` as it stands."""
    return json.dumps({**CONFIG, field: "?"}).replace('"?"', text).encode()


BOMB = "(.*)*(.*)*(.*)*x"
# what is no configuration
NO_JSON = {
    "empty": b"",
    "blank": b"   \n",
    "100 MB": b'{"r": 4, "x": "' + b"x" * 100_000_000 + b'"}',
    "array": b"[]",
    "number": b"4",
    "null": b"null",
    "text": b'"LORA"',
    "nested arrays, 100,000 deep": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects, 100,000 deep": b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    "unfinished": b'{"r": 4',
    "text after it": config() + b"}",
    "comments": b'{"r": 4 // rank\n}',
    "single quotes": b"{'r': 4}",
    "invalid UTF-8": b'{"x": "\xff"}',
    "UTF-16": config().decode().encode("utf-16"),
    "NUL bytes": b"\0" * 1000,
    "a key twice": config()[:-1] + b', "r": 8}',
    "a key twice deep inside": literal("rank_pattern", '{"q": 4, "q": 8}'),
    "NaN": literal("x", "NaN"),
    "Infinity": literal("lora_alpha", "Infinity"),
    "-Infinity": literal("lora_alpha", "-Infinity"),
    "a number of 5000 digits": literal("x", "9" * 5000),
    "HTML": b"<!DOCTYPE html><html></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "YAML": b"peft_type: LORA\nr: 4\n",
}
# a field of a wrong type or value
WRONG_FIELDS = {
    **{f"r: {value!r}": config(r=value) for value in (0, -1, 10**9, 1 << 64, "8", 8.5, 8.0, True, [8], {"a": 8})},
    "r absent": json.dumps({k: v for k, v in CONFIG.items() if k != "r"}).encode(),
    "r null": config(r=None),
    **{f"lora_alpha: {value!r}": config(lora_alpha=value) for value in ("16", True, [16], {}, 1e300, 10**400)},
    "lora_alpha 1e400": literal("lora_alpha", "1e400"),
    "lora_alpha -1e400": literal("lora_alpha", "-1e400"),
    "lora_alpha absent": json.dumps({k: v for k, v in CONFIG.items() if k != "lora_alpha"}).encode(),
    **{f"use_rslora: {value!r}": config(use_rslora=value) for value in (1, "true", [])},
    **{f"use_dora: {value!r}": config(use_dora=value) for value in (1, "false")},
    **{
        f"rank_pattern: {value!r}": config(rank_pattern=value)
        for value in ([], "q", {"q_proj": 0}, {"q_proj": "8"}, {"q_proj": 1.5})
    },
    **{
        f"alpha_pattern: {value!r}": config(alpha_pattern=value)
        for value in ([], {"q_proj": "8"}, {"q_proj": None}, {"q_proj": [1]})
    },
    "alpha_pattern 1e400": literal("alpha_pattern", '{"q_proj": 1e400}'),
    "rank_pattern of another rank": config(rank_pattern={"q_proj": 8}),
    "rank_pattern that is no regex": config(rank_pattern={"(": 4}),
    "alpha_pattern that is no regex": config(alpha_pattern={"[z-a]": 4}),
    "peft_type 5": config(peft_type=5),
    "fan_in_fan_out 1": config(fan_in_fan_out=1),
    "target_parameters of 50,000": config(target_parameters=[f"mlp{i}.gate" for i in range(50_000)]),
    "target_parameters {}": config(target_parameters={}),
    "modules_to_save [5]": config(modules_to_save=[5]),
    "bias 5": config(bias=5),
    "base_model_name_or_path 5": config(base_model_name_or_path=5),
}
# what we name and refuse
UNSUPPORTED_FIELDS = {
    "peft_type NOT_LORA": config(peft_type="NOT_LORA"),
    "peft_type PROMPT_TUNING": config(peft_type="PROMPT_TUNING"),
    "peft_type with an escape sequence": config(peft_type="\x1b[2J"),
    "peft_type of 1 MB": config(peft_type="x" * 1_000_000),
    "peft_type empty": config(peft_type=""),
    "rank_pattern with a back reference": config(rank_pattern={r"(.)\1": 4}),
    "rank_pattern of 100,000 characters": config(rank_pattern={"x*" * 50_000: 4}),
    "rank_pattern that repeats a million times": config(rank_pattern={"(x{1000}){1000}": 4}),
    "rank_pattern of 20,000 keys with operators": config(rank_pattern={f"layer{i}.*mlp": 8 for i in range(20_000)}),
    "rank_pattern of 5000 bombs": config(rank_pattern={f"{BOMB}{i}": 8 for i in range(5000)}),
    "rank_pattern of 1500 shapes": config(
        rank_pattern={"".join(".x"[i >> b & 1] for b in range(31)): 8 for i in range(1500)}
    ),
    "layer_replication": config(layer_replication=[[0, 4]]),
    "init_lora_weights pissa": config(init_lora_weights="pissa"),
}
# what must be read, however odd
READ = {
    "plain": config(),
    "byte order mark": b"\xef\xbb\xbf" + config(),
    "blank lines": b"\n\n" + json.dumps(CONFIG, indent=8).encode() + b"\n",
    "unknown fields": config(something_new={"a": [1, 2, {"b": None}]}, runtime_config=None),
    "null fields": config(
        rank_pattern=None, alpha_pattern=None, use_rslora=None, peft_type=None, base_model_name_or_path=None
    ),
    "regex bombs that match nothing": config(
        rank_pattern={BOMB: 8}, alpha_pattern={f"([a-z_.0-9]+)+{c}": 1 for c in "!@"}
    ),
    "1000 patterns with operators": config(alpha_pattern={f"layers\\.{i}\\..*mlp": 8 for i in range(1000)}),
    "100 patterns of two repeats": config(rank_pattern={f".*layers{i}.*mlp": 8 for i in range(100)}),
    "100 bombs": config(rank_pattern={f"{BOMB}{i}": 8 for i in range(100)}),
    "30,000 patterns": config(rank_pattern={f"layer{i}.mlp": 8 for i in range(30_000)}),
    "patterns that match nothing": config(rank_pattern={"nothing": 1}, alpha_pattern={"else": 1}),
    "4000 target parameters": config(target_parameters=[f"mlp{i}.gate" for i in range(4000)]),
    "50,000 target modules": config(target_modules=[f"m{i}" for i in range(50_000)]),
    "target_modules a bomb": config(target_modules=BOMB),
    "base /etc/passwd": config(base_model_name_or_path="/etc/passwd"),
    "base ../../x": config(base_model_name_or_path="../../x"),
    "base file://": config(base_model_name_or_path="file:///etc/passwd"),
    "base a URL": config(base_model_name_or_path="http://127.0.0.1:9/x"),
    "base with escape sequences": config(base_model_name_or_path="\x1b[2J\x1b]0;x\x07\n\r"),
    "base of 1 MB": config(base_model_name_or_path="x" * 1_000_000),
    "auto_mapping that names code": config(auto_mapping={"base_model_class": "os.system", "parent_library": "os"}),
}


def directory(path, raw_config: bytes, weights: bytes | dict | None = None):
    (path / "adapter_config.json").write_bytes(raw_config)
    content = tensors(MODULES) if weights is None else weights
    (path / "adapter_model.safetensors").write_bytes(
        content if isinstance(content, bytes) else safetensors.numpy.save(content)
    )
    return path


def refusal(folder, error) -> LoraGgufError:
    """The error of ``read_adapter``, its form, time, memory and the folder's content checked."""
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    started = time.process_time()
    with pytest.raises(error) as caught:
        read_adapter(folder)
    assert time.process_time() - started < 2
    for line in (str(caught.value), *caught.value.details):
        assert line.isprintable() and 10 < len(line) < 600
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    return caught.value


def peak_of(folder) -> int:
    tracemalloc.start()
    with contextlib.suppress(LoraGgufError):
        read_adapter(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.campaign("safetensors and configurations")
@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_configuration(tmp_path, name):
    folder = directory(tmp_path, NO_JSON[name], tensors())
    assert str(refusal(folder, MalformedError)).startswith("adapter_config.json: ")
    assert peak_of(folder) < 300e6


@pytest.mark.campaign("safetensors and configurations")
@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_field_of_a_wrong_type_or_value_is_named(tmp_path, name):
    error = refusal(directory(tmp_path, WRONG_FIELDS[name], tensors()), MalformedError)
    field = name.split()[0].rstrip(":")
    assert field in str(error) or "rank" in str(error) or "pattern" in str(error)


@pytest.mark.campaign("safetensors and configurations")
@pytest.mark.parametrize("name", UNSUPPORTED_FIELDS)
def test_what_is_not_supported_is_named(tmp_path, name):
    error = refusal(directory(tmp_path, UNSUPPORTED_FIELDS[name], tensors()), UnsupportedError)
    assert name.split()[0].removesuffix("_pattern") in str(error) or "pattern" in str(error)


@pytest.mark.campaign("safetensors and configurations")
@pytest.mark.parametrize("name", READ)
def test_odd_configurations_are_read_soon(tmp_path, name):
    folder = directory(tmp_path, READ[name])
    started = time.process_time()
    adapter = read_adapter(folder)
    assert time.process_time() - started < 2
    assert len(adapter.updates) == len(MODULES) and {pair.scale for pair in adapter.updates} == {2.0}
    assert adapter.base_model.isprintable() and len(adapter.base_model) <= 100


@pytest.mark.campaign("safetensors and configurations")
@pytest.mark.parametrize("name", [*REFUSED, *STRICTER, *UNSUPPORTED])
def test_weights_that_are_malformed(tmp_path, name):
    folder = directory(tmp_path, config(), {**REFUSED, **STRICTER, **UNSUPPORTED}[name])
    error = refusal(folder, UnsupportedError if name in UNSUPPORTED else MalformedError)
    assert str(error).startswith("adapter_model.safetensors: ")


A, B = f"{PREFIX}{MODULES[0]}.lora_A.weight", f"{PREFIX}{MODULES[0]}.lora_B.weight"
F32 = np.float32
WEIGHTS = {
    "no tensors": ({}, MalformedError),
    "only A": ({A: np.ones((4, 6), F32)}, MalformedError),
    "only B": ({B: np.ones((10, 4), F32)}, MalformedError),
    "ranks that differ": ({A: np.ones((4, 6), F32), B: np.ones((10, 3), F32)}, MalformedError),
    "another rank than the configuration's": ({A: np.ones((8, 6), F32), B: np.ones((10, 8), F32)}, MalformedError),
    "A of rank 0": ({A: np.ones((0, 6), F32), B: np.ones((10, 0), F32)}, MalformedError),
    "no columns": ({A: np.ones((4, 0), F32), B: np.ones((10, 4), F32)}, MalformedError),
    "a scalar": ({A: np.ones((), F32), B: np.ones((10, 4), F32)}, MalformedError),
    "5 dimensions": ({A: np.ones((4, 6, 1, 1, 1), F32), B: np.ones((10, 4), F32)}, MalformedError),
    "integers": ({A: np.ones((4, 6), np.int8), B: np.ones((10, 4), np.int8)}, MalformedError),
    "booleans": ({A: np.ones((4, 6), bool), B: np.ones((10, 4), bool)}, MalformedError),
    "a NaN": ({A: np.full((4, 6), np.nan, F32), B: np.ones((10, 4), F32)}, NumericError),
    "an infinity": ({A: np.ones((4, 6), F32), B: np.full((10, 4), -np.inf, F32)}, NumericError),
    "an f64 beyond f32": ({A: np.full((4, 6), 1e300), B: np.ones((10, 4))}, NumericError),
    "the same module under two names": ({**tensors(), f"{MODULES[0]}.lora_A.weight": np.ones((4, 6), F32)}, MalformedError),
    "two adapters in one": ({**tensors(), f"{PREFIX}{MODULES[0]}.lora_A.second.weight": np.ones((4, 6), F32)}, MalformedError),
    "a tensor of another kind": ({**tensors(), f"{PREFIX}{MODULES[0]}.hada_w1_a": np.ones((4, 6), F32)}, MalformedError),
    "names that are paths": ({"../../x.lora_A.weight": np.ones((4, 6), F32)}, MalformedError),
    "a thousand strange tensors": ({f"strange{i}": np.ones(1, F32) for i in range(1000)}, MalformedError),
}  # fmt: skip


@pytest.mark.campaign("adapters that do not fit")
@pytest.mark.parametrize("name", WEIGHTS)
def test_tensors_that_make_no_adapter(tmp_path, name):
    weights, error = WEIGHTS[name]
    refusal(directory(tmp_path, config(), weights), error)


def test_directories_without_an_adapter(tmp_path):
    directory(tmp_path, config())
    (tmp_path / "adapter_config.json").unlink()
    refusal(tmp_path, FileError)
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(FileError):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(FileError):
        read_adapter(tmp_path)
