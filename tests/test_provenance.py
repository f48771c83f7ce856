"""What a merged file says of how it was made, and what that still says after a download or a conversion."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.api import convert
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import raw_key_values
from lora_gguf.mapping.sources import placement_of
from lora_gguf.merging.identity import adapter_sha256
from lora_gguf.merging.options import Policy
from tests import tiny
from tests.calls import merge


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.base_gguf(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(tiny.TINY / "llama" / "adapter", tmp_path / "adapter")


def identity(path, model) -> str:
    with Base(model) as base:
        return adapter_sha256(placement_of(path, base))


def test_an_adapter_is_the_same_in_another_folder_file_and_format(adapter, model, tmp_path):
    before = identity(adapter, model)
    assert len(before) == 64 and identity(tiny.TINY / "llama" / "adapter", model) == before
    convert(adapter, tmp_path / "converted.gguf", model)
    assert identity(tmp_path / "converted.gguf", model) == before
    weights = adapter / "adapter_model.safetensors"
    shutil.copy(tiny.TINY / "llama" / "adapter.bin", adapter / "adapter_model.bin")  # the same, by torch.save
    weights.unlink()
    assert identity(adapter, model) == before


def test_an_adapter_of_one_other_number_is_another(adapter, model):
    before, found = identity(adapter, model), set()
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in sorted(weights)[:4]:
        changed = {key: array.copy() for key, array in weights.items()}
        changed[name].reshape(-1)[3] += 1e-3
        save_file(changed, adapter / "adapter_model.safetensors")
        found.add(identity(adapter, model))
    save_file(weights, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 2}))
    found.add(identity(adapter, model))
    assert len(found) == 5 and before not in found


@pytest.mark.parametrize("name", ["dora", "ia3", "oft", "loha"])
def test_updates_of_other_kinds_have_an_identity(name):
    from lora_gguf.adapters.lora import LoraPair
    from lora_gguf.adapters.updates import Dora, Hadamard, Rotated, Scaled
    from lora_gguf.mapping.accounts import Placement

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)

    def update(factor):
        common = dict(name="blk.0.attn_q.weight", shape=(4, 8), sources=(f"file {factor}",))
        return {
            "dora": lambda: Dora(**common, pair=LoraPair("x", a, b, factor), magnitude=np.ones(4)),
            "ia3": lambda: Scaled(**common, row_factors=np.full(4, factor)),
            "oft": lambda: Rotated(**common, stages=[(None, np.full((2, 4, 4), factor))]),
            "loha": lambda: Hadamard(
                **common, scale=factor, rows=np.arange(4), cols=np.arange(8), pairs=((b, a), (b, a))
            ),
        }[name]()

    hashes = [adapter_sha256(Placement(updates=[update(factor)])) for factor in (1.0, np.float64(1.0), 1.5)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_merged_file_says_of_what_it_was_made(adapter, model, tmp_path):
    merge(model, [(adapter, 0.5)], tmp_path / "merged.gguf", Policy(seed=3))
    raw = model.read_bytes()
    with GgufReader(tmp_path / "merged.gguf") as found, GgufReader(model) as base:
        assert found.get("lora_gguf.adapter.sha256") == [identity(adapter, model)]
        assert found.get("lora_gguf.base.size") == len(raw)
        assert found.get("lora_gguf.base.header_sha256") == hashlib.sha256(raw[: base.data_position]).hexdigest()
        assert "lora_gguf.base.sha256" not in found.kv and "lora_gguf.imatrix" not in found.kv
        pairs = raw_key_values(found)
        assert list(found.kv)[-1] == "lora_gguf.metadata_sha256"
        assert found.get("lora_gguf.metadata_sha256") == hashlib.sha256(b"".join(pairs[:-1])).hexdigest()


def test_a_base_of_the_hubs_cache_is_recorded_by_its_hash(adapter, model, tmp_path):
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    blob = tmp_path / "models--me--it" / "blobs" / digest
    link = tmp_path / "models--me--it" / "snapshots" / ("0" * 40) / "it.gguf"
    blob.parent.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    shutil.copy(model, blob)
    link.symlink_to(blob)
    merge(link, [(adapter, 1.0)], tmp_path / "merged.gguf")
    with GgufReader(tmp_path / "merged.gguf") as found:
        assert found.get("lora_gguf.base.sha256") == [digest]


@pytest.mark.parametrize("adapter_called", ["phi-3-mini-lora", "My-Phi3", "modern-bert-x"])
def test_a_name_by_which_llama_cpp_reads_tokens_otherwise_is_not_taken(adapter, model, tmp_path, adapter_called):
    from lora_gguf.merging.provenance import Names, description

    with Base(model) as base:
        plain, telling = (description(base, Names([name], base="b"))["general.name"] for name in ("pirate", "phi-4"))
        assert b"b + pirate" in plain and b"b + phi-4" in telling
        found = description(base, Names([adapter_called], base="b"))
        assert "general.name" not in found and adapter_called.encode() in found["general.base_model.1.name"]
