"""A merged file says what it is: its name, what it was made of, and the mix of its types."""

from __future__ import annotations

import gguf
import pytest

import lora_gguf
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.quants.ggml import FILE_TYPES
from tests import tiny
from tests.common import DEMO_ADAPTER, FIXTURES, gemma3_path, smollm2_path, text_kv
from tests.test_tasks import ADAPTER


def keys(path) -> dict:
    with GgufReader(path) as reader:
        return {key.removeprefix("general."): reader.get(key) for key in reader.kv if key.startswith("general.")}


def test_a_merged_file_is_told_from_its_base(tmp_path):
    lora_gguf.merge(smollm2_path(), DEMO_ADAPTER, tmp_path / "merged.gguf")
    before, after = keys(smollm2_path()), keys(tmp_path / "merged.gguf")
    assert after["name"] == f"{before['name']} + demo-adapter"
    assert after["finetune"] == f"{before['finetune']}-demo-adapter"
    assert after["base_model.count"] == 2 and after["base_model.0.name"] == before["name"]
    assert after["base_model.0.organization"] == before["organization"] and after["base_model.1.name"] == "demo-adapter"
    assert {key: after[key] for key in before if key not in ("name", "finetune")} == {
        key: value for key, value in before.items() if key not in ("name", "finetune")
    }


def test_the_repositories_of_base_and_adapter_are_named(local_hub, tmp_path):
    base = tiny.base_gguf(tmp_path, "llama", extra=[text_kv("general.base_model.0.name", "older")])
    files = {name: (ADAPTER / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    local_hub.repos |= {"alice/pirate": files, "bob/tiny-GGUF": {"tiny-Q4_K_M.gguf": base.read_bytes()}}
    lora_gguf.merge("bob/tiny-GGUF:Q4_K_M", "alice/pirate", tmp_path / "merged.gguf")
    found = keys(tmp_path / "merged.gguf")
    assert found["base_model.0.repo_url"] == "https://huggingface.co/bob/tiny-GGUF"
    assert found["base_model.1.repo_url"] == "https://huggingface.co/alice/pirate"
    assert (found["base_model.0.organization"], found["base_model.1.organization"]) == ("bob", "alice")
    assert (found["base_model.1.name"], found["base_model.0.name"]) == ("pirate", found["name"].split(" + ")[0])


def test_the_keys_are_those_of_the_gguf_package(tmp_path):
    lora_gguf.merge(smollm2_path(), DEMO_ADAPTER, tmp_path / "merged.gguf")
    general = gguf.Keys.General
    known = {general.NAME, general.FINETUNE, general.BASE_MODEL_COUNT, general.BASE_MODEL_NAME.format(id=0),
             general.BASE_MODEL_ORGANIZATION.format(id=0), general.BASE_MODEL_NAME.format(id=1)}  # fmt: skip
    assert known <= {f"general.{key}" for key in keys(tmp_path / "merged.gguf")}


def test_growth_keeps_the_mix_of_the_base_and_so_does_the_name(tmp_path):
    report = lora_gguf.merge(gemma3_path(), FIXTURES / "gemma-perl-adapter", tmp_path, max_growth="5%")
    assert any(tensor.target.type != tensor.source.type for tensor in report.plan.tensors)
    assert keys(report.written[0])["file_type"] == FILE_TYPES["Q4_K_M"] == keys(gemma3_path())["file_type"]
    assert report.written[0].name == "gemma-3-270M-gemma-perl-adapter-Q4_K_M.gguf"


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q5_K_S", "Q3_K_L", "Q8_0"])
def test_a_mix_is_called_as_it_was_asked_for(tmp_path, mix):
    base = tiny.base_gguf(tmp_path, "llama")
    (tmp_path / "out").mkdir()
    report = lora_gguf.merge(base, ADAPTER, tmp_path / "out", quantize=mix)
    assert keys(report.written[0])["file_type"] == FILE_TYPES[mix]
    assert report.written[0].name == f"llama-adapter-{mix}.gguf"


def test_an_adapter_keeps_the_type_that_it_has(tmp_path):
    from safetensors.numpy import load_file, save_file

    base, f16 = tiny.base_gguf(tmp_path, "llama"), tmp_path / "f16"
    f16.mkdir()
    (f16 / "adapter_config.json").write_bytes((ADAPTER / "adapter_config.json").read_bytes())
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    save_file({name: tensor.astype("float16") for name, tensor in tensors.items()}, f16 / "adapter_model.safetensors")
    assert types(f16, base, tmp_path) == {"F16"}
    tensors = {name: tensor.astype("float32") for name, tensor in tensors.items()}
    next(iter(tensors.values()))[0, 0] = 1 + 2**-20
    save_file(tensors, f16 / "adapter_model.safetensors")
    assert types(f16, base, tmp_path) == {"F32"}
    short = {name: (tensor.view("uint32") & 0xFFFF0000).view("float32") for name, tensor in tensors.items()}
    next(iter(short.values()))[0, 0] = 2.0**-40
    save_file(short, f16 / "adapter_model.safetensors")
    assert types(f16, base, tmp_path) == {"BF16"}


def types(adapter, base, folder) -> set[str]:
    lora_gguf.convert(adapter, folder / "lora.gguf", base, force=True)
    with GgufReader(folder / "lora.gguf") as reader:
        return {info.type.name for info in reader.tensors.values()}
