"""Mixes against llama.cpp itself: the types that its quantizer's dry run names for models of many shapes, and its
bytes.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lora_gguf.errors import UnsupportedError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import raw_key_values
from lora_gguf.merging.options import Policy
from lora_gguf.quants.ggml import BY_NAME, FILE_TYPES
from lora_gguf.quants.mixes import (
    MIXES,
    Model,
    fallback_type,
    file_type_of,
    is_quantized,
    mix_types,
    model_of,
    requires_importance,
)
from lora_gguf.quants.table import CODECS
from tests.calls import merge
from tests.common import ROOT, gemma3_path, pack_gguf, pack_kv, smollm2_path, text_kv, u32_kv
from tests.test_verify import some_pairs, write_adapter, write_base

# the package's llama.cpp is of a release that knows neither of these two
ASKED = [(mix, False) for mix in MIXES if mix not in ("Q2_0", "NVFP4")]
ASKED += [(mix, True) for mix in ("Q4_0", "Q5_0", "Q2_K_S", "Q4_K_M", "IQ2_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS")]
ASKED_OF_70B = ("Q2_K", "Q3_K_S", "Q4_K_M", "Q6_K", "IQ2_M", "IQ3_M")
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FUSED = ("attn_qkv", "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
HEADED = ("token_embd", "output", "output_norm")
TIED = ("token_embd", "output_norm")

# architecture, tensors outside the blocks, tensors of a block, hyperparameters that differ from DEFAULTS, columns
SHAPES = {
    "llama-2-layers": ("llama", HEADED, ATTENTION + FFN, {"block_count": 2}, 256),
    "llama-12-gqa-1": ("llama", HEADED, ATTENTION + FFN, {"block_count": 12}, 256),
    "llama-16-gqa-4": ("llama", HEADED, ATTENTION + FFN, {"block_count": 16, "attention.head_count_kv": 2}, 256),
    "llama-32-gqa-8": ("llama", HEADED, ATTENTION + FFN, {"block_count": 32, "attention.head_count_kv": 1}, 256),
    "llama-70b": ("llama", HEADED, ATTENTION + FFN, {"block_count": 80, "attention.head_count_kv": 1}, 256),
    "llama-65b": ("llama", HEADED, ATTENTION + FFN, {"block_count": 80}, 256),
    "llama-odd-rows": ("llama", HEADED, ATTENTION + FFN, {"block_count": 9}, 96),
    "llama-tied-odd": ("llama", TIED, ATTENTION + FFN, {"block_count": 9}, 160),
    "mixtral": ("llama", HEADED, ATTENTION + EXPERTS, {"block_count": 32, "expert_count": 8, "attention.head_count_kv": 2}, 256),
    "mixtral-split": (
        "llama", HEADED, ATTENTION + ("ffn_gate_inp", *(f"{kind}.{i}" for kind in FFN for i in range(8))),
        {"block_count": 20, "expert_count": 8, "attention.head_count_kv": 2}, 256,
    ),
    "four-experts": ("llama", TIED, ATTENTION + EXPERTS, {"block_count": 17, "expert_count": 4}, 256),
    "qwen2": ("qwen2", HEADED, ATTENTION + FFN, {"block_count": 28, "attention.head_count_kv": 2}, 256),
    "qwen2-70b": ("qwen2", HEADED, ATTENTION + FFN, {"block_count": 80, "attention.head_count_kv": 1}, 256),
    "qwen3moe": ("qwen3moe", HEADED, ATTENTION + EXPERTS + ("attn_q_norm",), {"block_count": 24, "expert_count": 16}, 256),
    "gemma2": ("gemma2", TIED, ATTENTION + FFN + ("post_attention_norm",), {"block_count": 26, "attention.head_count_kv": 4}, 256),
    "gemma3": ("gemma3", TIED, ATTENTION + FFN + ("post_ffw_norm",), {"block_count": 18, "attention.head_count_kv": 1}, 640),
    "falcon": ("falcon", HEADED, FUSED + ("ffn_up", "ffn_down"), {"block_count": 32, "attention.head_count_kv": 1}, 256),
    "falcon-tied": ("falcon", TIED, FUSED + ("ffn_up", "ffn_down"), {"block_count": 40}, 256),
    "gpt2": ("gpt2", (*HEADED, "position_embd"), FUSED + ("ffn_up", "ffn_down"), {"block_count": 12}, 256),
    "phi3": ("phi3", HEADED, FUSED + ("ffn_up", "ffn_down"), {"block_count": 40, "attention.head_count_kv": 2}, 256),
    "olmo-70b": ("olmo", HEADED, ATTENTION + FFN, {"block_count": 80}, 256),
    "deepseek2": (
        "deepseek2", HEADED, ("attn_q", "attn_kv_a_mqa", "attn_kv_b", "attn_output") + EXPERTS + ("ffn_down_shexp", "ffn_up_shexp"),
        {"block_count": 27, "expert_count": 64, "leading_dense_block_count": 1}, 256,
    ),
    "names": (
        "llama", (*HEADED, "per_layer_token_embd", "per_layer_model_proj", "v.position_embd", "v.patch_embd", "altup_proj"),
        ("ssm_conv1d", "ssm_in", "shortconv.conv", "shortconv.in_proj", "laurel_l", "attn_rel_b", "attn_kv_b", "attn_sinks",
         "ffn_gate_inp", "ffn_gate_inp_shexp", "ffn_gate_up_exps", *(f"time_mix_{kind}" for kind in (
             "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "lerp_fused", "key", "ln"))),
        {"block_count": 3, "expert_count": 2}, 256,
    ),
    "bert": ("bert", ("token_embd", "token_types", "position_embd"), ATTENTION + ("ffn_up", "ffn_down"), {"block_count": 12}, 256),
}  # fmt: skip
DEFAULTS = {
    "context_length": 64, "embedding_length": 256, "feed_forward_length": 256, "attention.head_count": 8, "vocab_size": 8,
    "attention.head_count_kv": 8, "expert_feed_forward_length": 64, "rope.dimension_count": 32,
    "attention.sliding_window": 32, "attention.kv_lora_rank": 32, "attention.q_lora_rank": 32, "expert_shared_count": 1,
    "pooling_type": 1,
}  # fmt: skip
VECTORS = ("output_norm", "attn_q_norm", "post_attention_norm", "post_ffw_norm")


def tensors_of(outside, block, hparams, cols):
    """(name, shape) of each tensor; two rows are enough for a matrix."""
    blocks = [f"blk.{i}.{kind}" for i in range(hparams["block_count"]) for kind in ("attn_norm", *block)]
    for name in (*outside, *blocks):
        shape = (hparams["expert_count"], 2, cols) if name.endswith("_exps") else (2, cols)
        yield f"{name}.weight", (cols,) if name.endswith(VECTORS) or "norm" in name else shape
    yield "blk.0.attn_output.bias", (cols,)


def write_shape(path, architecture, outside, block, hparams, cols):
    hparams = DEFAULTS | hparams | {"expert_used_count": 2 if "expert_count" in hparams else 0}
    rms = struct.pack("<f", 1e-5)
    key_values = [text_kv("general.architecture", architecture)]
    key_values += [u32_kv(f"{architecture}.{key}", value) for key, value in hparams.items()]
    key_values += [pack_kv(f"{architecture}.attention.layer_norm_{kind}epsilon", 6, rms) for kind in ("", "rms_")]
    tensors = [
        (name, "F32", shape, bytes(4 * int(np.prod(shape))))
        for name, shape in tensors_of(outside, block, hparams, cols)
    ]
    path.write_bytes(pack_gguf(key_values, tensors))


def chosen(stderr: str) -> dict[str, str]:
    """Name -> type, of one dry run's log."""
    types = {}
    for name, before, after in re.findall(
        r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), size = .*?(?: \((\w+)\))?$", stderr, re.M
    ):
        types[name] = (after or before).upper()
    return types


