"""What the commands say became of each tensor of an adapter."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.common import FIXTURES
from tests.test_cli import run

ADAPTER = tiny.TINY / "llama" / "adapter"
TOWER = "base_model.model.model.vision_tower.layers.0.q_proj"
STRANGE = "base_model.model.model.layers.0.self_attn.z_proj"


@pytest.fixture
def adapter(tmp_path):
    """The adapter with a module of a vision tower and one that no llama has."""
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    for module in (TOWER, STRANGE):
        factors |= {
            f"{module}.lora_A.weight": np.ones((4, 32), np.float32),
            f"{module}.lora_B.weight": np.ones((32, 4), np.float32),
        }
    save_file(factors, path)
    return tmp_path / "adapter"


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_leftover_is_an_error_and_allow_unused_the_only_way_past_it(tmp_path, capsys, adapter, command):
    base = tiny.base_gguf(tmp_path, "llama")
    arguments = [
        command,
        *([base, adapter] if command == "merge" else [adapter, "--base", base]),
        "-o",
        tmp_path / "out.gguf",
    ]
    code, out, err = run(capsys, *arguments)
    assert code == 5 and "z_proj" in err and not out and not (tmp_path / "out.gguf").exists()
    code, out, err = run(capsys, *arguments, "--allow-unused", "y_proj")
    assert code == 5 and not (tmp_path / "out.gguf").exists()
    code, out, err = run(capsys, *arguments, "--allow-unused", "z_proj")
    n = len(load_file(ADAPTER / "adapter_model.safetensors"))
    done = {"merge": "applied", "convert": "converted"}[command]
    assert code == 0 and f"adapter tensors: {n} {done}\n" in out
    assert "adapter tensors: 2 ignored: part of a vision or audio tower" in out and f"{TOWER}.lora_" in out
    assert "adapter tensors: 2 ignored: --allow-unused" in out and f"{STRANGE}.lora_" in out


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_json_names_every_tensor(tmp_path, capsys, adapter, command):
    base = tiny.base_gguf(tmp_path, "llama")
    arguments = [
        command,
        *([base, adapter] if command == "merge" else [adapter, "--base", base]),
        "-o",
        tmp_path / "out.gguf",
    ]
    code, out, _ = run(capsys, *arguments, "--allow-unused", "z_proj", "--json")
    accounts = {account["tensor"]: account for account in json.loads(out)["accounts"]}
    assert code == 0 and accounts.keys() == load_file(adapter / "adapter_model.safetensors").keys()
    assert accounts[f"{TOWER}.lora_A.weight"]["outcome"] == "ignored" and accounts[f"{TOWER}.lora_A.weight"]["reason"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert accounts[name] == {"tensor": name, "outcome": "applied", "target": "blk.0.attn_q.weight", "reason": ""}


def test_an_approximation_states_its_rank_and_error(tmp_path, capsys):
    base, source = tiny.base_gguf(tmp_path, "llama"), FIXTURES / "kinds" / "dora"
    code, out, _ = run(capsys, "convert", source, "--base", base, "--rank", "6", "-o", tmp_path / "a.gguf")
    assert code == 0 and "approximated at rank 6: 3 tensors, with relative errors from 0." in out
    code, out, _ = run(capsys, "convert", source, "--base", base, "--rank", "6", "-o", tmp_path / "b.gguf", "--json")
    errors = json.loads(out)["approximations"]
    assert errors.keys() == {"blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"}
    assert all(0 < error < 1 for error in errors.values())
