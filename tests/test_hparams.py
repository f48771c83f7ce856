"""``hparams``: what ``config.json`` says in ways of its own, and layouts that no header tells."""

from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.errors import MismatchError
from lora_gguf.mapping.hparams import from_config
from tests.calls import gguf_pairs
from tests.test_adapter import directory, tensors


def config(architecture, **fields):
    return {
        "architectures": [architecture],
        "num_attention_heads": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        **fields,
    }


def block(size):
    return {"attention": {"n_heads_in_group": size, "replace_with_linear": False}, "ffn": {"ffn_mult": 1.0}}


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        (config("FalconForCausalLM", multi_query=True, num_kv_heads=8), [1, 1]),
        (config("FalconForCausalLM", multi_query=True, num_kv_heads=4, new_decoder_architecture=True), [4, 4]),
        (config("FalconForCausalLM", multi_query=False), [8, 8]),
        (config("DeciLMForCausalLM", num_key_value_heads_per_layer=[2, 4]), [2, 4]),
        (config("DeciLMForCausalLM", num_key_value_heads=None, block_configs=[block(4), block(None)]), [2, 0]),
        (config("LLaDAModelLM", n_kv_heads=2), [2, 2]),
        (config("LlamaForCausalLM", num_key_value_heads=2), [2, 2]),
    ],
)
def test_key_value_heads(fields, heads):
    hparams = from_config(fields)
    assert [hparams.get("attention.head_count_kv", layer) for layer in range(2)] == heads


@pytest.mark.parametrize(("field", "fits"), [({}, False), ({"norm_head": True}, False), ({"norm_head": False}, True)])
def test_a_head_that_may_be_normalised(tmp_path, field, fits):
    adapter = read_adapter(directory(tmp_path, tensors("lm_head", n_in=32, n_out=64)))
    hparams = from_config(config("BailingMoeForCausalLM", **field))
    if fits:
        assert [pair.name for pair in gguf_pairs(adapter, hparams).pairs] == ["output.weight"]
    else:
        with pytest.raises(MismatchError, match="lm_head.*normalised.*norm_head is false"):
            gguf_pairs(adapter, hparams)


def test_ternary_training_is_told(tmp_path):
    adapter = read_adapter(directory(tmp_path, tensors("model.layers.0.mlp.up_proj", n_in=32, n_out=64)))
    placement = gguf_pairs(adapter, from_config(config("BitnetForCausalLM")))
    assert np.isfinite(placement.pairs[0].b).all() and "quantized in training" in placement.warnings[0]
