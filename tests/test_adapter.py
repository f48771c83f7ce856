"""``adapter`` and ``adapter_config``: PEFT directories, good and broken."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.errors import FileError, MalformedError, NumericError, UnsupportedError
from tests import tiny
from tests.test_cli import run

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "use_dora": None}
MODULE = "model.layers.0.self_attn.q_proj"


def tensors(module=MODULE, r=4, n_in=6, n_out=10, middle=""):
    rng = np.random.default_rng(len(module))
    return {
        f"base_model.model.{module}.lora_A{middle}.weight": rng.standard_normal((r, n_in), np.float32),
        f"base_model.model.{module}.lora_B{middle}.weight": rng.standard_normal((n_out, r), np.float32),
    }


def directory(path, weights=None, **config):
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors() if weights is None else weights, path / "adapter_model.safetensors")
    return path


def test_reads_pairs_by_module_path(tmp_path):
    adapter = read_adapter(directory(tmp_path))
    (pair,) = adapter.updates
    assert (pair.name, pair.shape, pair.rank, pair.scale) == (MODULE, (10, 6), 4, 2.0)
    assert pair.sources == tuple(tensors())
    np.testing.assert_array_equal(pair.b, list(tensors().values())[1])


def test_reads_the_folder_of_a_file_and_a_named_adapter(tmp_path):
    directory(tmp_path, tensors(middle=".default"))
    assert read_adapter(tmp_path / "adapter_model.safetensors").updates[0].name == MODULE


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3.5}, 3.5 / 4),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"k_proj": 1, "q_proj": 32, "self_attn.q_proj": 2}}, 8.0),
        ({"alpha_pattern": {r".*layers\.1\..*": 1}}, 2.0),
        ({"r": 64, "rank_pattern": {"layers.0.self_attn.q_proj": 4}}, 2.0),
        ({"r": 64, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 6}, "use_rslora": True}, 3.0),
    ],
)
def test_scale_of_a_module(tmp_path, config, scale):
    assert read_adapter(directory(tmp_path, **config)).updates[0].scale == scale


def test_embeddings_become_vocabulary_by_width(tmp_path):
    a, b = np.ones((4, 100), np.float32), np.arange(24, dtype=np.float32).reshape(6, 4)
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    (pair,) = read_adapter(directory(tmp_path, {f"{prefix}A": a, f"{prefix}B": b})).updates
    np.testing.assert_array_equal(pair.delta(), 2 * (b @ a).T)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", -1), ("r", "8"), ("r", 8.5), ("r", True), ("r", 10**9), ("r", None),
        ("lora_alpha", "16"), ("lora_alpha", True), ("lora_alpha", None), ("lora_alpha", []),
        ("use_rslora", 1), ("rank_pattern", []), ("rank_pattern", {"q": "4"}), ("alpha_pattern", {"q": None}),
        ("peft_type", 3), ("base_model_name_or_path", ["x"]), ("target_modules", 3), ("bias", False),
        ("rank_pattern", {"(": 4}), ("r", 8),
    ],
)  # fmt: skip
def test_refuses_fields_of_a_wrong_type(tmp_path, field, value):
    with pytest.raises(MalformedError) as error:
        read_adapter(directory(tmp_path, **{field: value}))
    assert "\n" not in str(error.value) and "adapter" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"r": 4, "r": 5}',
        '{"r": NaN}',
        '{"lora_alpha": Infinity}',
        "[" * 100_000,
        '{"lora_alpha": 1e400}',
    ],
)
def test_refuses_what_is_no_configuration(tmp_path, text):
    directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(MalformedError):
        read_adapter(tmp_path)


def test_reads_a_configuration_with_a_byte_order_mark(tmp_path):
    directory(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_adapter(tmp_path).updates


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "PROMPT_TUNING"),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 4]]),
        ("init_lora_weights", "pissa_niter_4"),
        ("invocation_string", "<|x|>"),
    ],
)
def test_refuses_kinds_by_name_with_a_way_out(tmp_path, field, value):
    with pytest.raises(UnsupportedError, match=field):
        read_adapter(directory(tmp_path, **{field: value}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", [0, 1])
def test_refuses_numbers_that_are_none_and_names_their_place(tmp_path, value, factor):
    weights = tensors()
    name = list(weights)[factor]
    weights[name][1, 2] = value
    with pytest.raises(NumericError) as error:
        read_adapter(directory(tmp_path, weights))
    assert f"{name}[1, 2]" in str(error.value)


def test_reports_all_offenders_at_once(tmp_path):
    weights = (
        tensors() | tensors("model.layers.1.self_attn.q_proj") | {"base_model.model.what.ever": np.ones(3, np.float32)}
    )
    del weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    weights |= dict(tensors("model.layers.2.self_attn.q_proj", r=8).items())
    with pytest.raises(MalformedError) as error:
        read_adapter(directory(tmp_path, weights))
    assert len(error.value.details) == 3


@pytest.mark.parametrize(
    "shapes", [((4, 6), (10, 5)), ((4, 6, 1), (10, 4)), ((4,), (10, 4)), ((0, 6), (10, 0)), ((4, 0), (10, 4))]
)
def test_refuses_factors_that_do_not_multiply(tmp_path, shapes):
    weights = {name: np.ones(shape, np.float32) for name, shape in zip(tensors(), shapes, strict=True)}
    with pytest.raises(MalformedError):
        read_adapter(directory(tmp_path, weights))


def test_refuses_integers_as_weights(tmp_path):
    with pytest.raises(MalformedError, match="int32"):
        read_adapter(directory(tmp_path, {name: array.astype(np.int32) for name, array in tensors().items()}))


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(FileError, match="no such directory"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(FileError, match="adapter_config.json"):
        read_adapter(tmp_path)
    (tmp_path / "inner").mkdir()
    directory(tmp_path / "inner")
    with pytest.raises(FileError, match="inner"):
        read_adapter(tmp_path)
    (tmp_path / "inner" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match="adapter_model.safetensors"):
        read_adapter(tmp_path / "inner")


def test_copies_of_the_base_are_ignored_with_a_reason(tmp_path):
    name = f"base_model.model.{MODULE}.base_layer.weight"
    adapter = read_adapter(directory(tmp_path, tensors() | {name: np.ones((10, 6), np.float32)}))
    assert len(adapter.updates) == 1 and name in adapter.ignored


EMPTY = {
    "a whole tensor": {"base_model.model.lm_head.modules_to_save.weight": (0,)},
    "a whole matrix": {"base_model.model.model.embed_tokens.weight": (0, 6)},
    "both factors": {f"base_model.model.{MODULE}.lora_{half}.weight": (0,) for half in "AB"},
    "one factor": {f"base_model.model.{MODULE}.lora_B.weight": (10, 0)},
    "a magnitude": {f"base_model.model.{MODULE}.lora_magnitude_vector": (0,)},
    "a token's row": {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (0, 6)},
}


@pytest.mark.parametrize("command", ["merge", "doctor", "convert", "inspect"])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors_are_named_with_their_cause(tmp_path, capsys, name, command):
    weights = tensors() | {key: np.zeros(shape, np.float32) for key, shape in EMPTY[name].items()}
    (tmp_path / "adapter").mkdir()
    folder = directory(tmp_path / "adapter", weights)
    base = tiny.base_gguf(tmp_path, "llama")
    arguments = {"convert": [folder, "--base", base], "inspect": [folder]}.get(command, [base, folder])
    output = [] if command in ("doctor", "inspect") else ["-o", tmp_path / "out.gguf"]
    code, out, err = run(capsys, command, *arguments, *output)
    assert code == (0 if command == "inspect" else MalformedError.exit_code), err
    said = out if command == "inspect" else err
    assert "ZeRO-3" in said and all(key.split(".lora_")[0] in said for key in EMPTY[name])
    assert not (tmp_path / "out.gguf").exists()


def test_an_empty_tensor_may_be_left_out(tmp_path):
    weights = tensors() | {"base_model.model.lm_head.weight": np.zeros(0, np.float32)}
    adapter = read_adapter(directory(tmp_path, weights), allow_unused="lm_head")
    assert [update.name for update in adapter.updates] == [MODULE] and "empty" in "".join(adapter.ignored.values())


def test_two_adapters_in_one_file_are_refused(tmp_path):
    other = MODULE.replace("q_proj", "v_proj")
    weights = tensors(middle=".default") | tensors(other, middle=".second")
    with pytest.raises(MalformedError, match="2 adapters in this file .default, second."):
        read_adapter(directory(tmp_path, weights))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_inits_that_leave_the_base_alone(tmp_path, init):
    assert not read_adapter(directory(tmp_path, init_lora_weights=init)).warnings


@pytest.mark.parametrize("init", ["svd_of_tomorrow", "gaussian2", ""])
def test_an_unknown_init_is_doubted(tmp_path, init):
    (warning,) = read_adapter(directory(tmp_path, init_lora_weights=init)).warnings
    assert warning.startswith(f"init_lora_weights={init} is not known")


@pytest.mark.parametrize(
    "fields",
    [
        {"use_qalora": True, "qalora_group_size": 1 << 16},
        {"use_bdlora": {"target_modules_bd_b": ["proj"], "nblocks": 3}},
        {"use_bdlora": {"target_modules_bd_b": ["proj"], "nblocks": 1 << 40}},
        {"use_bdlora": {"target_modules_bd_b": ["proj"], "nblocks": "2"}},
        {"use_bdlora": {"target_modules_bd_b": [7, "proj"], "nblocks": 2}},
    ],
)
def test_packed_factors_that_cannot_be_unpacked(tmp_path, fields):
    weights = {key: np.ones((1 << 10, 8) if "lora_B" in key else (8, 1 << 10), np.float32) for key in tensors()}
    with pytest.raises(MalformedError, match=r"smaller qalora_group_size|blocks \(use_bdlora\)|do not multiply"):
        read_adapter(directory(tmp_path, weights, r=8, **fields))


@pytest.mark.parametrize(
    ("pattern", "both"),
    [
        ({"k_proj": 1, "q_proj": 32, "self_attn.q_proj": 2}, ("'q_proj'", "'self_attn.q_proj'")),
        ({".*_proj": 1, "q_proj": 1, r"layers\.0\..*": 4}, ("'.*_proj'", r"'layers\.0\..*'")),
        ({"self_attn.q_proj": 2, "q_proj": 2}, None),
        ({"k_proj": 1, "q_proj": 32}, None),
    ],
)
def test_overlapping_entries_of_alpha_pattern_are_asked_about(tmp_path, pattern, both):
    found = read_adapter(directory(tmp_path, alpha_pattern=pattern)).warnings
    assert len(found) == bool(both) and all(key in found[0] for key in both or ())


@pytest.mark.parametrize("option", [{"use_foo": True}, {"foo_config": {"beta": 2}}, {"enable_lora": [True, False]}])
def test_an_option_of_a_newer_peft_is_asked_about(tmp_path, option):
    (warning,) = read_adapter(directory(tmp_path, **option)).warnings
    assert f"{next(iter(option))} is not known here" in warning


@pytest.mark.parametrize(
    "options", [{"use_foo": False, "foo_config": {}}, {"eva_config": {"rho": 2.0}, "runtime_config": {"offload": True}}]
)
def test_options_that_are_off_or_of_the_training_are_none_to_ask_about(tmp_path, options):
    assert not read_adapter(directory(tmp_path, **options)).warnings


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"r": "8"}', 'r: expected a whole number up to 65536, found "8": correct the file'),
        ('{"lora_alpha": true}', "lora_alpha: expected a finite number, found true: correct the file"),
        ('{"target_modules": {"a": null}}', 'target_modules: .*, found {"a": null}: correct the file'),
        ("[1, 2]", r"expected a JSON object, found \[1, 2\]: download it again"),
        ("<!DOCTYPE html><html>", "a web page instead of the file: download it again"),
    ],
)
def test_what_is_found_is_shown_as_the_file_has_it(tmp_path, text, says):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(MalformedError, match=says):
        read_adapter(tmp_path)
