"""Real PEFT adapters on tiny models of many architectures, merged into what llama.cpp's own converter writes of them,
against PEFT's merge, converted by the same."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_gguf import api
from lora_gguf.files.gguf_reader import GgufReader
from tests.common import FIXTURES

REFERENCE = FIXTURES / "reference"
NAMES = sorted(path.name for path in REFERENCE.iterdir())
TOLERANCE = 2e-6  # a few roundings of f32: the weights are below 1


def base_gguf(name, path):
    """The converter's header of a model, and weights of our own."""
    header, room = (REFERENCE / name / "header.gguf").read_bytes(), 1 << 20
    path.write_bytes(header + bytes(room))
    with GgufReader(path) as reader:
        assert {info.type.name for info in reader.tensors.values()} == {"F32"}
        size = max(info.offset + info.n_bytes for info in reader.tensors.values())
    weights = 0.1 * np.random.default_rng(3).standard_normal(-(-size // 4))
    path.write_bytes(header + weights.astype(np.float32).tobytes())
    return path


def tensors_of(path):
    with GgufReader(path) as reader:
        return {
            name: np.array(reader.read(info)).view("<f4").reshape(info.shape) for name, info in reader.tensors.items()
        }


def assert_merged(base, merged, update):
    """The merged file's weights are the base's and what PEFT's merge adds."""
    before, after = tensors_of(base), tensors_of(merged)
    assert before.keys() == after.keys() and update.keys() <= before.keys()
    for name, weights in after.items():
        expected = before[name] + update[name] if name in update else before[name]
        np.testing.assert_allclose(weights, expected, rtol=0, atol=TOLERANCE, err_msg=name)
        assert name not in update or np.abs(update[name]).max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_is_pefts(name, tmp_path):
    base, update = base_gguf(name, tmp_path / "base.gguf"), load_file(REFERENCE / name / "update.safetensors")
    adapter = REFERENCE / name / "adapter"
    report = api.merge(base, adapter, tmp_path / "merged.gguf", base_config=REFERENCE / name)
    assert not [account for account in report.accounts if account.outcome != "applied"]
    assert_merged(base, tmp_path / "merged.gguf", update)


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_adapter_merges_alike(name, tmp_path):
    base, update = base_gguf(name, tmp_path / "base.gguf"), load_file(REFERENCE / name / "update.safetensors")
    api.convert(REFERENCE / name / "adapter", tmp_path / "adapter.gguf", base, base_config=REFERENCE / name)
    api.merge(base, tmp_path / "adapter.gguf", tmp_path / "merged.gguf")
    assert_merged(base, tmp_path / "merged.gguf", update)
