"""The conventional names of merged files, held against the gguf package's own function."""

from __future__ import annotations

import os
from types import SimpleNamespace

import gguf
import pytest

from lora_gguf.errors import FileError
from lora_gguf.files.base import Base
from lora_gguf.merging.naming import merged_name
from lora_gguf.merging.options import Policy
from tests.calls import merge
from tests.common import DEMO_ADAPTER, smollm2_path
from tests.test_cli import run
from tests.test_merge import base_and_adapter

Q4_K_M, Q8_0 = 15, 7


class Named:
    """As much of a base as its name takes."""

    def __init__(self, path, **kv):
        self.path, self.kv = SimpleNamespace(name=path), {f"general.{key}": value for key, value in kv.items()}

    def get(self, key, default=None):
        return self.kv.get(key, default)


def name(base, *adapters, file_type=Q4_K_M):
    return merged_name(base, SimpleNamespace(file_type=lambda _: file_type), adapters or ["pirate"])


@pytest.mark.parametrize(
    "kv",
    [
        {"basename": "Mixtral", "size_label": "8x7B", "finetune": "Instruct", "version": "v0.1"},
        {"basename": "Hermes-2 Pro", "size_label": "8B"},
        {"basename": "Llama-3.2", "size_label": "1B", "finetune": "Instruct"},
        {"basename": "gemma-3"},
    ],
)
def test_names_from_metadata_are_those_of_the_gguf_package(kv):
    finetune = "-".join(filter(None, (kv.get("finetune"), "pirate", "chef")))
    expected = gguf.naming_convention(None, kv["basename"], finetune, kv.get("version"), kv.get("size_label"), "Q8_0")
    assert name(Named(f"{'long-' * 20}.gguf", **kv), "pirate", "chef", file_type=Q8_0) == f"{expected}.gguf"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.gguf", "model-pirate-Q4_K_M.gguf"),
        ("Meta-Llama-3-8B-Instruct-Q8_0.gguf", "Meta-Llama-3-8B-Instruct-pirate-Q4_K_M.gguf"),
        ("mistral-7b-instruct-v0.2.Q5_K_S.gguf", "mistral-7b-instruct-pirate-v0.2-Q4_K_M.gguf"),
        ("Qwen3-4B-UD-Q4_K_XL.gguf", "Qwen3-4B-pirate-Q4_K_M.gguf"),
        ("Big-70B-IQ4_XS-00002-of-00003.gguf", "Big-70B-pirate-Q4_K_M.gguf"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "qwen2.5-0.5b-instruct-pirate-Q4_K_M.gguf"),
        ("model-f16.gguf", "model-pirate-Q4_K_M.gguf"),
        ("Q4_0.gguf", "Q4_0-pirate-Q4_K_M.gguf"),
    ],
)
def test_names_from_the_base_s_file(path, expected):
    assert name(Named(path)) == expected


@pytest.mark.parametrize("evil", ["../../x", "a/b", "..", "\x1b[2J", "C:\\x", "a\0b", "é" * 300, "-rf", "x" * 4000])
def test_metadata_never_leads_out_of_the_folder(evil):
    found = name(Named("model.gguf", basename=evil, size_label=evil, version=evil), evil)
    assert os.path.basename(found) == found and found.isprintable() and len(found.encode()) < 255
    assert found.endswith(".gguf") and not found.startswith((".", "-")) and "\\" not in found


@pytest.mark.parametrize("kv", [{}, {"basename": "B" * 150, "size_label": "8B", "version": "v2"}])
def test_a_long_name_is_cut_before_its_version_and_encoding(kv):
    found = {
        file_type: name(Named(f"{'c' * 160}-v3.gguf", **kv), "a" * 250, file_type=file_type)
        for file_type in (Q4_K_M, Q8_0)
    }
    version = "v2-" if kv else "v3-"
    assert found[Q4_K_M].endswith(f"-{version}Q4_K_M.gguf") and found[Q8_0].endswith(f"-{version}Q8_0.gguf")
    assert all(150 < len(path) <= 205 for path in found.values())


def test_the_command_uses_it_and_never_overwrites(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base_and_adapter(tmp_path, "Q4_0")
    os.rename("base.gguf", "toy-v2-Q4_0.gguf")
    expected = tmp_path / "toy-adapter-v2-Q4_0.gguf"
    code, _, err = run(capsys, "merge", "toy-v2-Q4_0.gguf", "adapter.gguf")
    assert code == 0 and f"wrote {expected.name}" in err and expected.exists()
    before = expected.read_bytes()
    code, _, err = run(capsys, "merge", "toy-v2-Q4_0.gguf", "adapter.gguf", "--seed", "1")
    assert code == FileError.exit_code and "--force" in err and expected.read_bytes() == before
    assert run(capsys, "merge", "toy-v2-Q4_0.gguf", "adapter.gguf", "--seed", "1", "--force")[0] == 0
    assert expected.read_bytes() != before
    (tmp_path / "out").mkdir()
    code, _, err = run(
        capsys, "merge", "toy-v2-Q4_0.gguf", "adapter.gguf", "--type", "Q8_0", "--split-max-size", "1M", "-o", "out"
    )
    assert code == 0 and os.listdir("out") == ["toy-adapter-v2-Q8_0.gguf"], err


def test_a_real_base(tmp_path):
    report = merge(smollm2_path(), [(DEMO_ADAPTER, 1.0)], tmp_path, Policy("nearest"))
    assert report.written == [tmp_path / "SmolLM2-135M-Instruct-demo-adapter-Q4_1.gguf"]
    with Base(report.written[0]) as merged:
        assert merged.get("lora_gguf.adapter.names") == ["demo-adapter"]
