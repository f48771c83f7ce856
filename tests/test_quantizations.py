from __future__ import annotations

import pytest

from lora_gguf.errors import FileError, HubError, IntegrityError, UsageError
from lora_gguf.hub import hashes
from lora_gguf.hub.downloads import fetch_model
from lora_gguf.hub.quantizations import choose, find_quantizations, quant_of, quantizations
from lora_gguf.hub.repository import open_repo
from tests.hub import GGUF_REPO


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Meta-Llama-3-8B-Instruct-Q4_K_M.gguf", "Q4_K_M"), ("llama-2-7b.Q5_0.gguf", "Q5_0"), ("model-f16.gguf", "F16"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"), ("gpt-oss-20b-mxfp4.gguf", "MXFP4"), ("x-IQ2_XXS.gguf", "IQ2_XXS"),
        ("Q8_0/x-00001-of-00003.gguf", "Q8_0"), ("x-TQ1_0.gguf", "TQ1_0"), ("model.gguf", ""), ("Q4-notes/model.gguf", ""),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"), ("a-Q4_K_M-imat-Q6_K.gguf", "Q6_K"), ("BF16/x.gguf", "BF16"),
    ],
)  # fmt: skip
def test_the_quantization_that_a_name_states(name, quant):
    assert quant_of(name) == quant


def test_models_of_a_repository_shards_together(gguf_hub):
    found = quantizations(open_repo(GGUF_REPO))
    assert [(entry.quant, entry.n_bytes, len(entry.files)) for entry in found] == [
        ("Q4_K_M", 404, 1),
        ("Q8_0", 804, 1),
        ("BF16", 1808, 2),
    ]


BASE = "lab/Tiny-1B"


def quantized(gguf_hub, repo_id: str, of: str, downloads: int, files=("t-Q4_K_M.gguf",)) -> None:
    gguf_hub.repos[repo_id] = {name: b"GGUF" + repo_id.encode() for name in files}
    gguf_hub.tags[repo_id] = ["gguf", f"base_model:{of}", f"base_model:quantized:{of}"]
    gguf_hub.downloads[repo_id] = downloads


@pytest.mark.parametrize(
    "stated", [BASE, "unsloth/Tiny-1B-bnb-4bit", "unsloth/tiny-1b-unsloth-bnb-4bit", "unsloth/Tiny-1B"]
)
def test_quantizations_of_a_base_by_the_names_that_adapters_state(gguf_hub, stated):
    gguf_hub.repos |= {
        BASE: {"config.json": b"{}"},
        "unsloth/Tiny-1B": {},
        "unsloth/Tiny-1B-bnb-4bit": {},
        "unsloth/tiny-1b-unsloth-bnb-4bit": {},
    }
    gguf_hub.tags["unsloth/Tiny-1B"] = [f"base_model:{BASE}", f"base_model:finetune:{BASE}"]
    for variant in ("unsloth/Tiny-1B-bnb-4bit", "unsloth/tiny-1b-unsloth-bnb-4bit"):
        gguf_hub.tags[variant] = [
            "base_model:unsloth/Tiny-1B",
            "base_model:quantized:unsloth/Tiny-1B",
            f"base_model:quantized:{BASE}",
        ]
    quantized(gguf_hub, "few/Tiny-1B-GGUF", BASE, 10, ("t-Q2_K.gguf", "t-Q4_K_M.gguf"))
    quantized(gguf_hub, "many/Tiny-1B-GGUF", BASE, 1000)
    quantized(gguf_hub, "other/Big-GGUF", "lab/Big", 99999)
    found = find_quantizations(stated)
    assert [(entry.repo, entry.quant) for entry in found] == [
        ("many/Tiny-1B-GGUF", "Q4_K_M"), ("few/Tiny-1B-GGUF", "Q2_K"), ("few/Tiny-1B-GGUF", "Q4_K_M"),
    ]  # fmt: skip
    assert choose(found, "q4_k_m", stated).repo == "many/Tiny-1B-GGUF"
    with pytest.raises(UsageError, match="choose one of Q4_K_M, Q2_K"):
        choose(found, "Q8_0", stated)


def test_a_fine_tune_is_not_its_base(gguf_hub):
    gguf_hub.repos |= {BASE: {}, "someone/Tuned-1B": {}}
    gguf_hub.tags["someone/Tuned-1B"] = [f"base_model:finetune:{BASE}"]
    quantized(gguf_hub, "many/Tiny-1B-GGUF", BASE, 1000)
    assert find_quantizations("someone/Tuned-1B") == []


@pytest.mark.parametrize("stated", ["", "/data/models/llama", "./out", "C:\\x", "one", "a/b/c", "\x1b[2J/x", "../x"])
def test_a_base_that_is_no_hub_id(gguf_hub, stated):
    with pytest.raises(HubError, match="not a Hub id") as caught:
        find_quantizations(stated)
    assert str(caught.value).isprintable() and not gguf_hub.log


def test_a_repository_that_refuses_is_left_out(gguf_hub):
    from tests.hub_faults import answer

    quantized(gguf_hub, "gated/Tiny-1B-GGUF", BASE, 1000)
    quantized(gguf_hub, "open/Tiny-1B-GGUF", BASE, 10)
    gguf_hub.fault(r"GET /api/models/gated/", answer(403, "GatedRepo"))
    assert [entry.repo for entry in find_quantizations(BASE)] == ["open/Tiny-1B-GGUF"]


def test_a_large_file_is_hashed_once_and_again_when_it_changed(gguf_hub, monkeypatch):
    monkeypatch.setattr(hashes, "LARGE", 100)
    hashed = []
    digests = hashes.digests
    monkeypatch.setattr(hashes, "digests", lambda path, lengths: hashed.append(path) or digests(path, lengths))
    path = fetch_model(f"{GGUF_REPO}:Q8_0")
    assert fetch_model(f"{GGUF_REPO}:Q8_0") == path and len(hashed) == 1
    path.resolve().write_bytes(b"GGUF" + b"9" * 800)
    with pytest.raises(IntegrityError):
        fetch_model(f"{GGUF_REPO}:Q8_0")
    assert len(hashed) == 2


def test_a_download_larger_than_the_disk_is_refused_first(gguf_hub):
    sibling = gguf_hub.sibling("x-Q4_K_M.gguf", b"GGUF")
    sibling["size"] = sibling["lfs"]["size"] = 1 << 60
    gguf_hub.listing_changes["siblings"] = [sibling]
    with pytest.raises(FileError, match="needs 1152921504.61 GB"):
        fetch_model(GGUF_REPO)
    assert not gguf_hub.requests("/resolve/")
