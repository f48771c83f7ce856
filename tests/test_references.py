"""References to GGUFs on the Hub, alone and wherever a command names a base or an adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_gguf.errors import HubError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.hub.downloads import fetch_adapter as fetch
from lora_gguf.hub.downloads import fetch_model, find_model
from lora_gguf.mapping.sources import adapter_name
from tests.hub import GGUF_FILES, GGUF_REPO, TOKEN
from tests.test_cli import run
from tests.test_merge import base_and_adapter


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (GGUF_REPO, "Tiny-1B-Q4_K_M.gguf"),
        (f"{GGUF_REPO}:q8_0", "Tiny-1B-Q8_0.gguf"),
        (f"hf://{GGUF_REPO}:Q8_0", "Tiny-1B-Q8_0.gguf"),
        (f"{GGUF_REPO}@v1:Q8_0", "Tiny-1B-Q8_0.gguf"),
        (f"hf://{GGUF_REPO}/Tiny-1B-Q8_0.gguf", "Tiny-1B-Q8_0.gguf"),
        (f"hf://{GGUF_REPO}@v1/mmproj-Tiny-F16.gguf", "mmproj-Tiny-F16.gguf"),
        (f"https://huggingface.co/{GGUF_REPO}/blob/main/Tiny-1B-Q8_0.gguf", "Tiny-1B-Q8_0.gguf"),
        (f"https://huggingface.co/{GGUF_REPO}/resolve/main/Tiny-1B-Q8_0.gguf?download=true", "Tiny-1B-Q8_0.gguf"),
        (f"{GGUF_REPO}:bf16", "BF16/Tiny-1B-BF16-00001-of-00002.gguf"),
        (f"hf://{GGUF_REPO}/BF16/Tiny-1B-BF16-00002-of-00002.gguf", "BF16/Tiny-1B-BF16-00001-of-00002.gguf"),
    ],
)
def test_a_reference_names_a_file(gguf_hub, reference, name):
    path = fetch_model(reference)
    assert path.read_bytes() == GGUF_FILES[name] and path.as_posix().endswith(name)
    if "BF16" in name:
        assert sorted(os.listdir(path.parent)) == [
            "Tiny-1B-BF16-00001-of-00002.gguf",
            "Tiny-1B-BF16-00002-of-00002.gguf",
        ]


def test_paths_stay_paths(gguf_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / GGUF_REPO).mkdir(parents=True)
    for path in (
        "model.gguf",
        "models/model.gguf",
        "./maker/x",
        "/a/b",
        "../a/b",
        GGUF_REPO,
        "C:/x/y",
        "C:\\x.gguf",
        "a/b/c",
        "x",
        "",
    ):
        assert fetch_model(path) == Path(path)
    assert fetch_model(Path("maker/other")) == Path("maker/other") and not gguf_hub.log


@pytest.mark.parametrize(
    ("reference", "error", "part"),
    [
        (f"{GGUF_REPO}:Q3_K_S", UsageError, "choose one of Q4_K_M, Q8_0, BF16"),
        (f"hf://{GGUF_REPO}/none.gguf", HubError, "no file none.gguf: it has Q4_K_M, Q8_0, BF16"),
        (f"hf://{GGUF_REPO}/../../x.gguf", HubError, "no file"),
        ("maker/none", HubError, "no such repository"),
        ("maker/empty", HubError, "no GGUF model found"),
        ("maker/two", UsageError, "no Q4_K_M among its quantizations: choose one of Q2_K, Q3_K_M"),
    ],
)
def test_references_to_nothing(gguf_hub, reference, error, part):
    gguf_hub.repos["maker/empty"] = {"README.md": b""}
    gguf_hub.repos["maker/two"] = {"a-Q2_K.gguf": b"GGUF", "a-Q3_K_M.gguf": b"GGUF1"}
    with pytest.raises(error, match=part) as caught:
        fetch_model(reference)
    assert str(caught.value).isprintable() and TOKEN not in str(caught.value)


def test_the_only_model_needs_no_choice(gguf_hub):
    gguf_hub.repos["maker/one"] = {"one.gguf": b"GGUF1", "one-mmproj.gguf": b"GGUF"}
    assert fetch_model("maker/one").name == "one.gguf"


def test_what_a_reference_names_is_known_before_anything_is_downloaded(gguf_hub):
    repo, found = find_model(f"{GGUF_REPO}:Q8_0")
    assert (repo.id, found.files, found.n_bytes) == (GGUF_REPO, ("Tiny-1B-Q8_0.gguf",), 804) and find_model(
        "x.gguf"
    ) is None
    assert not gguf_hub.requests("/resolve/") and not gguf_hub.requests("/cdn/")


def test_what_is_neither_here_nor_there(gguf_hub):
    with pytest.raises(HubError, match="no such repository.*nor is there a file models/base.gguff here"):
        fetch_model("models/base.gguff")
    with pytest.raises(HubError) as caught:
        fetch_model("hf://maker/none")
    assert "here" not in str(caught.value)


def test_a_misspelt_folder_that_reads_like_a_name_on_the_hub(gguf_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters" / "pirate").mkdir(parents=True)
    with pytest.raises(HubError, match=r"nor is there a folder adapters/pirat here: did you mean adapters/pirate\?"):
        fetch("adapters/pirat")


MODELS = "maker/Real-GGUF"


@pytest.fixture
def models(local_hub, tmp_path, monkeypatch):
    """A Hub with a base that merges, an adapter GGUF for it, and copies of both in the current folder."""
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    local_hub.repos[MODELS] = {"real-Q4_0.gguf": base.read_bytes(), "lora/fine.gguf": adapter.read_bytes()}
    monkeypatch.chdir(tmp_path)
    return local_hub


BASE_REFERENCES = [
    f"{MODELS}:Q4_0",
    f"hf://{MODELS}/real-Q4_0.gguf",
    f"https://huggingface.co/{MODELS}/blob/main/real-Q4_0.gguf",
]
ADAPTER = f"hf://{MODELS}/lora/fine.gguf"


@pytest.mark.parametrize("base", BASE_REFERENCES)
def test_a_merge_with_both_on_the_hub_is_the_merge_with_both_here(models, capsys, base):
    assert run(capsys, "merge", "base.gguf", "adapter.gguf", "-o", "here.gguf")[0] == 0
    code, _, err = run(capsys, "merge", base, ADAPTER, "-o", "there.gguf")
    assert code == 0, err
    here, there = (GgufReader(path) for path in ("here.gguf", "there.gguf"))
    with here, there:
        assert all(
            here.read(here.tensors[name]).tobytes() == there.read(there.tensors[name]).tobytes()
            for name in here.tensors
        )
        assert there.get("lora_gguf.adapter.names") == ["fine"]


def test_verify_and_extract_and_convert_take_references(models, capsys, tmp_path):
    run(capsys, "merge", "base.gguf", f"{ADAPTER}", "-o", "merged.gguf")
    models.repos[MODELS]["merged-Q4_0.gguf"] = Path("merged.gguf").read_bytes()
    merged = f"hf://{MODELS}/merged-Q4_0.gguf"
    code, out, err = run(capsys, "verify", merged, "-m", BASE_REFERENCES[1], "--lora", f"{ADAPTER}:1.0", "--json")
    assert code == 0 and json.loads(out)["ok"], err
    code, _, err = run(capsys, "extract", BASE_REFERENCES[1], merged, "--rank", "4", "-o", "lora.gguf")
    assert code == 0, err
    code, _, err = run(capsys, "convert", tmp_path, "--base", f"hf://{MODELS}/none.gguf")
    assert code == HubError.exit_code and "no file none.gguf" in err


def test_an_adapter_gguf_is_copied_where_one_wants_it(models, tmp_path):
    path = fetch(ADAPTER, output=tmp_path / "loras")
    assert path == tmp_path / "loras" / "fine.gguf" and path.read_bytes() == models.repos[MODELS]["lora/fine.gguf"]


@pytest.mark.parametrize(
    "source",
    [
        "o/fine",
        "o/fine@v1",
        "hf://o/fine@feature/x",
        "hf://o/n/fine.gguf",
        "a/fine/",
        "/c/models--o--fine/snapshots/" + "0" * 40,
    ],
)
def test_the_name_of_an_adapter(source):
    assert adapter_name(source) == "fine"
