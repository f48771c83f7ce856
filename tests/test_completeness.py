"""What an adapter's configuration promises and its file lacks; PEFT says the same when it loads one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.lora import read_adapter_gguf, write_adapter_gguf
from lora_gguf.files.base import Base
from lora_gguf.mapping import completeness
from lora_gguf.mapping.sources import placement_of
from tests import tiny
from tests.calls import merge
from tests.common import FIXTURES, gemma3_path, smollm2_path
from tests.test_cli import run
from tests.test_families import ADAPTERS, KINDS

PERL = FIXTURES / "perl-adapter"


def lessened(folder, source, lost=lambda name: False, **config):
    """A copy of an adapter without the tensors whose name ``lost`` finds, and with other fields."""
    folder.mkdir()
    fields = json.loads((source / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    weights = load_file(source / "adapter_model.safetensors")
    save_file({name: a for name, a in weights.items() if not lost(name)}, folder / "adapter_model.safetensors")
    return folder


def said(base, adapter):
    with Base(base) as model:
        return [line for line in placement_of(adapter, model).warnings if "is the file whole?" in line]


K_BY_PATTERN = r".*\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
PATHS = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(30) for part in "qk"]
LOST = {
    "a kind": (lambda n: "k_proj" in n, {}, "30 modules, such as model.layers.0.self_attn.k_proj"),
    "a kind, by a pattern": (
        lambda n: "k_proj" in n,
        {"target_modules": K_BY_PATTERN},
        "30 modules, such as model.layers.0.self_attn.k_proj",
    ),
    "a layer's kind": (lambda n: "layers.7.mlp.up_proj" in n, {}, "model.layers.7.mlp.up_proj"),
    "the last layer": (lambda n: "layers.29." in n, {}, "7 modules, such as model.layers.29.mlp.down_proj"),
    "a layer, by a pattern": (
        lambda n: "layers.3.self_attn.q_proj" in n,
        {"target_modules": K_BY_PATTERN},
        "model.layers.3.self_attn.q_proj",
    ),
    "one of many paths": (
        lambda n: not ("q_proj" in n or ("k_proj" in n and "layers.9." not in n)),
        {"target_modules": PATHS},
        "model.layers.9.self_attn.k_proj",
    ),
    "a layer of those chosen": (
        lambda n: not any(f"layers.{i}." in n for i in (2, 3)),
        {"layers_to_transform": [1, 2, 3]},
        "7 modules, such as model.layers.1.mlp.down_proj",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_modules_that_are_asked_for_and_not_there(tmp_path, name):
    lost, config, what = LOST[name]
    (line,) = said(smollm2_path(), lessened(tmp_path / "a", PERL, lost, **config))
    assert line.startswith(f"target_modules: the adapter has no weights for {what}:")


NOT_LOST = {
    "other models' names": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                            "down_proj", "query_key_value", "c_attn", "Wqkv", "in_proj"]},
    "some layers": {"layers_to_transform": list(range(10)), "lost": lambda n: int(n.split(".")[4]) >= 10},
    "one layer": {"layers_to_transform": 4, "lost": lambda n: ".4." not in n},
    "some layers, by a pattern": {"target_modules": r"model\.layers\.[0-9]\..*_proj",
                                  "lost": lambda n: int(n.split(".")[4]) >= 10},
    "excluded ones": {"exclude_modules": ["k_proj", "layers.3.mlp.up_proj"],
                      "lost": lambda n: "k_proj" in n or "layers.3.mlp.up_proj" in n},
    "paths of two layers": {"target_modules": PATHS[2:6],
                            "lost": lambda n: not any(f".{path}." in n for path in PATHS[2:6])},
    "no targets": {"target_modules": None, "lost": lambda n: int(n.split(".")[4]) < 14},
    "all linear": {"target_modules": "all-linear"},
    "a pattern that cannot be read": {"target_modules": "((("},
    "a head for classes": {"modules_to_save": []},
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_LOST)
def test_innocent_configurations(tmp_path, name):
    assert not said(smollm2_path(), lessened(tmp_path / "a", PERL, **NOT_LOST[name]))


@pytest.mark.parametrize("name", [*tiny.NAMES, *ADAPTERS])
def test_whole_adapters_of_every_architecture_and_kind(tmp_path, name):
    family = (KINDS / name / "base").read_text() if name in ADAPTERS else name
    adapter = KINDS / name if name in ADAPTERS else tiny.TINY / name / "adapter"
    if family != "falcon-h1":
        assert not said(tiny.base_gguf(tmp_path, family), adapter)


def test_whole_adapters_of_real_models():
    for adapter in (PERL, FIXTURES / "demo-adapter", FIXTURES / "scales-adapter"):
        assert not said(smollm2_path(), adapter)
    assert not said(gemma3_path(), FIXTURES / "gemma-perl-adapter")


FIELDS = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_with_nothing_in_the_file(tmp_path, capsys, name):
    adapter = lessened(tmp_path / "a", PERL, **FIELDS[name])
    (line,) = said(smollm2_path(), adapter)
    assert line.startswith(f"{name}: the adapter has no weights for ")
    code, _, err = run(capsys, "merge", smollm2_path(), adapter, "--dry-run")
    assert code == 0 and f"warning: {name}: " in err
    code, out, _ = run(capsys, "doctor", smollm2_path(), adapter)
    assert code == 0 and f"{name}: the adapter has no weights" in out


def test_biases_count_where_the_base_has_some(tmp_path):
    assert not said(smollm2_path(), lessened(tmp_path / "a", PERL, bias="all"))
    source = KINDS / "bias-all"
    base = tiny.base_gguf(tmp_path, (source / "base").read_text())
    (line,) = said(base, lessened(tmp_path / "b", source, lambda n: n.endswith("bias")))
    assert line.startswith("bias: the adapter has no weights for")


def test_names_that_peft_adds_together(tmp_path):
    adapter = lessened(tmp_path / "a", PERL, modules_to_save=["classifier", "score"])
    assert len(said(smollm2_path(), adapter)) == 2
    weights = load_file(adapter / "adapter_model.safetensors")
    head = {"base_model.model.score.weight": np.ones((2, 576), np.float32)}
    save_file(weights | head, adapter / "adapter_model.safetensors")
    with Base(smollm2_path()) as model:
        from lora_gguf.mapping.reading import Reading

        found = placement_of(adapter, model, Reading(allow_unused="score")).warnings
    assert not any("modules_to_save" in line for line in found)


def test_an_expert_that_is_lost(monkeypatch):
    monkeypatch.setattr(completeness, "has_module", lambda path, _: "experts" in path)
    dimensions = {"block_count": 1, "expert_count": 4}
    base = SimpleNamespace(get=dimensions.get)
    paths = {f"model.layers.0.mlp.experts.{i}.up_proj" for i in (0, 2)}
    assert list(completeness.beside(paths, None, base)) == ["model.layers.0.mlp.experts.1.up_proj"]
    asked = completeness.named_by(["up_proj"])
    found = completeness.beside(paths, asked, base)
    assert list(found) == [f"model.layers.0.mlp.experts.{i}.up_proj" for i in (1, 3)]


def test_a_converted_adapter_without_one_tensor(tmp_path):
    from lora_gguf.api import convert

    convert(PERL, tmp_path / "a.gguf", smollm2_path())
    pairs, architecture = read_adapter_gguf(tmp_path / "a.gguf")
    assert not said(smollm2_path(), tmp_path / "a.gguf")
    write_adapter_gguf(tmp_path / "b.gguf", [p for p in pairs if p.name != "blk.29.attn_v.weight"], architecture)
    (line,) = said(smollm2_path(), tmp_path / "b.gguf")
    assert "blk.29.attn_v.weight" in line
    assert any("blk.29" in w for w in merge(smollm2_path(), [(tmp_path / "b.gguf", 1.0)], None).plan.warnings)
