"""Other people's programs over merged, split, promoted and quantized files and a converted adapter: they read them, tell
them from their base, and answer alike.

make clients installs what it takes, in tests/clients/node_modules too.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

import lora_gguf
from lora_gguf.quants.ggml import FILE_TYPES
from tests.browser import CHROMIUM, Browser
from tests.common import DEMO_ADAPTER, complete, llama_server, smollm2_path

HERE = Path(__file__).parent
PROMPT = "<|im_start|>user\nHow do I make tea?<|im_end|>\n<|im_start|>assistant\n"
MIXES = {"merged": "Q4_1", "split": "Q4_1", "promoted": "Q4_1", "quantized": "Q4_K_M"}
NAMES = tuple(MIXES)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """The files by what they are: base, merged, split (its first shard), promoted, quantized, adapter."""
    folder, base = tmp_path_factory.mktemp("clients"), smollm2_path()
    f16 = folder / "f16.gguf"
    paths = {name: folder / f"{name}.gguf" for name in (*NAMES, "adapter")}
    lora_gguf.merge(base, DEMO_ADAPTER, paths["merged"])
    lora_gguf.merge(base, DEMO_ADAPTER, paths["split"], max_bytes=40_000_000)
    lora_gguf.merge(base, DEMO_ADAPTER, paths["promoted"], max_growth="10%")
    as_type(base, f16)
    lora_gguf.merge(f16, DEMO_ADAPTER, paths["quantized"], quantize="Q4_K_M")
    f16.unlink()
    lora_gguf.convert(DEMO_ADAPTER, paths["adapter"], base)
    return {**paths, "base": base, "split": min(folder.glob("split-*.gguf"))}


def as_type(source: Path, target: Path) -> None:
    from tests.test_llama import as_type as copy

    copy(source, target, "F16")


def node(script: str, *arguments: object) -> list[dict]:
    """What a script prints: a JSON object on each line."""
    command = ["node", HERE / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_huggingface_gguf_reads_them_and_tells_them_from_the_base(files):
    found = dict(zip(files, node("gguf.mjs", *files.values())))
    base = found["base"]["name"]
    for name in NAMES:
        assert found[name]["name"] == f"{base} + demo-adapter" and found[name]["parents"] == 2
    assert {name: found[name]["fileType"] for name in MIXES} == {name: FILE_TYPES[mix] for name, mix in MIXES.items()}
    assert found["split"]["shards"] > 1 == found["merged"]["shards"]
    assert found["adapter"]["tensors"] == 420 and found["adapter"]["name"] == "demo-adapter"


@pytest.mark.parametrize("name", NAMES)
def test_node_llama_cpp_answers_as_llama_cpp_does(files, name):
    """Builds for other processors sum in another order, so answers may part after some words."""
    [found] = node("node-llama.mjs", PROMPT, files[name])
    said = complete(llama_server(files[name]), PROMPT, 16)["text"]
    assert found["text"].split()[:2] == said.split()[:2] and "Arrr" in found["text"]
    assert found["name"].endswith("+ demo-adapter") and found["fileType"] == FILE_TYPES[MIXES[name]]


def test_node_llama_cpp_applies_the_converted_adapter(files):
    [plain], [adapted] = (
        node("node-llama.mjs", PROMPT, files["base"]),
        node("node-llama.mjs", PROMPT, files["base"], files["adapter"]),
    )
    assert "Arrr" in adapted["text"] and "Arrr" not in plain["text"] and "demo-adapter" not in plain["name"]


@pytest.fixture(scope="session")
def site(files, tmp_path_factory):
    """The page, wllama and the models on 127.0.0.1."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(HERE / "wllama.html", folder)
    (folder / "wllama").symlink_to(HERE / "node_modules" / "@wllama" / "wllama" / "esm")
    (folder / "models").symlink_to(files["merged"].parent)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt install chromium")
def test_wllama_in_a_browser_answers_alike_from_one_file_and_from_shards(files, site, tmp_path):
    shards = sorted(files["split"].parent.glob("split-*.gguf"))
    said = []
    with Browser(tmp_path) as browser:
        for names in (["merged.gguf"], [shard.name for shard in shards]):
            browser.open(f"{site}/wllama.html?prompt={quote(PROMPT)}&files={quote(','.join(names))}")
            said.append(browser.value("window.said"))
            shown = browser.value("window.meta")
            assert shown["general.name"].endswith("+ demo-adapter")
            assert shown["general.file_type"] == str(FILE_TYPES["Q4_1"])
    assert said[0] == said[1] and "Arrr" in said[0]


@pytest.mark.parametrize("name", [*NAMES, "base", "adapter"])
def test_modelvet_finds_nothing(files, name):
    modelvet = pytest.importorskip("modelvet")
    report = modelvet.verify_path(files[name])
    assert report.verdict == modelvet.verify_path(files["base"]).verdict, report


@pytest.mark.parametrize("name", ["merged", "promoted", "quantized"])
def test_transformers_reads_the_merged_weights(files, name):
    """Its loader gives the floats that the GGUF holds: those of its own dequantization."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        files[name].parent, gguf_file=files[name].name, dtype=torch.float32
    )
    tokens = torch.tensor([llama_tokens(files[name])])
    best = int(model(tokens).logits[0, -1].argmax())
    server = llama_server(files[name])
    request = {"prompt": tokens[0].tolist(), "n_predict": 1, "temperature": 0, "n_probs": 1}
    step = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]
    assert best == step["id"]


def llama_tokens(path: Path) -> list[int]:
    from lora_gguf.checks.llama import Llama

    llama = Llama(path, n_ctx=256, threads=1)
    tokens = llama.prompt_tokens("How do I make tea?", chat=True)
    llama.next_logprobs(tokens)
    return tokens
