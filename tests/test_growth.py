"""Promotion within a size budget."""

from __future__ import annotations

import os

import pytest

from lora_gguf.errors import UsageError
from lora_gguf.merging.options import parse_growth
from tests.calls import merge
from tests.common import DEMO_ADAPTER, smollm2_path


def test_budget_is_kept_and_the_small_tensors_that_carry_most_go_first(tmp_path):
    report = merge(smollm2_path(), [(DEMO_ADAPTER, 1.0)], tmp_path / "out.gguf", max_growth=0.03)
    size, before = os.path.getsize(tmp_path / "out.gguf"), os.path.getsize(smollm2_path())
    assert 0.02 * before < size - before < 0.031 * before
    promoted = [tensor.target.name for tensor in report.plan.merged if tensor.target.type.name == "Q8_0"]
    assert len([name for name in promoted if "attn_v" in name]) == 30 and not [
        name for name in promoted if "ffn" in name
    ]
    assert all(report.retention[name].kept > 0.97 for name in promoted)


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
