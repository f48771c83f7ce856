"""``fetch --base``: from an adapter to GGUFs of the model that it was trained on, on a Hub of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_gguf.api import convert
from lora_gguf.errors import FileError, HubError, MalformedError, UsageError
from lora_gguf.hub.base_models import base_model_of
from lora_gguf.hub.downloads import find_model
from tests.common import DEMO_ADAPTER, FIXTURES, smollm2_path
from tests.hub_faults import answer
from tests.test_cli import run
from tests.test_quantizations import quantized

BASE = "lab/Tiny-1B"
ADAPTER = "someone/pirate"
SHARDS = ("t-Q8_0-00001-of-00002.gguf", "t-Q8_0-00002-of-00002.gguf")


def config(base: object) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": base}).encode()


@pytest.fixture
def hub(local_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local_hub.repos |= {
        BASE: {"config.json": b"{}"},
        ADAPTER: {"adapter_config.json": config(BASE), "adapter_model.safetensors": b"x"},
    }
    quantized(
        local_hub,
        "many/Tiny-GGUF",
        BASE,
        1000,
        ("t-Q2_K.gguf", "t-Q4_K_M.gguf", "UD/t-UD-Q4_K_M.gguf", "other-Q2_K.gguf"),
    )
    quantized(local_hub, "few/Tiny-GGUF", BASE, 10, ("t-Q4_K_M.gguf", *SHARDS))
    return local_hub


def test_the_list_names_what_merge_takes(hub, capsys):
    code, out, err = run(capsys, "fetch", ADAPTER, "--base")
    lines = [line.split() for line in out.splitlines()]
    names = [line[-1] for line in lines]
    assert code == 0 and f"{BASE}: 6 GGUFs" in err
    assert names[-2:] == ["few/Tiny-GGUF:Q4_K_M", "few/Tiny-GGUF:Q8_0"] and {line[1] for line in lines} <= {
        "bytes",
        "kB",
        "MB",
        "GB",
    }
    code, out, _ = run(capsys, "fetch", ADAPTER, "--base", "--json")
    found = json.loads(out)
    assert [entry["reference"] for entry in found] == names
    for entry in found:
        assert list(find_model(entry["reference"])[1].files) == entry["files"] and entry["n_bytes"] > 0
    assert not hub.requests("safetensors")


@pytest.mark.parametrize("source", [ADAPTER, "here", "here.gguf", BASE, f"{ADAPTER}@v1"])
def test_every_way_to_name_an_adapter(hub, tmp_path, source):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "adapter_config.json").write_bytes(config(BASE))
    if source == "here.gguf":
        copy = tmp_path / "copy"
        copy.mkdir()
        (copy / "adapter_model.safetensors").write_bytes((DEMO_ADAPTER / "adapter_model.safetensors").read_bytes())
        stated = json.loads((DEMO_ADAPTER / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
        (copy / "adapter_config.json").write_text(json.dumps(stated))
        convert(copy, tmp_path / source, smollm2_path())
    assert base_model_of(source) == BASE


def test_adapters_in_folders_of_a_repository(hub):
    hub.repos["o/many"] = {"a/adapter_config.json": config("lab/A"), "b/adapter_config.json": config("lab/B")}
    assert base_model_of("o/many", "b") == "lab/B"


def test_one_quantization_is_fetched(hub, capsys, tmp_path):
    code, out, _ = run(capsys, "fetch", ADAPTER, "--base", "--quant", "q4_k_m")
    assert code == 0 and Path(out.strip()).name == "t-Q4_K_M.gguf" and b"many" in Path(out.strip()).read_bytes()
    code, out, _ = run(capsys, "fetch", ADAPTER, "--quant", "Q8_0", "-o", tmp_path / "models")
    assert code == 0 and out.strip() == str(tmp_path / "models" / SHARDS[0])
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == list(SHARDS)


def test_one_file_under_a_name_of_one_s_own(hub, capsys, tmp_path):
    code, out, _ = run(capsys, "fetch", ADAPTER, "--quant", "Q4_K_M", "-o", tmp_path / "base.gguf")
    assert code == 0 and out.strip() == str(tmp_path / "base.gguf") and b"many" in (tmp_path / "base.gguf").read_bytes()
    code, _, err = run(capsys, "fetch", ADAPTER, "--quant", "Q8_0", "-o", tmp_path / "other.gguf")
    assert (
        code == UsageError.exit_code and "has 2 shards: name a folder" in err and not (tmp_path / "other.gguf").exists()
    )


def test_no_such_quantization(hub, capsys):
    code, out, err = run(capsys, "fetch", ADAPTER, "--quant", "Q3_K_S")
    assert code == UsageError.exit_code and not out and "choose one of Q2_K, Q4_K_M" in err


def test_what_differs_is_replaced_with_force_only(hub, capsys, tmp_path):
    here = tmp_path / "models" / "t-Q4_K_M.gguf"
    here.parent.mkdir()
    here.write_bytes(b"mine")
    arguments = ("fetch", ADAPTER, "--quant", "Q4_K_M", "-o", here.parent)
    code, _, err = run(capsys, *arguments)
    assert code == FileError.exit_code and "--force" in err and here.read_bytes() == b"mine"
    assert run(capsys, *arguments, "--force")[0] == 0 and b"many" in here.read_bytes()
    assert run(capsys, *arguments)[0] == 0  # the same file is no conflict


@pytest.mark.parametrize(
    ("stated", "error"),
    [("/content/model", HubError), ("", MalformedError), (None, MalformedError), (5, MalformedError)],
)
def test_an_adapter_that_names_no_model(hub, capsys, stated, error):
    hub.repos[ADAPTER]["adapter_config.json"] = config(stated)
    code, _, err = run(capsys, "fetch", ADAPTER, "--base")
    assert code == error.exit_code and err.count("\n") == 1


def test_a_base_without_ggufs(hub, capsys):
    hub.repos[ADAPTER]["adapter_config.json"] = config("lab/Other")
    code, out, err = run(capsys, "fetch", ADAPTER, "--base")
    assert code == 0 and not out and "lab/Other: no GGUF" in err
    code, _, err = run(capsys, "fetch", ADAPTER, "--quant", "Q4_K_M")
    assert code == HubError.exit_code and "no GGUF model found" in err


def test_a_hub_that_cannot_be_asked_is_said_at_once(hub, capsys):
    from tests.hub_faults import hang_up

    hub.fault(r"GET /api/models", hang_up)
    Path("here").mkdir()
    (Path("here") / "adapter_config.json").write_bytes(config(BASE))
    code, _, err = run(capsys, "fetch", "here", "--base")
    assert code == HubError.exit_code and not hub.requests("GET /api/models/") and err.count("\n") == 1


def adapter_of(folder, name, base):
    """The tiny model's adapter as one of the model ``base``."""
    source = FIXTURES / "tiny" / name / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    stated = json.loads((source / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon-h1"])
def test_convert_without_a_base_asks_the_hub_for_its_config(hub, tmp_path, name):
    said = (FIXTURES / "tiny" / name / "config.json").read_bytes()
    hub.repos[BASE] = {"config.json": said, "model.safetensors": bytes(100_000)}
    adapter = adapter_of(tmp_path / "a", name, BASE)
    convert(adapter, tmp_path / "asked.gguf")
    convert(adapter, tmp_path / "given.gguf", base_config=FIXTURES / "tiny" / name)
    assert (tmp_path / "asked.gguf").read_bytes() == (tmp_path / "given.gguf").read_bytes()
    assert hub.requests("config.json") and not hub.requests("safetensors")


def test_convert_without_a_base_takes_its_config_from_a_folder(hub, tmp_path):
    convert(adapter_of(tmp_path / "a", "llama", str(FIXTURES / "tiny" / "llama")), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").is_file()


@pytest.mark.parametrize(
    ("base", "error"),
    [("lab/Missing", HubError), ("lab/NoConfig", HubError), ("/home/me/model", UsageError), ("", UsageError)],
)
def test_convert_without_a_base_says_what_to_give(hub, tmp_path, base, error):
    hub.repos["lab/NoConfig"] = {"model.safetensors": b"x"}
    with pytest.raises(error, match="give --base BASE.gguf or --base-config DIR"):
        convert(adapter_of(tmp_path / "a", "llama", base), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_gated_base_and_no_network_say_what_to_give(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.repos[BASE] = {"config.json": (FIXTURES / "tiny" / "llama" / "config.json").read_bytes()}
    hub.fault(r"/resolve/", answer(403, "GatedRepo"), 9)
    adapter = adapter_of(tmp_path / "a", "llama", BASE)
    with pytest.raises(HubError, match="give --base BASE.gguf or --base-config DIR"):
        convert(adapter, tmp_path / "out.gguf")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="give --base BASE.gguf or --base-config DIR"):
        convert(adapter, tmp_path / "out.gguf")
