"""The step of a type, against what the blocks say and against what dithering does with it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_gguf.merging.options import Policy
from lora_gguf.merging.steps import step_rms, steps_of
from lora_gguf.quants.table import CODECS
from tests.calls import merge
from tests.test_merge import NAME, base_and_adapter, stored

SIZES = {"Q5_0": 5e-4, "Q5_K": 5e-4, "Q6_K": 2e-4, "Q8_0": 1e-4}


@pytest.fixture(scope="module")
def weights():
    return (np.random.default_rng(3).normal(size=(8, 512)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0"])
def test_one_scale_a_block(weights, type_name):
    blocks = stored(weights, type_name)
    scales = blocks.reshape(-1, CODECS[type_name].type.block_bytes)[:, :2].copy().view(np.float16)
    assert step_rms(CODECS[type_name], blocks) == pytest.approx(math.sqrt(np.mean(np.square(scales, dtype=np.float64))))


def test_floats_have_the_spacing_of_each_weight(weights):
    half = weights.astype(np.float16)
    assert np.array_equal(steps_of(CODECS["F16"], half.view(np.uint8)), np.spacing(np.abs(half)).astype(np.float32))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_dithering_changes_a_weight_with_the_chance_delta_over_step(tmp_path, type_name):
    base, adapter, delta = base_and_adapter(tmp_path, type_name, size=SIZES.get(type_name, 1e-3))
    found = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy("dither")).retention[NAME]
    shape = np.abs(delta).mean() / math.sqrt(np.square(delta, dtype=np.float64).mean())
    assert 0.01 < found.delta_per_step < 0.3
    assert found.changed / (found.delta_per_step * shape) == pytest.approx(1.0, abs=0.2)


def test_a_promoted_tensor_has_the_steps_of_its_new_type(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    kept, promoted = (
        merge(base, [(adapter, 1.0)], tmp_path / f"{type}.gguf", Policy("dither", type=type)).retention[NAME]
        for type in (None, "Q8_0")
    )
    assert promoted.delta_per_step == pytest.approx(kept.delta_per_step * 127 / 8, rel=0.15)


def test_types_without_steps(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "F32")
    found = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf").retention[NAME]
    assert math.isnan(found.delta_per_step) and found.kept == pytest.approx(1, abs=1e-3)
