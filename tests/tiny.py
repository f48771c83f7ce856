"""The small models of ``fixtures/tiny`` as F32 GGUFs that llama.cpp runs.

Their weights go through the package's own table of layouts; that the result is right is for llama.cpp to say, whose
tokens must be those of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_gguf import api
from lora_gguf.errors import LoraGgufError
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, key_value
from lora_gguf.mapping.architectures import ARCHITECTURES
from lora_gguf.mapping.hparams import Hparams, from_config
from lora_gguf.mapping.names import layer_of, pieces, tensor_name
from lora_gguf.quants.ggml import BY_NAME
from tests.common import FIXTURES

TINY = FIXTURES / "tiny"
KINDS = sorted(path.name for path in (FIXTURES / "kinds").iterdir())
NAMES = sorted(path.name for path in TINY.iterdir()) if TINY.is_dir() else []
PROMPT = [1, 80, 120, 99, 200, 45, 260, 77]
CONV1D = ("c_attn", "c_proj", "c_fc")


def config_of(name: str) -> dict:
    return json.loads((TINY / name / "config.json").read_text())


def expected(name: str) -> dict:
    return json.loads((TINY / name / "expected.json").read_text())


def converted(path: str, weight: np.ndarray, model: Hparams) -> dict[str, np.ndarray]:
    """A dense weight, (out, in) or (E, out, in), as the GGUF tensors that it becomes."""
    found: dict[str, list] = {}
    for piece in pieces(path, weight.shape[-2:], model):
        part = weight if piece.rows is None else weight[..., piece.rows, :]
        part = part if piece.cols is None else part[..., piece.cols]
        part = part if piece.scale is None else part * piece.scale[:, None]
        found.setdefault(piece.name, []).append(part.swapaxes(-1, -2) if piece.transpose else part)
    assert found, path
    return {
        name: np.stack(parts) if len(parts) > 1 or "attn_k_b" in name else parts[0] for name, parts in found.items()
    }


def vector(path: str, part: str, values: np.ndarray, model: Hparams) -> dict[str, np.ndarray]:
    """A bias or a norm as the GGUF tensors that it becomes."""
    if part == "bias" and not re.search(r"norm|ln_|layernorm", path):
        turned = converted(path, np.repeat(values[:, None], 1 if "out_proj" not in path else values.size, 1), model)
        return {f"{name.removesuffix('.weight')}.bias": array[:, 0] for name, array in turned.items()}
    name = tensor_name(path, model)
    assert name, path
    shift = (
        (ARCHITECTURES[model.architecture].norm_shift or 0.0) if part == "weight" and "linear_attn" not in path else 0.0
    )
    return {name.removesuffix("weight") + part if name.endswith("weight") else name: values + np.float32(shift)}


def value_order(model: Hparams) -> np.ndarray:
    """The order of the tiled value heads."""
    k, v = model.get("ssm.group_count"), model.get("ssm.time_step_rank")
    return np.arange(v).reshape(k, v // k).T.ravel()


def ssm(key: str, values: np.ndarray, model: Hparams) -> dict[str, np.ndarray]:
    """The tensors of linear attention and Mamba that are no matrices."""
    block = f"blk.{layer_of(key)}"
    tiled = model.architecture.startswith("qwen35")
    if key.endswith("conv1d.weight"):
        values = values[:, 0]
        if tiled:
            width, n = (
                model.get("config.linear_value_head_dim"),
                2 * model.get("ssm.group_count") * model.get("ssm.state_size"),
            )
            values = np.concatenate(
                [
                    values[:n],
                    values[n:].reshape(-1, width, values.shape[1])[value_order(model)].reshape(-1, values.shape[1]),
                ]
            )
        return {f"{block}.ssm_conv1d.weight": values}
    if tiled and values.ndim == 1 and not key.endswith("conv1d.bias"):
        values = values[value_order(model)]
    if model.architecture == "falcon-h1" and key.endswith(("A_log", ".D")):
        values = values[:, None]
    stem = {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias", "bias": "ssm_conv1d.bias"}[key.rpartition(".")[2]]
    return {f"{block}.{stem}": -np.exp(values) if key.endswith("A_log") else values}


def tensors_of(name: str, model: Hparams, source: str = "base") -> dict[str, np.ndarray]:
    """The GGUF tensors of a model's weights."""
    return tensors_from(TINY / name / f"{source}.safetensors", model)


