"""``convert --to peft``: from a PEFT adapter to a GGUF and back are the same updates, over many architectures."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_gguf import api
from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.errors import FileError, UnsupportedError, UsageError
from lora_gguf.files.base import Base
from lora_gguf.mapping import back
from lora_gguf.mapping.hparams import from_base
from lora_gguf.mapping.orientation import oriented
from tests.test_heads import KINDS, tied_base
from tests.test_reference import NAMES, REFERENCE, base_gguf


def updates(folder, base, config):
    """Module path -> update (out, in) or (E, out, in)."""
    adapter = read_adapter(folder)
    with Base(base) as model:
        found, _ = oriented(adapter, from_base(model, config))
    return {pair.name: pair.delta() for pair in found}


# of several classes with one GGUF architecture the way back takes the names of one
OF_ANOTHER_CLASS = {"distilbert", "bert-classifier", "roberta-classifier", "t5encoder", "umt5", "llama4"}
# Gemma 3n's stacks of projections between its streams have none
LEFT_OUT = {"gemma3n": "altup"}


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, tmp_path):
    source, config = REFERENCE / name / "adapter", json.loads((REFERENCE / name / "config.json").read_text())
    base = base_gguf(name, tmp_path / "base.gguf")
    api.convert(source, tmp_path / "adapter.gguf", base, base_config=REFERENCE / name)
    left_out = LEFT_OUT.get(name)
    options = dict(base_config=REFERENCE / name, allow_unused=left_out)
    api.convert(tmp_path / "adapter.gguf", tmp_path / "back", base, to="peft", **options)
    if name in OF_ANOTHER_CLASS:
        return  # that it is the same update in the base is asked before it is written
    before, after = updates(source, base, config), updates(tmp_path / "back", base, config)
    before = {path: update for path, update in before.items() if not left_out or left_out not in path}
    assert after.keys() == before.keys()
    for path, update in before.items():
        np.testing.assert_allclose(after[path], update, rtol=0, atol=3e-6, err_msg=path)
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and set(written["target_modules"]) <= before.keys()
    assert_as_vllm_wants_it(tmp_path / "back", written)


def assert_as_vllm_wants_it(folder, config):
    """What vLLM's reader asks of a folder: fields, features that it lacks, names of tensors, and ranks."""
    assert config["r"] > 0 and config["lora_alpha"] and config["target_modules"] and config["bias"] == "none"
    assert not any(config.get(field) for field in ("modules_to_save", "use_dora", "use_rslora", "lora_bias"))
    assert config["init_lora_weights"] is True
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, array in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(?P<path>.+)\.lora_(embedding_)?(?P<half>[AB])(\.weight)?", name)
        assert match and name.endswith(".weight") != ("lora_embedding_" in name), name
        if ".experts" not in match["path"]:
            ranks = [r for key, r in config["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", match["path"])]
            assert array.shape["AB".index(match["half"])] == (ranks or [config["r"]])[0], name


def test_a_tied_head_comes_back_tied(tmp_path):
    base = tied_base(tmp_path, "gemma2")
    api.convert(KINDS / "tied-embedding", tmp_path / "adapter.gguf", base)
    api.convert(tmp_path / "adapter.gguf", tmp_path / "back", base, to="peft")
    before, after = updates(KINDS / "tied-embedding", base, None), updates(tmp_path / "back", base, None)
    assert after.keys() == before.keys()
    for path, update in before.items():
        np.testing.assert_allclose(after[path], update, rtol=0, atol=3e-6, err_msg=path)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["ensure_weight_tying"] is True


def test_what_is_there_is_kept(tmp_path):
    base = base_gguf("llama", tmp_path / "base.gguf")
    api.convert(REFERENCE / "llama" / "adapter", tmp_path / "adapter.gguf", base)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "adapter_config.json").write_text("mine")
    with pytest.raises(FileError, match="--force"):
        api.convert(tmp_path / "adapter.gguf", tmp_path / "back", base, to="peft")
    assert [path.read_text() for path in (tmp_path / "back").iterdir()] == ["mine"]
    api.convert(tmp_path / "adapter.gguf", tmp_path / "back", base, to="peft", force=True)
    assert read_adapter(tmp_path / "back").updates


def test_it_wants_a_gguf_and_its_base(tmp_path):
    base = base_gguf("llama", tmp_path / "base.gguf")
    with pytest.raises(UsageError, match="an adapter GGUF"):
        api.convert(REFERENCE / "llama" / "adapter", tmp_path / "back", base, to="peft")
    api.convert(REFERENCE / "llama" / "adapter", tmp_path / "adapter.gguf", base)
    with pytest.raises(UsageError, match="give --base BASE.gguf"):
        api.convert(tmp_path / "adapter.gguf", tmp_path / "back", to="peft")


def test_tensors_without_a_module_are_named(tmp_path, monkeypatch):
    base = base_gguf("llama", tmp_path / "base.gguf")
    api.convert(REFERENCE / "llama" / "adapter", tmp_path / "adapter.gguf", base)
    monkeypatch.setattr(back, "DEFAULT", {key: path for key, path in back.DEFAULT.items() if key != "ffn_up"})
    with pytest.raises(UnsupportedError, match="ffn_up.*--allow-unused"):
        api.convert(tmp_path / "adapter.gguf", tmp_path / "back", base, to="peft")
    api.convert(tmp_path / "adapter.gguf", tmp_path / "back", base, to="peft", allow_unused="ffn_up")
    assert not any("up_proj" in update.name for update in read_adapter(tmp_path / "back").updates)
