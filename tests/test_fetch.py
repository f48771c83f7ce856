from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from lora_gguf.errors import FileError, HubError, MalformedError, UsageError
from lora_gguf.hub.downloads import fetch_adapter as fetch
from lora_gguf.hub.references import adapter_reference
from tests.hub import TOKEN
from tests.hub_faults import (
    BLOB,
    CONFIG,
    FILES,
    POINTER,
    REPO,
    WEIGHTS,
    answer,
    cache_of,
    command_line,
    content,
    stall,
    wrong,
)


@pytest.fixture
def hub(local_hub):
    local_hub.repos[REPO] = dict(FILES)
    return local_hub


EVIL_NAMES = [
    "../../evil/adapter_config.json", "/tmp/adapter_config.json", "..\\adapter_config.json", "adapter_config.json\0", "a" * 300,
    "ADAPTER_CONFIG.JSON", "C:adapter_config.json", "\x1b[2Jadapter_config.json", "./adapter_config.json", "", "//adapter_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_file_names_from_a_repository_never_leave_the_folder(hub, tmp_path, name):
    hub.listing_changes["siblings"] = [
        hub.sibling(n, b"evil") for n in (name, name.replace("config.json", "model.safetensors"))
    ]
    with pytest.raises(HubError) as caught:
        fetch(REPO, output=tmp_path / "out")
    assert str(caught.value).isprintable()
    hub.listing_changes["siblings"] += [hub.sibling(*item) for item in FILES.items()]
    fetch(REPO, output=tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]
    assert b"evil" not in cache_of(tmp_path).values()


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.bin", "a\\b.bin", ".bin", "sub/x.bin", "x.py", "a\x1b.bin", "", "..", 5, None]
)
def test_shard_names_of_an_index_never_leave_the_folder(hub, shard):
    files = hub.repos[REPO]
    del files["adapter_model.safetensors"]
    files["adapter_model.safetensors.index.json"] = json.dumps({"weight_map": {"a": shard}}).encode()
    with pytest.raises(MalformedError) as caught:
        fetch(REPO)
    assert str(caught.value).isprintable()


def test_sharded_and_pickled_weights_and_tokenizer_files(hub):
    files = hub.repos[REPO]
    del files["adapter_model.safetensors"]
    files.update(
        {"adapter_model.bin": b"PK\x03\x04", "tokenizer.json": b"{}", "added_tokens.json": b"{}", "tokenizer.py": b""}
    )
    assert {p.name for p in fetch(REPO).iterdir()} == {
        "adapter_config.json",
        "adapter_model.bin",
        "tokenizer.json",
        "added_tokens.json",
    }
    del files["adapter_model.bin"]
    index = {
        "weight_map": {
            "x": "adapter_model-2.safetensors",
            "y": "adapter_model-1.safetensors",
            "z": "adapter_model-1.safetensors",
        }
    }
    files["adapter_model.safetensors.index.json"] = json.dumps(index).encode()
    files["adapter_model-1.safetensors"] = b"one"
    with pytest.raises(HubError, match="adapter_model-2.safetensors, which is not there"):
        fetch(REPO)
    files["adapter_model-2.safetensors"] = b"two"
    assert {"adapter_model-1.safetensors", "adapter_model-2.safetensors"} <= {p.name for p in fetch(REPO).iterdir()}


