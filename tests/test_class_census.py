"""Every class that llama.cpp's converter registers is merged, or refused by name."""

from __future__ import annotations

import json

import pytest

from lora_gguf.errors import UnsupportedError
from lora_gguf.mapping.architectures import ARCHITECTURES, REFUSED
from lora_gguf.mapping.hparams import architecture_of
from lora_gguf.mapping.tower_names import projectors
from lora_gguf.mapping.towers import REFUSED as REFUSED_TOWERS
from lora_gguf.mapping.towers import TOWERS
from tests.class_census import CLASSES, judged, judged_towers, registered

CENSUS = json.loads(CLASSES.read_text())
TREE = {
    "conversion/a.py": """
@ModelBase.register("OneForCausalLM", "TwoForCausalLM")
@ModelBase.example("a/b")
class One(TextModel):
    model_arch = gguf.MODEL_ARCH.ONE
@ModelBase.register("ThreeForCausalLM")
class Three(One):
    pass
@ModelBase.register("OneForConditionalGeneration")
class Tower(MmprojModel):
    pass
""",
    "gguf-py/gguf/constants.py": 'NAMES = {MODEL_ARCH.ONE: "one-x"}',
}


def test_no_text_class_is_unknown():
    assert len(CENSUS["text"]) == 267 and len(CENSUS["towers"]) == 67
    assert "unknown" not in judged(CENSUS["text"])


def test_no_class_with_a_tower_is_unknown():
    outcomes = judged_towers(CENSUS["towers"])
    assert "unknown" not in outcomes and len(outcomes["merged"]) >= 55
    assert judged_towers(["NextForConditionalGeneration"]) == {"unknown": ["NextForConditionalGeneration"]}


@pytest.mark.parametrize("name", REFUSED_TOWERS)
def test_projectors_refused_by_name_say_what_to_do(tmp_path, name):
    assert name not in TOWERS
    with pytest.raises(UnsupportedError, match=rf"m.gguf: projector {name}: .*: (merge with PEFT|name the GGUF)"):
        projectors({"projector_type": name}, "m.gguf")


@pytest.mark.parametrize("name", sorted(CENSUS["text"]))
def test_each_has_an_architecture_or_a_reason(name):
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=name):
            architecture_of({"architectures": [name]})
    else:
        assert architecture_of({"architectures": [name]}) in ARCHITECTURES


def test_a_tree_is_read(tmp_path):
    for path, text in TREE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = registered(tmp_path)
    assert found["text"] == {"OneForCausalLM": "one-x", "ThreeForCausalLM": "one-x", "TwoForCausalLM": "one-x"}
    assert list(found["towers"]) == ["OneForConditionalGeneration"]


def test_what_is_not_known_is_counted():
    outcomes = judged({"LlamaForCausalLM": "llama", "NextForCausalLM": "next", "WavTokenizerDec": "wavtokenizer-dec"})
    assert outcomes["merged"] == ["LlamaForCausalLM"] and outcomes["unknown"] == ["NextForCausalLM"]
    assert len(outcomes) == 3
