"""Every command line of the README's tasks, run in order as written, in an empty folder with a Hub of our own."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from safetensors.numpy import load_file, save

from lora_gguf.merging.options import Policy
from tests import tiny
from tests.calls import merge
from tests.common import ROOT
from tests.test_cli import run
from tests.test_quantizations import quantized

BASE = "lab/Tiny"
MODELS = "user/model-GGUF"
TASKS = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Tasks")[2].partition("\n## ")[0]
COMMANDS = [
    line
    for line in re.findall(r"^(lora-gguf .+)$", TASKS, re.MULTILINE)
    # one asks llama.cpp (tests/test_compare.py), one takes a model with a tower (tests/test_towers*.py)
    if not line.startswith("lora-gguf compare") and "mmproj" not in line
]
ADAPTER = tiny.TINY / "llama" / "adapter"


@pytest.fixture
def folder(local_hub, tmp_path, monkeypatch):
    """What the tasks take for granted: user/adapter and its base on the Hub, models of that name here."""
    base = tiny.base_gguf(tmp_path, "llama")
    config = json.loads((ADAPTER / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    weights = save({name: tensor * 0.75 for name, tensor in tensors.items()})  # another one than that of the shards
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}
    local_hub.repos |= {"user/adapter": files, BASE: {"config.json": b"{}"}}
    quantized(local_hub, MODELS, BASE, 10)
    local_hub.repos[MODELS] = {"model-Q4_K_M.gguf": base.read_bytes()}
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "model-F16.gguf").write_bytes(base.read_bytes())
    merge(base, [(ADAPTER, 1.0)], folder / "tuned-F16.gguf")
    merge(base, [(ADAPTER, 1.0)], folder / "big.gguf", Policy("nearest"), max_bytes=int(base.stat().st_size * 0.6))
    assert (folder / "big-00001-of-00002.gguf").exists()
    return folder


def test_each_works_as_written(folder, capsys):
    assert len(COMMANDS) >= TASKS.count("\n### ")
    (folder / "model.gguf").write_bytes((folder / "model-F16.gguf").read_bytes())
    for line in COMMANDS:
        if "fetch" in line and "model.gguf" in line:
            (folder / "model.gguf").unlink()
        code, out, err = run(capsys, *shlex.split(line)[1:])
        assert code == 0, f"{line}\n{err}"
    written = {path.name for path in folder.iterdir()}
    ggufs = {f"{name}.gguf" for name in ("merged", "mine", "adapter", "both", "small", "whole", "extracted")}
    assert ggufs | {"mine.Modelfile"} <= written
