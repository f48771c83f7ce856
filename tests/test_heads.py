"""``heads``: adapters of embeddings and heads on bases that have one tensor for both, as PEFT merges them."""

from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.adapters.lora import decode, read_adapter_gguf
from lora_gguf.api import convert
from lora_gguf.errors import MismatchError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.hparams import from_base
from lora_gguf.mapping.names import has_head
from tests import tiny
from tests.calls import gguf_pairs, merge
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


@pytest.mark.parametrize("kind", ["tied-embedding", "tied-head"])
@pytest.mark.parametrize("tied", ["separate", "shared", "refuse"])
def test_an_update_saved_for_both_is_merged_once(tmp_path, kind, tied):
    """PEFT's own merge adds it twice; the fixture holds the weights that its run time is equal to."""
    base, out = tied_base(tmp_path, "gemma2"), tmp_path / "out.gguf"
    report = merge(base, [(KINDS / kind, 1.0)], out, tied=tied)
    assert not any("no longer the embedding" in line for line in report.plan.warnings)
    assert_merged(out, base, kind, "gemma2")
    targets = {account.tensor: account.target for account in report.accounts if account.outcome == "applied"}
    assert {targets[name] for name in targets if "layers" not in name} == {"token_embd.weight"}
    assert len([name for name in targets if "layers" not in name]) == 4


def assert_merged(out, base, kind, name):
    wanted = tiny.tensors_from(KINDS / kind / "merged.safetensors", tiny.from_config(tiny.config_of(name)))
    wanted.pop("output.weight", None)
    with GgufReader(out) as merged, GgufReader(base) as before:
        assert merged.tensors.keys() == before.tensors.keys() and "token_embd.weight" in wanted
        for name in merged.tensors:
            found = decode(merged, merged.tensors[name])
            expected = wanted.get(name, decode(before, before.tensors[name]))
            np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["tied-embedding", "tied-head"])
def test_an_update_saved_for_both_is_converted_once(tmp_path, kind):
    base, out = tied_base(tmp_path, "gemma2"), tmp_path / "out.gguf"
    placement = convert(KINDS / kind, tmp_path / "adapter.gguf", base)
    assert [line for line in placement.warnings if "token_embd.weight" in line and "merge instead" in line]
    pairs, _ = read_adapter_gguf(tmp_path / "adapter.gguf")
    assert [pair.name for pair in pairs if "blk" not in pair.name] == ["token_embd.weight"]
    merge(base, [(tmp_path / "adapter.gguf", 1.0)], out)
    assert_merged(out, base, kind, "gemma2")


def factors(adapter, path):
    (pair,) = [update for update in adapter.updates if update.name.endswith(path)]
    return pair


def test_equal_updates_are_found_by_comparing_not_by_the_configuration(tmp_path):
    """Other factors of the same product are one update; another product is two."""
    adapter = read_adapter(KINDS / "tied-embedding")
    adapter.config.pop("ensure_weight_tying")
    head = factors(adapter, "lm_head")
    turn = np.random.default_rng(0).standard_normal((4, 4))
    head.a, head.b = (turn @ head.a).astype(np.float32), (head.b @ np.linalg.inv(turn)).astype(np.float32)
    with GgufReader(tied_base(tmp_path, "gemma2")) as reader:
        (pair,) = [p for p in gguf_pairs(adapter, reader).pairs if p.name == "token_embd.weight"]
        assert pair.shared and pair.rank == 4
        head.b = head.b * np.float32(1.001)
        with pytest.raises(MismatchError, match="tied"):
            gguf_pairs(adapter, reader)


def test_an_update_of_both_beside_an_adapter_that_unties_them(tmp_path):
    base = tied_base(tmp_path, "qwen2")
    folder = tmp_path / "both"
    folder.mkdir()
    for path in (KINDS / "tied-head").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    merge(base, [(KINDS / "embedding", 1.0)], tmp_path / "one.gguf", allow_unused=".")
    merge(base, [(KINDS / "embedding", 1.0), (folder, 1.0)], tmp_path / "two.gguf", allow_unused=".")
    delta = factors(read_adapter(folder), "lm_head").delta()
    with GgufReader(tmp_path / "one.gguf") as one, GgufReader(tmp_path / "two.gguf") as two:
        for name in ("token_embd.weight", "output.weight"):
            change = decode(two, two.tensors[name]) - decode(one, one.tensors[name])
            np.testing.assert_allclose(change, delta, rtol=0, atol=5e-6, err_msg=name)