def llama_types(jobs: list[tuple[str, str, bool]]) -> list[dict[str, str]]:
    """What llama.cpp chooses, for each (path, mix, with importance matrix); in other processes, for it may abort."""
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(_llama_types, (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :])), [])


def _llama_types(jobs) -> list[dict[str, str]]:
    run = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(jobs), capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [{} if "=== refused" in part else chosen(part) for part in run.stderr.split("=== job\n")[1:]]


def _with_imatrix(params) -> list:
    """Point ``params`` at an importance matrix; the binding has no setter, so into the C structure that it wraps.

    llama.h: i32 nthread, i32 ftype, two more i32, six bools, then the pointer, to (name, data, size) up to a null name.
    """
    size = type(params).__basicsize__
    memory = (ctypes.c_char * size).from_address(id(params))
    start = memory.raw.index(struct.pack("<ii", params.nthread, params.ftype), 16)
    name, data = ctypes.create_string_buffer(b"none"), (ctypes.c_float * 1)(1.0)
    rows = (ctypes.c_size_t * 6)(ctypes.addressof(name), ctypes.addressof(data), 1, 0, 0, 0)
    struct.pack_into("<Q", memory, start + 24, ctypes.addressof(rows))
    return [name, data, rows]


def _quantize_jobs() -> None:
    from cyllama.llama import llama_cpp

    for path, mix, has_imatrix in json.load(sys.stdin):
        print("=== job", file=sys.stderr, flush=True)
        params = llama_cpp.LlamaModelQuantizeParams()
        params.nthread, params.ftype, params.dry_run = 7, FILE_TYPES[mix], True
        alive = _with_imatrix(params) if has_imatrix else None
        try:
            llama_cpp.model_quantize(path, "", params)
        except RuntimeError:
            print("=== refused", file=sys.stderr, flush=True)
        del alive


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """shape -> (path, {(mix, has_imatrix): llama.cpp's types})."""
    folder = tmp_path_factory.mktemp("shapes")
    cases, jobs = {}, []
    for shape, (architecture, *rest) in SHAPES.items():
        cases[shape] = folder / f"{shape}.gguf"
        write_shape(cases[shape], architecture, *rest)
        many_layers = rest[-2]["block_count"] == 80
        jobs += [(str(cases[shape]), *question) for question in ASKED if not many_layers or question[0] in ASKED_OF_70B]
    answers = {}
    for (path, mix, has_imatrix), types in zip(jobs, llama_types(jobs)):
        answers.setdefault(path, {})[mix, has_imatrix] = types
    return {shape: (path, answers[str(path)]) for shape, path in cases.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_types_are_llama_cpps(asked, shape):
    path, answers = asked[shape]
    with GgufReader(path) as base:
        for (mix, has_imatrix), expected in answers.items():
            found = mix_types(mix, model_of(base), base.tensors.values(), has_imatrix=has_imatrix)
            if not expected:
                assert mix == "Q1_0" and base.tensors["token_embd.weight"].n_cols % 128
                continue
            differing = {
                name: (type.name, expected[name]) for name, type in found.items() if expected[name] != type.name.upper()
            }
            assert len(expected) == len(base.tensors) and not differing, (mix, has_imatrix, differing)


def llama_quantize(path, out, mix):
    script = (
        "import sys; from cyllama.llama import llama_cpp as l; p = l.LlamaModelQuantizeParams(); p.ftype = int(sys.argv[3]); "
        "p.nthread = 2; l.model_quantize(sys.argv[1], sys.argv[2], p)"
    )
    subprocess.run([sys.executable, "-c", script, path, out, str(FILE_TYPES[mix])], check=True, capture_output=True)


@pytest.fixture(scope="module")
def few_layers(tmp_path_factory):
    """The first rows of three layers of SmolLM2 in F32: (path, {tensor: weights})."""
    path = tmp_path_factory.mktemp("smollm2") / "f32.gguf"
    weights = {}
    with GgufReader(smollm2_path()) as model:
        for name, info in model.tensors.items():
            if not name.startswith("blk.") or int(name.split(".")[1]) < 3:
                n_rows = min(info.n_rows, 128)
                weights[name] = np.empty((n_rows, info.n_cols), np.float32)
                CODECS[info.type.name].decode(model.read(info, 0, n_rows), weights[name])
        keys = [key for key in model.kv if key.startswith("llama.")]
        dropped = set(model.kv) - {"general.architecture", *keys} | {"llama.block_count"}
        key_values = [*raw_key_values(model, dropped), u32_kv("llama.block_count", 3)]
    path.write_bytes(
        pack_gguf(key_values, [(n, "F32", w.shape if len(w) > 1 else w[0].shape, w) for n, w in weights.items()])
    )
    return path, weights


@pytest.mark.parametrize("mix", ["Q8_0", "Q4_0", "Q4_K_M", "Q3_K_L", "Q6_K", "Q2_K", "IQ4_XS"])
def test_a_whole_file_has_llama_quantizes_bytes(few_layers, tmp_path, mix):
    path, weights = few_layers
    llama_quantize(path, tmp_path / "quantized.gguf", mix)
    with GgufReader(path) as base, GgufReader(tmp_path / "quantized.gguf") as quantized:
        types = mix_types(mix, model_of(base), base.tensors.values())
        for name, info in quantized.tensors.items():
            assert types[name] == info.type
            blocks = np.empty((info.n_rows, info.row_bytes), np.uint8)
            CODECS[info.type.name].encode(weights[name], np.empty(0, np.float32), blocks)
            assert (blocks == quantized.read(info)).all(), (name, info.type)
        assert quantized.get("general.file_type") == FILE_TYPES[mix]


def test_fallbacks_where_rows_are_not_whole_blocks():
    expected = {
        ("Q4_K", 256): "Q4_K", ("Q4_K", 288): "Q5_0", ("Q5_K", 576): "Q5_1", ("Q6_K", 96): "Q8_0", ("Q3_K", 64): "Q4_0",
        ("IQ4_XS", 32): "IQ4_NL", ("IQ1_S", 2880): "IQ4_NL", ("Q4_K", 100): "F16", ("Q8_0", 100): "F16", ("Q4_0", 33): "F16",
        ("NVFP4", 96): "F16", ("F32", 7): "F32", ("BF16", 1): "BF16",
    }  # fmt: skip
    assert {key: fallback_type(BY_NAME[key[0]], key[1]).name for key in expected} == expected


def test_names_of_newer_models_are_kept():
    kept = ("indexer.k_proj", "indexer.q_proj", "ffn_gate_tid2eid", "ffn_gate_inp", "time_mix_decay_w2")
    assert not any(is_quantized(f"blk.3.{name}.weight", (64, 256)) for name in kept)
    assert is_quantized("blk.3.attn_q.weight", (64, 256)) and not is_quantized("blk.3.attn_q.weight", (1, 256))
    assert not is_quantized("blk.3.attn_q.bias", (64, 256)) and is_quantized("blk.3.ffn_up_exps.weight", (8, 1, 256))


def test_models_are_read_from_headers():
    with GgufReader(smollm2_path()) as smollm2, GgufReader(gemma3_path()) as gemma:
        assert model_of(smollm2) == Model("llama", 30, 9, 3, 0)
        assert model_of(gemma) == Model("gemma3", 18, 4, 1, 0)


def test_gemmas_published_file_is_the_mix():
    with GgufReader(gemma3_path()) as gemma:
        types = mix_types("Q4_K_M", model_of(gemma), gemma.tensors.values())
        differing = {name: (types[name], info.type) for name, info in gemma.tensors.items() if types[name] != info.type}
        assert not differing


def test_an_unknown_mix_is_refused():
    with pytest.raises(UnsupportedError, match="Q4_K_XL: expected one of F32, F16"):
        mix_types("Q4_K_XL", Model("llama", 2), [])


def test_which_types_need_an_importance_matrix():
    name = "blk.0.ffn_up.weight"
    needed = [type for type in BY_NAME if requires_importance("IQ2_M", name, BY_NAME[type])]
    assert sorted(needed) == ["IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_XXS"]
    assert requires_importance("Q2_K_S", name, BY_NAME["Q2_K"]) and not requires_importance(
        "Q2_K", name, BY_NAME["Q2_K"]
    )
    assert not requires_importance("IQ2_M", "token_embd.weight", BY_NAME["IQ2_S"])


@pytest.mark.parametrize(
    ("weights", "base", "expected"),
    [
        ({"Q4_K": 100, "Q6_K": 60, "F32": 1}, 15, 15),
        ({"Q4_K": 100, "Q6_K": 60, "F32": 1}, 14, 14),
        ({"Q8_0": 100, "Q6_K": 60, "F32": 1}, 15, 7),
        ({"Q4_K": 100, "F32": 1}, 7, 15),
        ({"Q3_K": 5, "Q4_K": 4}, None, 12),
        ({"BF16": 5}, 1, 32),
        ({"IQ2_XS": 5}, 28, 28),
        ({"MXFP4": 5, "Q8_0": 2}, 38, 38),
        ({"Q4_0": 5}, 9999, 2),
        ({}, None, 0),
    ],
)
def test_file_types(weights, base, expected):
    assert file_type_of(weights, base) == expected


@pytest.mark.parametrize("mix", ["IQ2_XXS", "IQ1_S", "Q2_K_S", "IQ3_XXS"])
def test_a_mix_of_too_few_bits_asks_for_an_importance_matrix(tmp_path, mix):
    write_base(tmp_path / "base.gguf", "F16")
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(2e-4))
    with pytest.raises(UsageError, match=f"--quantize {mix}.*--imatrix") as caught:
        merge(tmp_path / "base.gguf", [(adapter, 1.0)], tmp_path / "out.gguf", Policy(mix=mix))
    assert any(name.startswith("blk.0.") for name in caught.value.details) and not (tmp_path / "out.gguf").exists()


if __name__ == "__main__":
    _quantize_jobs()
