"""``init-pipeline``: its Makefile, run by make against a Hub of our own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from lora_gguf.errors import FileError
from lora_gguf.files.gguf_reader import GgufReader
from tests import tiny
from tests.common import ROOT
from tests.test_cli import run
from tests.test_quantizations import quantized

BASE = "lab/Tiny"
QUANTS = ("F32", "BF16")
ADAPTER = tiny.TINY / "llama" / "adapter"
NAMES = ("alice--pirate", "own")
MERGED = sorted(f"{name}--{quant}" for name in NAMES for quant in QUANTS)
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


def adapter_files() -> dict[str, bytes]:
    config = json.loads((ADAPTER / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    weights = (ADAPTER / "adapter_model.safetensors").read_bytes()
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


@pytest.fixture
def folder(local_hub, tmp_path, capsys):
    """A pipeline of one adapter on the Hub and one here, and a base on the Hub in two files."""
    base = tiny.base_gguf(tmp_path, "llama").read_bytes()
    local_hub.repos |= {"alice/pirate": adapter_files(), BASE: {"config.json": b"{}"}}
    quantized(local_hub, "many/Tiny-GGUF", BASE, 10, [f"tiny-{quant}.gguf" for quant in QUANTS])
    local_hub.repos["many/Tiny-GGUF"] = {f"tiny-{quant}.gguf": base for quant in QUANTS}
    folder = tmp_path / "pipeline"
    assert run(capsys, "init-pipeline", folder)[0] == 0
    own = folder / "adapters" / "own"
    own.mkdir(parents=True)
    for name, content in adapter_files().items():
        (own / name).write_bytes(content)
    filled_in(folder, ADAPTERS="alice/pirate own", QUANTS=" ".join(QUANTS), MERGE_FLAGS="--seed 3 --threads 1")
    return folder


def filled_in(folder, **values: str) -> None:
    lines = (folder / "Makefile").read_text().splitlines()
    keys = [line.split(" =")[0] for line in lines]
    for key, value in values.items():
        lines[keys.index(key)] = f"{key} = {value}"
    (folder / "Makefile").write_text("\n".join(lines) + "\n")


def make(hub, folder, *arguments) -> subprocess.Popen:
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(folder.parent / "cache"),
        "PYTHONPATH": str(ROOT),
        "LORA_GGUF": f"{sys.executable} -m lora_gguf",
    }
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | settings
    command = ["make", "-C", str(folder), *arguments]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def made(hub, folder, *arguments) -> str:
    process = make(hub, folder, *arguments)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def state(folder) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_it_runs_once_and_again_only_for_what_changed(local_hub, folder):
    plan = made(local_hub, folder, "-n")
    assert plan.count("merge 'models/") == len(MERGED) and plan.count("fetch 'alice/pirate' -o") == 1
    assert "fetch 'alice/pirate' --quant 'F32' -o 'models/F32.gguf'" in plan and not list(folder.glob("merged/*"))
    made(local_hub, folder, "-j2")
    assert sorted(path.stem for path in folder.glob("merged/*.gguf")) == MERGED
    assert sorted(path.stem for path in folder.glob("merged/*.Modelfile")) == MERGED
    with GgufReader(folder / "merged" / f"{NAMES[0]}--F32.gguf") as reader:
        assert reader.get("lora_gguf.adapter.names") == [NAMES[0]] and reader.get("lora_gguf.seed") == 3
    first = state(folder)
    assert "Nothing to be done" in made(local_hub, folder, "-j2") and state(folder) == first
    os.utime(folder / "adapters" / "own" / "adapter_model.safetensors")
    made(local_hub, folder)
    changed = {name for name, what in state(folder).items() if what[0] != first[name][0]} - {
        "adapters/own/adapter_model.safetensors"
    }
    assert changed == {f"merged/own--{quant}.{end}" for quant in QUANTS for end in ("gguf", "Modelfile")}


READ = ["adapter_model.bin", "adapter_model-00002-of-00002.safetensors", "adapter_model.bin.index.json",
        "tokenizer.json", "chat_template.jinja", "tokenizer.model"]  # fmt: skip


def test_every_file_that_a_merge_reads_is_a_dependency(tmp_path, capsys):
    folder = tmp_path / "pipeline"
    assert run(capsys, "init-pipeline", folder)[0] == 0
    filled_in(folder, ADAPTERS="own", QUANTS="Q8_0")
    outputs = ["merged/own--Q8_0.gguf", "merged/own--Q8_0.Modelfile", "adapters/own--Q8_0.gguf"]
    for number, name in enumerate(["models/Q8_0.gguf", "adapters/own/adapter_config.json", *outputs]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        os.utime(folder / name, (1000 + number, 1000 + number))
    targets = ["make", "-C", str(folder), "-q", "merged-files", "adapter-files"]
    assert subprocess.run(targets, capture_output=True).returncode == 0
    for name in READ:
        path = folder / "adapters" / "own" / name
        path.touch()
        assert subprocess.run(targets, capture_output=True).returncode == 1, name
        path.unlink()
    (folder / "adapters" / "own" / "checkpoint-1").mkdir()
    assert subprocess.run(targets, capture_output=True).returncode == 0


def test_killed_it_leaves_nothing_half_done_and_goes_on(local_hub, folder):
    process = make(local_hub, folder, "-j2")
    deadline = time.monotonic() + 60
    while not list(folder.glob("merged/*.gguf")) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("merged/*.gguf")}
    assert 0 < len(done) < len(MERGED)
    for name in done:
        with GgufReader(folder / "merged" / name) as reader:
            assert reader.get("lora_gguf.seed") == 3
    made(local_hub, folder)
    assert sorted(path.stem for path in folder.glob("merged/*.gguf")) == MERGED
    assert sorted(path.stem for path in folder.glob("merged/*.Modelfile")) == MERGED
    assert not list(folder.rglob("*.lora-gguf-tmp"))


def test_one_target_that_no_list_names(local_hub, folder):
    local_hub.repos["carol/poet"] = adapter_files()
    made(local_hub, folder, "merged/carol--poet--F32.gguf", "QUANTS=F32")
    assert {path.name for path in folder.glob("merged/*.gguf")} == {"carol--poet--F32.gguf"}
    assert not (folder / "models" / "BF16.gguf").exists()


def test_what_else_it_would_do(local_hub, folder):
    out = made(local_hub, folder, "-n", "ollama-models", "adapter-files", "QUANTS=F32")
    assert "ollama create 'own--F32' -f 'merged/own--F32.Modelfile'" in out
    assert "convert 'adapters/own' --base 'models/F32.gguf' -o 'adapters/own--F32.gguf'" in out


def test_nothing_of_the_user_s_is_overwritten(tmp_path, capsys):
    (tmp_path / "Makefile").write_text("mine")
    code, _, err = run(capsys, "init-pipeline", tmp_path)
    assert code == FileError.exit_code and "--force" in err and os.listdir(tmp_path) == ["Makefile"]
    assert (
        run(capsys, "init-pipeline", tmp_path, "--force")[0] == 0
        and "include pipeline.mk" in (tmp_path / "Makefile").read_text()
    )


def test_a_fresh_pipeline_does_nothing(tmp_path, capsys):
    code, out, err = run(capsys, "init-pipeline", tmp_path / "new" / "one")
    assert code == 0 and out.split() == [str(tmp_path / "new" / "one" / name) for name in ("pipeline.mk", "Makefile")]
    assert (
        subprocess.run(["make", "-C", tmp_path / "new" / "one"], capture_output=True).returncode == 0
        and "ADAPTERS" in err
    )