def tensors_from(path: Path, model: Hparams) -> dict[str, np.ndarray]:
    """The GGUF tensors of the Hugging Face weights in a file."""
    found: dict[str, np.ndarray] = {}
    for key, stored in load_file(path).items():
        values = stored.astype(np.float32)
        path, _, part = key.rpartition(".")
        if re.search(r"conv1d|A_log|dt_bias|mamba\.D$", key):
            found |= ssm(key, values, model)
        elif key.endswith("sinks"):
            found[tensor_name(key, model) or f"blk.{key.split('.')[2]}.attn_sinks.weight"] = values
        elif key.endswith("_proj_bias"):
            stacked = converted(f"{path}.{part.removesuffix('_bias')}", values[:, :, None], model)
            found |= {f"{name.removesuffix('.weight')}.bias": array[..., 0] for name, array in stacked.items()}
        elif path.startswith("pooler"):
            continue
        elif values.ndim == 3:
            values = values.swapaxes(-1, -2) if model.architecture == "gpt-oss" else values
            found |= converted(key if part != "weight" else path, values, model)
        elif values.ndim == 2:
            turned = model.architecture == "gpt2" and path.endswith(CONV1D)
            if (path.startswith("embeddings.") and "word" not in path) or path.endswith("wpe"):
                found[tensor_name(path, model)] = values
            else:
                found |= converted(path, values.T if turned else values, model)
        else:
            found |= vector(path, part, values, model)
    if model.architecture == "falcon-h1":
        groups = model.get("config.mamba_n_groups")
        found |= {name: array.reshape(groups, -1) for name, array in found.items() if name.endswith("ssm_norm.weight")}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


# architecture -> further keys: (key, a field of config.json or a value, its type)
GRANITE = (
    ("attention.scale", "attention_multiplier", "f32"),
    ("embedding_scale", "embedding_multiplier", "f32"),
    ("residual_scale", "residual_multiplier", "f32"),
    ("logit_scale", "logits_scaling", "f32"),
)
LINEAR_ATTENTION = (("ssm.conv_kernel", "linear_conv_kernel_dim", "u32"), ("full_attention_interval", 2, "u32"))
FURTHER = {
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "phi3": (("rope.scaling.original_context_length", 128, "u32"),),
    "gptneox": (("use_parallel_residual", True, "bool"),),
    "bert": (("attention.causal", False, "bool"), ("pooling_type", 1, "u32")),
    "qwen3next": LINEAR_ATTENTION,
    "qwen35": (*LINEAR_ATTENTION, ("rope.dimension_sections", [1, 1, 0, 0], "i32")),
    "deepseek2": (
        ("attention.kv_lora_rank", "kv_lora_rank", "u32"),
        ("attention.q_lora_rank", "q_lora_rank", "u32"),
        ("leading_dense_block_count", "first_k_dense_replace", "u32"),
        ("expert_shared_count", "n_shared_experts", "u32"),
        ("attention.value_length_mla", "v_head_dim", "u32"),
        ("attention.value_length", "kv_lora_rank", "u32"),
        ("expert_weights_scale", 1.0, "f32"),
        ("expert_weights_norm", False, "bool"),
        ("expert_gating_func", 1, "u32"),
    ),
    "falcon-h1": (
        ("ssm.inner_size", "mamba_d_ssm", "u32"),
        ("ssm.time_step_rank", "mamba_n_heads", "u32"),
        ("ssm.state_size", "mamba_d_state", "u32"),
        ("ssm.group_count", "mamba_n_groups", "u32"),
        ("ssm.conv_kernel", "mamba_d_conv", "u32"),
    ),
}
# what every architecture may have: (key, fields of config.json, its type)
COMMON = (
    ("feed_forward_length", ("intermediate_size", "n_inner", "ffn_hidden_size"), "u32"),
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps",), "f32"),
    ("attention.layer_norm_epsilon", ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"), "f32"),
    ("expert_used_count", ("num_experts_per_tok",), "u32"),
    ("expert_feed_forward_length", ("moe_intermediate_size",), "u32"),
    ("expert_shared_feed_forward_length", ("shared_expert_intermediate_size",), "u32"),
    ("attention.sliding_window", ("sliding_window",), "u32"),
    ("attn_logit_softcapping", ("attn_logit_softcapping",), "f32"),
    ("final_logit_softcapping", ("final_logit_softcapping",), "f32"),
)


def key_values(name: str, model: Hparams) -> list[bytes]:
    """The header of a model: hyperparameters and a vocabulary."""
    a, config = model.architecture, {**config_of(name), **(config_of(name).get("rope_parameters") or {})}
    entries = [("vocab_size", config["vocab_size"], "u32"), ("context_length", 128, "u32"), *widths(model, config)]
    entries += [("rope.freq_base", float(config.get("rope_theta") or 10000.0), "f32")]
    for key, fields, kind in COMMON:
        entries.append((key, next((config[field] for field in fields if config.get(field) is not None), None), kind))
    entries += [
        (key, config[value] if isinstance(value, str) else value, kind) for key, value, kind in FURTHER.get(a, ())
    ]
    if a in ("gpt-oss", "granitemoe"):
        entries.append(("expert_feed_forward_length", config["intermediate_size"], "u32"))
    if a == "bloom":
        entries.append(("feed_forward_length", 4 * config["hidden_size"], "u32"))
    found = {key: key_value(f"{a}.{key}", value, kind) for key, value, kind in entries if value is not None}
    head = [key_value("general.architecture", a, "str"), key_value("general.type", "model", "str")]
    return [*head, *found.values(), *vocabulary(config["vocab_size"], a)]


def widths(model: Hparams, config: dict) -> list[tuple[str, object, str]]:
    """Layers, heads and their sizes."""
    keys = ["block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "expert_count"]
    keys += ["ssm.group_count", "ssm.time_step_rank", "ssm.state_size", "ssm.inner_size"]
    found = {key: model.get(key) for key in keys}
    width = config.get("head_dim") or found["embedding_length"] // found["attention.head_count"]
    part = config.get("partial_rotary_factor") or config.get("rotary_pct") or 1
    found |= {"rope.dimension_count": int(width * part), "attention.key_length": width, "attention.value_length": width}
    if model.architecture == "deepseek2":  # one head of keys and values, in the latent space
        n_rope = config["qk_rope_head_dim"]
        found |= {"attention.head_count_kv": 1, "rope.dimension_count": n_rope}
        found |= {"attention.key_length": config["kv_lora_rank"] + n_rope}
        found |= {"attention.key_length_mla": config["qk_nope_head_dim"] + n_rope}
    return [(key, value, "u32") for key, value in found.items()]


def vocabulary(n: int, architecture: str) -> list[bytes]:
    """Three control tokens, and words that are whole characters, so that a server reports each token alone."""
    if architecture == "bert":
        words, types = (
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"\u2581t{i}" for i in range(n - 4))],
            [3, 2, 3, 3, *[1] * (n - 4)],
        )
        special = {"bos": 2, "eos": 3, "unknown": 1, "seperator": 3, "padding": 0, "cls": 2}
        further = [key_value("tokenizer.ggml.token_type_count", 2, "u32")]
    else:
        words = ["<unk>", "<s>", "</s>", *(f"t{i};" for i in range(3, n - 1)), "<0x0A>"]
        types, special = [2, 3, 3, *[1] * (n - 4), 6], {"bos": 1, "eos": 2, "unknown": 0}
        further = [key_value("tokenizer.ggml.scores", [0.0] * n, "f32")]
    return [
        key_value("tokenizer.ggml.model", "bert" if architecture == "bert" else "llama", "str"),
        key_value("tokenizer.ggml.tokens", words, "str"),
        key_value("tokenizer.ggml.token_type", types, "i32"),
        *further,
        *(key_value(f"tokenizer.ggml.{what}_token_id", i, "u32") for what, i in special.items()),
    ]


