"""``merge`` on mmproj files: what llama.cpp's own converter makes of PEFT's merge, tower by tower."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.lora import decode
from lora_gguf.commands.merge import Writing, merge
from lora_gguf.errors import MismatchError, UnsupportedError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.towers import TOWERS
from tests.common import FIXTURES, pack_gguf, text_kv

FOLDER = FIXTURES / "towers"
NAMES = sorted(path.name for path in FOLDER.iterdir())
HALF = {"F32": 2e-6, "F16": 2**-10}  # what rounding to the type may lose of the largest weight


def arrays(path) -> dict[str, np.ndarray]:
    with GgufReader(path) as reader:
        return {name: decode(reader, info) for name, info in reader.tensors.items()}


def types(path) -> dict[str, str]:
    with GgufReader(path) as reader:
        return {name: info.type.name for name, info in reader.tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_tower_is_merged_as_llama_cpp_converts_pefts_merge(tmp_path, name):
    base, out = FOLDER / name / "mmproj.gguf", tmp_path / "merged.gguf"
    report = merge(base, [(FOLDER / name / "adapter", 1.0)], Writing(out))
    before, after, wanted = arrays(base), arrays(out), load_file(FOLDER / name / "merged.safetensors")
    assert {tensor.target.name for tensor in report.plan.merged} == wanted.keys() and types(out) == types(base)
    for tensor, type in types(base).items():
        expected = wanted.get(tensor, before[tensor])
        if tensor in wanted:
            atol = HALF[type] * max(1, np.abs(expected).max())
            np.testing.assert_allclose(after[tensor], expected, rtol=0, atol=atol, err_msg=tensor)
            assert np.abs(expected - before[tensor]).max() > 10 * atol, tensor
        else:
            np.testing.assert_array_equal(after[tensor], expected, err_msg=tensor)
    saved = load_file(FOLDER / name / "adapter" / "adapter_model.safetensors")
    assert {account.tensor for account in report.accounts} == saved.keys()
    assert {account.outcome for account in report.accounts} == {"applied", "ignored"}
    reasons = {account.reason.split(",")[0].split(":")[0] for account in report.accounts if account.reason}
    assert reasons <= {"part of the text model", "of a layer that the model does not use"}


def test_twelve_families_and_more_are_held_against_llama_cpp():
    kinds = set()
    for name in NAMES:
        with GgufReader(FOLDER / name / "mmproj.gguf") as reader:
            keys = (f"clip.{part}projector_type" for part in ("", "vision.", "audio."))
            kinds |= {reader.get(key) for key in keys if reader.get(key)}
    assert kinds <= TOWERS.keys() and len(kinds) >= 12


@pytest.fixture
def adapter(tmp_path):
    """A copy of an adapter that a test changes: the folder, and a function that saves other tensors in it."""

    def made(name: str, change) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(FOLDER / name / "adapter", folder, dirs_exist_ok=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return made


def test_what_no_tensor_is_known_for_is_refused_with_all_offenders(tmp_path, adapter):
    def rename(tensors):
        for name in list(tensors):
            if ".mlp.fc" in name:
                tensors[name.replace(".mlp.fc", ".mlp.fx")] = tensors.pop(name)

    folder = adapter("smolvlm", rename)
    with pytest.raises(MismatchError, match="mlp.fx1: no tensor of idefics3 mmproj is known by this name") as error:
        merge(FOLDER / "smolvlm" / "mmproj.gguf", [(folder, 1.0)], Writing(tmp_path / "no.gguf"))
    assert len(error.value.details) == 6 and not (tmp_path / "no.gguf").exists()


def test_another_models_tower_is_refused(tmp_path):
    with pytest.raises(MismatchError, match="17 of 18 modules do not fit: is the base of the same"):
        merge(FOLDER / "smolvlm" / "mmproj.gguf", [(FOLDER / "qwen3vl" / "adapter", 1.0)], Writing(tmp_path / "no"))
    with pytest.raises(MismatchError, match="linear_1: no tensor of gemma3 mmproj is known") as error:
        merge(FOLDER / "gemma3" / "mmproj.gguf", [(FOLDER / "lfm2vl" / "adapter", 1.0)], Writing(tmp_path / "no"))
    assert "v.patch_embd.weight: expected (32, 3, 4, 4), found (32, 768)" in error.value.details


def test_an_audio_tower_that_the_file_lacks_is_left_out_and_said_to_be(tmp_path, adapter):
    name = "base_model.model.model.audio_tower.layers.0.self_attn.q_proj"
    factors = {
        f"{name}.lora_A.weight": np.ones((2, 32), np.float32),
        f"{name}.lora_B.weight": np.ones((32, 2), np.float32),
    }
    folder = adapter("smolvlm", lambda tensors: tensors.update(factors))
    report = merge(FOLDER / "smolvlm" / "mmproj.gguf", [(folder, 1.0)], None)
    reasons = {account.tensor: account.reason for account in report.accounts}
    assert all(reasons[key] == "part of the model's audio tower, which this mmproj does not hold" for key in factors)


def test_a_layer_that_the_file_lacks_is_refused_where_it_was_trained(tmp_path, adapter):
    def train(tensors):
        name = next(name for name in tensors if ".layers.2." in name and "lora_B" in name)
        tensors[name][0, 0] = 1

    folder = adapter("llava", train)
    with pytest.raises(MismatchError, match="expected in mmproj.gguf, not found"):
        merge(FOLDER / "llava" / "mmproj.gguf", [(folder, 1.0)], None)


def test_an_unknown_projector_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "mmproj.gguf"
    head = [text_kv("general.architecture", "clip"), text_kv("clip.projector_type", "of next week")]
    path.write_bytes(pack_gguf(head, [("mm.0.weight", "F32", (4, 4), np.zeros((4, 4), np.float32).tobytes())]))
    with pytest.raises(UnsupportedError, match="projector of next week: .*convert_hf_to_gguf.py --mmproj"):
        merge(path, [(FOLDER / "smolvlm" / "adapter", 1.0)], None)
