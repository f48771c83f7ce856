"""What ``inspect`` tells of each kind of file, here and on a Hub, and how little of it is transferred."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import gguf
import pytest
import safetensors

from lora_gguf.api import convert, inspect
from lora_gguf.cli import execute
from lora_gguf.errors import FileError, HubError, MalformedError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.hub.downloads import find_model
from lora_gguf.hub.remote import open_model
from lora_gguf.merging.options import Policy
from tests.calls import merge
from tests.common import DEMO_ADAPTER, FIXTURES, gemma3_path, smollm2_path
from tests.hub import TOKEN
from tests.test_merge import NAME, base_and_adapter

ADAPTER = "someone/pirate"
MODEL = "someone/model-GGUF"


@cache
def model_bytes() -> bytes:
    return smollm2_path().read_bytes()


@pytest.fixture
def hub(local_hub):
    local_hub.repos[ADAPTER] = {path.name: path.read_bytes() for path in DEMO_ADAPTER.iterdir()}
    local_hub.repos[MODEL] = {"model-Q4_1.gguf": model_bytes(), "README.md": b"a model"}
    local_hub.listing(MODEL)  # hashes once what takes longer than a client waits
    return local_hub


def test_a_model_is_as_the_gguf_package_reads_it():
    found = inspect(gemma3_path())
    assert (found.kind, found.architecture, found.quantization) == ("model", "gemma3", "Q4_K_M")
    assert (found.n_layers, found.context_length, found.embedding_length, found.tied_head) == (18, 32768, 640, True)
    assert found.vocabulary_size == 262144 and not found.chat_template and found.provenance is None
    assert found.n_bytes == gemma3_path().stat().st_size
    sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in found.types}
    assert all(
        share.n_bytes == share.n_parameters // sizes[name][0] * sizes[name][1] for name, share in found.types.items()
    )
    assert sum(share.n_parameters for share in found.types.values()) == found.n_parameters


def test_a_peft_adapter_is_as_safetensors_reads_it():
    found = inspect(DEMO_ADAPTER)
    with safetensors.safe_open(DEMO_ADAPTER / "adapter_model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.kind == "adapter (PEFT)" and found.method == "LoRA" and found.n_layers == 30
    assert found.n_parameters == sum(array.size for array in tensors.values())
    assert found.types["F16"].n_tensors == len(tensors) == 2 * sum(found.targets.values())
    assert [(group.rank, group.scale) for group in found.ranks] == [(8, 2.0)]
    assert found.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and not found.refusal


def test_patterns_give_each_module_its_rank_and_scale():
    found = inspect(FIXTURES / "scales-adapter")
    assert (
        found.method == "rsLoRA" and sum(group.n_modules for group in found.ranks) == sum(found.targets.values()) == 120
    )
    assert {(group.rank, round(group.scale, 3)) for group in found.ranks} >= {(2, 4.243), (8, 3.889), (6, 8.165)}


@pytest.mark.parametrize(
    "folder", sorted((FIXTURES / "kinds").iterdir()) + sorted((FIXTURES / "tiny").glob("*/adapter")), ids=str
)
def test_every_kind_is_told(folder):
    found = inspect(folder)
    assert (found.method and found.targets) or found.whole
    assert not found.notes and found.n_parameters


def test_what_cannot_be_used_says_so(tmp_path):
    config = json.loads((DEMO_ADAPTER / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"kasa_config": {"beta": 1e-4}}))
    (tmp_path / "adapter_model.safetensors").symlink_to(DEMO_ADAPTER / "adapter_model.safetensors")
    assert "KaSA" in inspect(tmp_path).refusal


def test_an_adapter_gguf(tmp_path):
    convert(DEMO_ADAPTER, tmp_path / "adapter.gguf", smollm2_path())
    found = inspect(tmp_path / "adapter.gguf")
    assert (found.kind, found.architecture, found.base_model) == (
        "adapter (GGUF)",
        "llama",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    assert [(group.rank, group.scale, group.n_modules) for group in found.ranks] == [(8, 2.0, 210)]
    assert found.alpha == 16 and found.targets["attn_q"] == 30 and found.n_layers == 30


def test_a_merged_file_tells_how_it_was_made(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    merge(base, [(adapter, 0.5)], tmp_path / "merged.gguf", Policy("dither", 7))
    found = inspect(tmp_path / "merged.gguf")
    assert found.kind == "merged model" and found.provenance.adapters == [("adapter", 0.5)]
    assert (found.provenance.rounding, found.provenance.seed) == ("dither", 7)


def test_a_model_on_the_hub_costs_a_fiftieth_of_its_size(hub, capsys):
    local = inspect(smollm2_path())
    assert execute(["inspect", f"{MODEL}:Q4_1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {**local.as_dict(), "source": 0, "files": 0} == {**found, "source": 0, "files": 0}
    assert found["source"] == f"{MODEL}/model-Q4_1.gguf" and hub.n_sent < 0.02 * local.n_bytes
    assert hub.requests("^GET /cdn") != [] and all("range" in headers for headers in hub.requests("^GET /cdn"))
    assert TOKEN not in str(hub.requests("^GET /cdn"))


@pytest.mark.parametrize("reference", [MODEL, f"hf://{MODEL}/model-Q4_1.gguf", f"{MODEL}@main:q4_1"])
def test_references(hub, reference):
    assert inspect(reference).architecture == "llama"


def test_an_adapter_on_the_hub_by_its_header(hub):
    found = inspect(ADAPTER)
    local = inspect(DEMO_ADAPTER)
    assert {**found.as_dict(), "source": 0} == {**local.as_dict(), "source": 0}
    weights = hub.requests("^GET /cdn.*safetensors")
    assert weights and all("range" in headers for headers in weights) and hub.n_sent < 0.05 * local.n_bytes


def test_shards_on_the_hub(hub, tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    merge(base, [(adapter, 1.0)], tmp_path / "split.gguf", max_bytes=2000)
    shards = sorted(tmp_path.glob("split-0*.gguf"))
    hub.repos["someone/split"] = {f"split-Q4_0-{path.name[6:]}": path.read_bytes() for path in shards}
    found = inspect("someone/split:Q4_0")
    assert len(shards) > 1 and len(found.files) == len(shards) and found.kind == "merged model"


def test_rows_on_the_hub_are_those_of_the_file(hub):
    with open_model(*find_model(MODEL)) as remote, GgufReader(smollm2_path()) as local:
        info = local.tensors["blk.7.ffn_up.weight"]
        assert (remote.reader_of(info.name).read(info, 3, 5) == local.read(info, 3, 5)).all()


def test_a_server_without_ranges_is_told_and_not_read(hub):
    def whole(handler) -> bool:
        del handler.headers["Range"]
        return False  # and is served as if it had not asked

    hub.fault("GET /cdn", whole)
    with pytest.raises(HubError, match="parts"):
        inspect(MODEL)


def test_what_is_wrong_on_the_hub_is_one_line(hub):
    hub.repos["someone/broken"] = {"broken-Q4_0.gguf": b"<!doctype html>" + bytes(100)}
    with pytest.raises(MalformedError, match="HTML"):
        inspect("someone/broken")
    with pytest.raises(HubError, match="no such repository"):
        inspect("someone/nothing")


@pytest.mark.parametrize("source", ["no.gguf", "./no", "", "a\0b"])
def test_what_is_not_there(source):
    with pytest.raises(UsageError if "\0" in source else FileError):
        inspect(source)


def test_a_folder_of_models_is_asked_back(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    with pytest.raises(FileError, match="adapter.gguf, base.gguf"):
        inspect(tmp_path)
    adapter.unlink()
    assert inspect(tmp_path).kind == "model"


def test_the_table_says_what_the_json_says(tmp_path, capsys):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    assert execute(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "adapter (GGUF)" in out and NAME.split(".")[2] in out


def test_no_kernel_is_loaded():
    words = ["inspect", str(smollm2_path())]
    code = f"import sys; from lora_gguf.cli import execute; assert execute({words}) == 0; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, capture_output=True)