def write_gguf(path: Path, name: str, tensors: dict[str, np.ndarray], extra: Sequence[bytes] = ()) -> Path:
    """An F32 GGUF of the model ``name`` with ``tensors``, and key/value pairs ``extra``."""
    model = from_config(config_of(name))
    specs = [TensorSpec(key, BY_NAME["F32"], array.shape) for key, array in tensors.items()]
    with GgufWriter(path, [*key_values(name, model), *extra], specs, force=True) as writer:
        for key, array in tensors.items():
            writer.write(writer.tensors[key], 0, np.ascontiguousarray(array, np.float32))
        writer.commit()
    return path


def base_gguf(folder: Path, name: str, extra: Sequence[bytes] = ()) -> Path:
    """The model ``name`` of ``fixtures/tiny`` as a GGUF in ``folder``, with key/value pairs ``extra``."""
    return write_gguf(Path(folder) / f"{name}.gguf", name, tensors_of(name, from_config(config_of(name))), extra)


def base_of_kind(folder: Path, name: str) -> tuple[Path, Path]:
    """The base and the adapter of a fixture of ``KINDS``; the test is skipped where a merge refuses them."""
    adapter = FIXTURES / "kinds" / name
    base = base_gguf(folder, (adapter / "base").read_text().strip())
    try:
        api.merge(base, adapter, None)
    except LoraGgufError as error:
        pytest.skip(f"refused: {error}")
    return base, adapter


def server(model: Path, adapter: Path | None = None, embedding: bool = False):
    """llama.cpp on a model, in F32 throughout. Ask it something: one that goes before its loop has begun waits for it
    forever.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.embedding = str(model), 128, 1, embedding
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    return xllamacpp.Server(params)


def generate(model: Path, adapter: Path | None = None) -> list[list[tuple[int, float]]]:
    """The five likeliest tokens with their log-probabilities at each step of greedy generation after ``PROMPT``."""
    request = {
        "prompt": PROMPT,
        "n_predict": 8,
        "temperature": 0,
        "n_probs": 5,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    choice = server(model, adapter).handle_completions(request)["choices"][0]
    return [
        [(token["id"], token["logprob"]) for token in step["top_logprobs"]] for step in choice["logprobs"]["content"]
    ]


def embed(model: Path, adapter: Path | None = None) -> list[float]:
    """The embedding of ``PROMPT``."""
    return server(model, adapter, embedding=True).handle_embeddings({"input": [PROMPT]})["data"][0]["embedding"]