MISSING = {
    "no weights": ({"adapter_config.json": CONFIG}, "but no weights"),
    "other folders": (
        {"last/adapter_config.json": CONFIG, "best/adapter_config.json": CONFIG},
        "in best, last: choose one with --subfolder",
    ),
    "GGUF": ({"x-q4.gguf": b""}, "GGUF files: name one, as hf://OWNER/NAME/x-q4.gguf"),
    "whole model": ({"config.json": b"{}", "model.safetensors": b""}, "a whole model"),
    "something else": ({"README.md": b""}, "not a PEFT adapter"),
    "nothing": ({}, "not a PEFT adapter"),
    "an LFS pointer in place of weights": ({**FILES, "adapter_model.safetensors": POINTER}, "a Git LFS pointer"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_repository_without_an_adapter_is_explained(hub, monkeypatch, name):
    hub.repos[REPO], part = MISSING[name]
    monkeypatch.setattr(hub, "lfs_suffixes", ())
    with pytest.raises(HubError, match=part):
        fetch(REPO)


def test_subfolders(hub):
    hub.repos[REPO] = {f"runs/last/{name}": body for name, body in FILES.items()}
    by_option, by_address = (
        fetch(REPO, subfolder="runs/last/"),
        fetch(f"https://huggingface.co/{REPO}/tree/main/runs/last"),
    )
    assert by_option == by_address and (by_option / "adapter_model.safetensors").read_bytes() == WEIGHTS
    for subfolder in ("..", "runs/../..", "a\\..\\b", "a//b", "x\n"):
        with pytest.raises(UsageError, match="within the repository"):
            fetch(REPO, subfolder=subfolder)


def test_output_copies_once_and_never_replaces_another_file(hub, tmp_path):
    out = tmp_path / "deep" / "out"
    assert fetch(REPO, output=out) == fetch(REPO, output=out) == out
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        n: FILES[n] for n in ("adapter_config.json", "adapter_model.safetensors")
    }
    (out / "adapter_config.json").write_bytes(b"mine")
    with pytest.raises(FileError, match="exists already"):
        fetch(REPO, output=out)
    assert (out / "adapter_config.json").read_bytes() == b"mine"


def test_a_path_that_exists_wins(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO / "sub").mkdir(parents=True)
    assert fetch(REPO) == Path(REPO) and fetch(REPO, subfolder="sub") == Path(REPO) / "sub"
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    assert fetch("adapter.gguf") == Path("adapter.gguf") and fetch(tmp_path / REPO) == tmp_path / REPO
    assert not hub.log
    for call, error in (
        (lambda: fetch(REPO, revision="main"), UsageError),
        (lambda: fetch(REPO, output="o"), UsageError),
        (lambda: fetch(REPO, subfolder="none"), FileError),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize(
    "source", ["./a/b", "../a/b", "/a/b", "~/a", "name", "a/b/c", "a\\b", "", "a/", "x/y\0", "~a/b", "a//b", "@/b@c/d"]
)
def test_what_cannot_be_a_repository_is_a_missing_path(hub, source):
    with pytest.raises((FileError, HubError)) as caught:
        fetch(source)
    assert not hub.log and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "source", ["so..me/repo", "a b/c", "é/x", "a/b@../x", "a/b@x\\y", "a/b@.", f"a/{'b' * 96}", "a/b@x\x1b[2J"]
)
def test_names_that_no_hub_has_are_refused_before_any_request(hub, source):
    with pytest.raises((HubError, FileError)) as caught:
        fetch(source)
    assert not hub.log and str(caught.value).isprintable()


def test_references():
    commit = "https://huggingface.co/o/n/tree/v1"
    assert adapter_reference("o/n", None, None) == ("o/n", None, "")
    assert adapter_reference("o/n@refs/pr/1", None, "/a/") == ("o/n", "refs/pr/1", "a")
    assert adapter_reference("hf://o/n@v1", None, None) == adapter_reference(commit, "v1", None) == ("o/n", "v1", "")
    with pytest.raises(UsageError, match="give one"):
        adapter_reference("o/n@v1", "v2", None)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_run_ended_by_a_signal_leaves_no_partial_file_once_the_next_one_is_done(hub, tmp_path, sent):
    hub.fault(BLOB, stall, 1)
    process = command_line(hub, tmp_path, "fetch", REPO)
    deadline = time.monotonic() + 20
    while not hub.requests(BLOB) and time.monotonic() < deadline:
        hub.released.wait(0.02)
    process.send_signal(sent)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert output == b"" and errors.count(b"\n") == (sent != signal.SIGKILL) and TOKEN.encode() not in errors
    orphans = [path for path in cache_of(tmp_path) if path.endswith(".incomplete")]
    assert bool(orphans) is (sent == signal.SIGKILL)
    fetch(REPO)
    assert not [path for path in cache_of(tmp_path) if path.endswith(".incomplete")]


def test_the_command_prints_the_folder_and_nothing_else(hub, tmp_path):
    process = command_line(hub, tmp_path, "fetch", f"{REPO}@v1", "-o", str(tmp_path / "out"))
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output.decode(), errors) == (0, f"{tmp_path / 'out'}\n", b"")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written


@pytest.mark.parametrize("code", [8, 9])
def test_the_command_ends_with_one_line_and_its_code(hub, tmp_path, code):
    hub.fault(
        BLOB,
        *(
            (answer(403, "GatedRepo", X_Error_Message=f"token {TOKEN}"), 9)
            if code == 8
            else (content(wrong(WEIGHTS)), 9)
        ),
    )
    process = command_line(hub, tmp_path, "fetch", REPO)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (code, b"")
    assert (
        errors.startswith(f"lora-gguf: error: {REPO}: ".encode())
        and errors.count(b"\n") == 1
        and TOKEN.encode() not in errors
    )
