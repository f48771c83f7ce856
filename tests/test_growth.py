"""Promotion within a size budget."""

from __future__ import annotations

import os

import numpy as np
import pytest
from libgguf import dequantize_rows, quantize_rows

from lora_gguf.errors import UsageError
from lora_gguf.merging.growth import harm_at
from lora_gguf.merging.options import parse_growth
from lora_gguf.merging.regrid import on_finer_grid
from lora_gguf.quants.ggml import BY_NAME
from lora_gguf.quants.table import CODECS
from tests.calls import merge
from tests.chunk_cases import merged, recipe
from tests.common import DEMO_ADAPTER, smollm2_path


def test_budget_is_kept_and_the_small_tensors_that_carry_most_go_first(tmp_path):
    report = merge(smollm2_path(), [(DEMO_ADAPTER, 1.0)], tmp_path / "out.gguf", max_growth=0.03)
    size, before = os.path.getsize(tmp_path / "out.gguf"), os.path.getsize(smollm2_path())
    assert 0.02 * before < size - before < 0.031 * before
    types = {tensor.target.name: tensor.target.type.name for tensor in report.plan.merged}
    larger = [name for name, type_name in types.items() if type_name != "Q4_1"]
    assert len([name for name in larger if "attn_v" in name]) > 20
    assert {types[name] for name in larger} == {"Q5_1", "Q8_0"}
    assert np.mean([report.retention[name].kept for name in larger]) > 0.97


def test_the_same_disturbance_counts_more_at_both_ends_and_less_in_attention():
    inner, first, last = (harm_at(f"blk.{layer}.ffn_up.weight", 30) for layer in (7, 0, 29))
    attention, first_attention = (harm_at(f"blk.{layer}.attn_v.weight", 30) for layer in (7, 1))
    assert attention < inner == first_attention < first == last
    assert harm_at("v.blk.29.ffn_up.weight", None) == harm_at("output.weight", 30) == inner


@pytest.mark.parametrize(("source", "target"), [("Q4_0", "Q5_0"), ("Q4_1", "Q5_1"), ("Q4_K", "Q5_K")])
def test_the_type_with_a_bit_more_holds_every_weight_of_the_coarser_one(source, target):
    weights = (np.random.default_rng(0).normal(size=(24, 1024)) * 3).astype(np.float32)
    blocks = np.frombuffer(bytes(quantize_rows(weights, BY_NAME[source].id)), np.uint8).reshape(24, -1)
    halved = on_finer_grid(CODECS[source], CODECS[target], blocks)
    old, new = (
        np.asarray(dequantize_rows(raw, BY_NAME[name].id, n_per_row=1024)).reshape(weights.shape)
        for name, raw in ((source, blocks), (target, halved))
    )
    assert np.allclose(new, old, atol=1e-6)
    how, delta = (
        recipe(source, target=target),
        (np.random.default_rng(1).normal(size=weights.shape) * 0.01).astype("f4"),
    )
    after, sums = merged(how, blocks, delta)
    parts = [merged(how, blocks[i : i + 7], delta[i : i + 7], i)[0] for i in range(0, 24, 7)]
    assert (np.concatenate(parts) == after).all()
    moved = np.asarray(dequantize_rows(after, BY_NAME[target].id, n_per_row=1024)).reshape(weights.shape) - old
    assert abs((moved * delta).sum() / np.square(delta).sum() - 1) < 0.15
    error = np.square(moved - delta).sum()
    on_old_grid = CODECS[source].decoded(merged(recipe(source), blocks, delta)[0]) - old
    assert error < 0.6 * np.square(on_old_grid - delta).sum()


def test_no_budget_no_change():
    report = merge(smollm2_path(), [(DEMO_ADAPTER, 1.0)], None, max_growth=0.0)
    assert {tensor.target.type.name for tensor in report.plan.merged} == {"Q4_1"}


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.25", 0.25), ("0", 0.0), ("150%", 1.5)])
def test_shares(text, share):
    assert parse_growth(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["-1%", "ten", "nan", "inf", "%", "99999%"])
def test_no_shares(text):
    with pytest.raises(UsageError):
        parse_growth(text)
