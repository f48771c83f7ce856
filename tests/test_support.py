"""``support``: the tables of what is supported, held against adapters that PEFT made."""

from __future__ import annotations

import re

import pytest

from lora_gguf.api import convert
from lora_gguf.errors import UnsupportedError
from lora_gguf.mapping.architectures import ARCHITECTURES
from lora_gguf.mapping.support import KINDS, architectures_table, cells, kinds_table, towers_table
from lora_gguf.mapping.towers import TOWERS
from tests import tiny
from tests.common import FIXTURES

# what a fixture is an example of: a word of the table's line
EXAMPLES = {
    "rslora-patterns": "rsLoRA",
    "embedding": "embeddings and heads",
    "adalora": "AdaLoRA",
    "vera": "VeRA",
    "velora": "VeLoRA",
    "monteclora": "MonteCLoRA",
    "bdlora": "BD-LoRA",
    "qalora": "QA-LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "dora": "DoRA",
    "dora-embedding": "DoRA on embeddings",
    "oft": "OFT",
    "boft": "BOFT",
    "tokens": "trainable_token_indices",
    "only-tokens": "trainable_token_indices",
    "norms": "LN tuning",
    "whole-gemma": "norms",
    "lora-bias": "lora_bias",
    "bias-all": 'bias="all"',
    "bias-lora-only": 'bias="lora_only"',
}


def outcome(source, base, out, rank):
    try:
        return convert(source, out, base, rank=rank, force=True)
    except UnsupportedError:
        return None


@pytest.mark.parametrize("name", EXAMPLES)
def test_convert_does_what_the_table_says(tmp_path, name):
    says = next(convert for kind, (convert, _) in KINDS.items() if EXAMPLES[name] in kind)
    source = FIXTURES / "kinds" / name
    base = tiny.base_gguf(tmp_path, (source / "base").read_text())
    plain, ranked = (outcome(source, base, tmp_path / "a.gguf", rank) for rank in (None, 4))
    assert bool(plain) == says.startswith("exact")
    assert bool(ranked) == (says != "refused")
    assert bool(ranked and ranked.approximations) == says.startswith("`--rank")


def test_the_tables_hold_every_row():
    assert len(re.findall("^\\|", kinds_table(), re.MULTILINE)) == len(KINDS) + 2
    table = architectures_table()
    assert all(f"| {name} |" in table for name in ARCHITECTURES if name != "clip")
    assert cells("llama", ARCHITECTURES["llama"]) == ("exact", "exact", "exact", "exact", "")
    assert (
        cells("gemma2", ARCHITECTURES["gemma2"])[3] == "`--tied shared`"
        and cells("bert", ARCHITECTURES["bert"])[3] == "none"
    )
    assert (
        "`kv_b_proj`" in cells("deepseek2", ARCHITECTURES["deepseek2"])[1]
        and cells("plamo2", ARCHITECTURES["plamo2"])[2] == "refused"
    )
    assert "--base-config" in cells("falcon-h1", ARCHITECTURES["falcon-h1"])[4]


def test_every_projector_is_in_the_table_and_every_row_names_a_class_before_it_says_as_above():
    rows = [line.split("|")[1:3] for line in towers_table().splitlines()[4:]]
    assert [name.strip() for name, _ in rows] == list(TOWERS) and "as above" not in rows[0][1]
