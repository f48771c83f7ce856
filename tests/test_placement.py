"""``placement``: real PEFT adapters on small models of many architectures, against what PEFT's own merge makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.adapter import read_adapter
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.hparams import from_base, from_config
from lora_gguf.placement import gguf_pairs
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def merged_weights(name):
    """The GGUF tensors of PEFT's merged model that differ from the base's."""
    return tiny.tensors_of(name, from_config(tiny.config_of(name)), "merged")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_merged_weights_are_pefts(name, folder):
    base = tiny.tensors_of(name, from_config(tiny.config_of(name)))
    with GgufReader(tiny.base_gguf(folder, name)) as reader:
        placement = gguf_pairs(read_adapter(tiny.TINY / name / "adapter"), from_base(reader, tiny.config_of(name)), updates=True)
    wanted = merged_weights(name)
    assert {pair.name for pair in placement.pairs} == wanted.keys() and not placement.updates
    assert all(account.outcome == "applied" for account in placement.accounts)
    for pair in placement.pairs:
        found = base[pair.name] + pair.delta()
        np.testing.assert_allclose(found, wanted[pair.name], rtol=0, atol=2e-6 * np.abs(found).max(), err_msg=pair.name)
        assert np.abs(wanted[pair.name] - base[pair.name]).max() > 0.01


@pytest.mark.parametrize("name", tiny.NAMES)
def test_config_json_gives_the_same_as_the_base(name, folder):
    adapter = read_adapter(tiny.TINY / name / "adapter")
    with GgufReader(tiny.base_gguf(folder, name)) as reader:
        by_base = gguf_pairs(adapter, from_base(reader, tiny.config_of(name)))
    by_config = gguf_pairs(adapter, from_config(tiny.config_of(name)))
    assert [pair.name for pair in by_config.pairs] == [pair.name for pair in by_base.pairs]
    for a, b in zip(by_config.pairs, by_base.pairs, strict=True):
        np.testing.assert_array_equal(a.a, b.a)
        np.testing.assert_array_equal(a.b, b.b)
