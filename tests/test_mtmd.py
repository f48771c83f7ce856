"""llama.cpp's own eyes, mtmd: with a merged mmproj it answers to an image as with PEFT's merge converted."""

from __future__ import annotations

import base64
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_gguf.commands.merge import merge
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import key_value
from lora_gguf.merging.options import Writing
from tests import tiny
from tests.test_towers import FOLDER

# those that answer beside a model of another family: others want its rotary embedding, its width, or its tokens
NAMES = ["gemma3", "glm4v", "idefics3", "internvl", "llama4", "llava", "qwen2vl", "smolvlm"]
MARKS = ["<fake_token_around_image>", "<global-img>", "\n\n", "\n"]  # of images, which mtmd looks up


def vocabulary(n: int, architecture: str) -> list[bytes]:
    """A vocabulary that any text can be written in: its bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *MARKS]
    words += [f"t{i};" for i in range(n - len(words))]
    types = [2, 3, 3, *[6] * 256, 3, 3, *[1] * (n - 261)]
    special = {"bos": 1, "eos": 2, "unknown": 0}
    return [
        key_value("tokenizer.ggml.model", "llama", "str"),
        key_value("tokenizer.ggml.tokens", words, "str"),
        key_value("tokenizer.ggml.token_type", types, "i32"),
        key_value("tokenizer.ggml.scores", [0.0] * n, "f32"),
        *(key_value(f"tokenizer.ggml.{what}_token_id", i, "u32") for what, i in special.items()),
    ]


def png(side: int) -> bytes:
    """A picture of random pixels."""
    pixels = np.random.default_rng(5).integers(0, 256, (side, side, 3), dtype=np.uint8)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels)),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def answer(model: Path, mmproj: Path) -> dict[int, float]:
    """The likeliest tokens after an image, with their log-probabilities."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path, params.n_ctx, params.n_parallel = str(model), str(mmproj), 256, 1
    params.warmup, params.mmproj_use_gpu, params.cpuparams.n_threads = False, False, 1
    url = "data:image/png;base64," + base64.b64encode(png(16)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a"}]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0}
    found = xllamacpp.Server(params).handle_chat_completions(request | {"logprobs": True, "top_logprobs": 5})
    return {top["id"]: top["logprob"] for top in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def reference(name: str, path: Path) -> Path:
    """The mmproj with the tensors that llama.cpp's converter made of PEFT's merge."""
    shutil.copy(FOLDER / name / "mmproj.gguf", path)
    with GgufReader(path) as reader, open(path, "r+b") as file:
        for tensor, values in load_file(FOLDER / name / "merged.safetensors").items():
            info = reader.tensors[tensor]
            file.seek(reader.data_position + info.offset)
            file.write(values.astype("<f4" if info.type.name == "F32" else "<f2").tobytes())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "vocabulary", vocabulary)
        return tiny.base_gguf(tmp_path_factory.mktemp("mtmd"), "llama")


@pytest.mark.parametrize("name", NAMES)
def test_mtmd_sees_with_a_merged_mmproj_as_with_pefts_merge(tmp_path, model, name):
    base, merged = FOLDER / name / "mmproj.gguf", tmp_path / "merged.gguf"
    merge(base, [(FOLDER / name / "adapter", 1.0)], Writing(merged))
    found, wanted, before = (answer(model, path) for path in (merged, reference(name, tmp_path / "peft.gguf"), base))
    assert found.keys() == wanted.keys()
    off = max(abs(found[i] - wanted[i]) for i in wanted)
    moved = max(abs(before.get(i, -99) - wanted[i]) for i in wanted)
    assert off < 2e-3 and moved > max(0.01, 20 * off), (off, moved)
