"""``heads``: adapters of embeddings and heads on bases that have one tensor for both, as PEFT merges them."""

from __future__ import annotations

import pytest

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.errors import MismatchError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.hparams import from_base
from lora_gguf.mapping.names import has_head
from lora_gguf.mapping.placement import gguf_pairs
from tests import tiny
from tests.common import FIXTURES

KINDS = FIXTURES / "kinds"


def tied_base(folder, name):
    from lora_gguf.mapping.hparams import from_config

    tensors = tiny.tensors_of(name, from_config(tiny.config_of(name)))
    tensors.pop("output.weight", None)
    return tiny.write_gguf(folder / f"{name}-tied.gguf", name, tensors)


def place(folder, kind, base, **options):
    with GgufReader(tied_base(folder, base)) as reader:
        return gguf_pairs(read_adapter(KINDS / kind), reader, updates=True, new_tokens=True, **options)


def test_rows_saved_for_both_and_equal_stay_tied(tmp_path):
    for kind in ("tokens-tied", "new-tokens-only", "new-tokens-tied"):
        placement = place(tmp_path, kind, "gemma2", tied="refuse")
        assert not placement.untied and "output.weight" not in {update.name for update in placement.updates}


def test_rows_that_differ_untie(tmp_path):
    placement = place(tmp_path, "whole", "qwen2", tied="separate")
    assert placement.untied
    with pytest.raises(MismatchError, match="tied"):
        place(tmp_path, "whole", "qwen2", tied="refuse")


@pytest.mark.campaign("adapters that do not fit")
def test_an_architecture_that_can_have_no_head_of_its_own(tmp_path):
    adapter = read_adapter(KINDS / "embedding")
    adapter.updates = [update for update in adapter.updates if "layers" not in update.name]
    with GgufReader(tied_base(tmp_path, "gemma2")) as reader:
        with pytest.raises(MismatchError, match="gemma2 has no head of its own"):
            gguf_pairs(adapter, reader, tied="separate")
        placement = gguf_pairs(adapter, reader, tied="shared")
    assert [pair.name for pair in placement.pairs] == ["token_embd.weight"] and placement.pairs[0].rank == 8


def test_which_architectures_may_have_a_head():
    assert has_head("llama") and has_head("gemma3") and not has_head("gemma2") and not has_head("command-r")


def test_which_bases_are_tied(tmp_path):
    with GgufReader(tied_base(tmp_path, "qwen2")) as tied, GgufReader(tiny.base_gguf(tmp_path, "qwen2")) as untied:
        assert from_base(tied).tied and not from_base(untied).tied
