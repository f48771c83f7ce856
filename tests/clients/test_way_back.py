"""What ``convert --to peft`` writes, read by PEFT and by vLLM's own code.

vLLM itself wants a GPU: the two of its modules that read an adapter are taken from its wheel, unpacked where ``VLLM``
points (``pip download --no-deps vllm``, then ``unzip``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest

from lora_gguf import api
from tests import tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
VLLM = os.environ.get("VLLM")
NAMES = ["llama", "qwen2", "qwen3moe", "gemma2", "phi3", "gpt2", "bloom", "falcon", "mixtral"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each model the folder that the way there and back leads to."""
    found = {}
    for name in NAMES:
        work = tmp_path_factory.mktemp(name)
        base = tiny.base_gguf(work, name)
        api.convert(tiny.TINY / name / "adapter", work / "a.gguf", base, base_config=tiny.TINY / name)
        api.convert(work / "a.gguf", work / "back", base, base_config=tiny.TINY / name, to="peft")
        found[name] = work / "back"
    return found


def merged(name, adapter):
    """The weights of a tiny model with an adapter that PEFT loads and merges."""
    from safetensors.torch import load_file

    kind = getattr(transformers, tiny.config_of(name)["architectures"][0])
    model = kind(kind.config_class.from_pretrained(tiny.TINY / name))
    weights = {key: value.float() for key, value in load_file(tiny.TINY / name / "base.safetensors").items()}
    model.load_state_dict(weights, strict=False)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_it_as_the_adapter_itself(folders, name):
    before, after = merged(name, tiny.TINY / name / "adapter"), merged(name, folders[name])
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-5)


def module(name, **content):
    found = types.ModuleType(name)
    found.__dict__.update(content)
    return found


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's reader of configurations, and what it makes of a tensor's name."""
    if not VLLM:
        pytest.skip("VLLM names no unpacked wheel")
    logger = types.SimpleNamespace(info_once=print, warning_once=print)
    for stub in (
        module("vllm"),
        module("vllm.config"),
        module("vllm.config.lora", LoRAConfig=object),
        module("vllm.logger", init_logger=lambda name: logger),
    ):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    spec = importlib.util.spec_from_file_location("peft_helper", Path(VLLM) / "vllm/lora/peft_helper.py")
    assert spec and spec.loader
    helper = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peft_helper", helper)
    spec.loader.exec_module(helper)
    text = (Path(VLLM) / "vllm/lora/utils.py").read_text()
    start = text.index("def parse_fine_tuned_lora_name")
    space: dict = {}
    exec("from __future__ import annotations\n" + text[start : text.index("\ndef ", start + 1)], space)
    return helper.PEFTHelper, space["parse_fine_tuned_lora_name"]


@pytest.mark.parametrize("name", NAMES)
def test_vllm_reads_it(folders, vllm, name):
    from safetensors.torch import load_file

    helper_class, parse = vllm
    helper = helper_class.from_local_dir(str(folders[name]), None)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=16))
    modules: dict[str, dict[bool, torch.Tensor]] = {}
    for key, tensor in load_file(folders[name] / "adapter_model.safetensors").items():
        path, is_a = parse(key)
        modules.setdefault(path, {})[is_a] = tensor
    targets = json.loads((folders[name] / "adapter_config.json").read_text())["target_modules"]
    assert modules and (set(targets) <= modules.keys())
    for path, pair in modules.items():
        rank, scaling = helper.get_rank_and_scaling(path)
        n_a, n_b = pair[True].shape[0], pair[False].shape[1]
        assert n_a == n_b and n_a % rank == 0 and (n_a == rank or ".experts" in path) and scaling > 0
