"""The small models of ``fixtures/tiny`` as F32 GGUFs that llama.cpp runs.

Their weights go through the package's own table of layouts; that the result is right is for llama.cpp to say, whose tokens
must be those of transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from lora_gguf.ggml import BY_NAME
from lora_gguf.gguf_writer import GgufWriter, TensorSpec, key_value
from lora_gguf.hparams import Hparams, from_config
from lora_gguf.architectures import ARCHITECTURES
from lora_gguf.names import layer_of, pieces, tensor_name
from tests.common import FIXTURES

TINY = FIXTURES / "tiny"
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
    return {name: np.stack(parts) if len(parts) > 1 or "attn_k_b" in name else parts[0] for name, parts in found.items()}


def vector(path: str, part: str, values: np.ndarray, model: Hparams) -> dict[str, np.ndarray]:
    """A bias or a norm as the GGUF tensors that it becomes."""
    if part == "bias" and not re.search(r"norm|ln_|layernorm", path):
        turned = converted(path, np.repeat(values[:, None], 1 if "out_proj" not in path else values.size, 1), model)
        return {f"{name.removesuffix('.weight')}.bias": array[:, 0] for name, array in turned.items()}
    name = tensor_name(path, model)
    assert name, path
    shift = (ARCHITECTURES[model.architecture].norm_shift or 0.0) if part == "weight" and "linear_attn" not in path else 0.0
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
            width, n = model.get("config.linear_value_head_dim"), 2 * model.get("ssm.group_count") * model.get("ssm.state_size")
            values = np.concatenate([values[:n], values[n:].reshape(-1, width, values.shape[1])[value_order(model)].reshape(-1, values.shape[1])])
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
            if path.startswith("embeddings.") and "word" not in path or path.endswith("wpe"):
                found[tensor_name(path, model)] = values
            else:
                found |= converted(path, values.T if turned else values, model)
        else:
            found |= vector(path, part, values, model)
    if model.architecture == "falcon-h1":
        groups = model.get("config.mamba_n_groups")
        found |= {name: array.reshape(groups, -1) for name, array in found.items() if name.endswith("ssm_norm.weight")}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def key_values(name: str, model: Hparams) -> list[bytes]:
    """The header of a model: hyperparameters and a vocabulary of bytes."""
    a, get = model.architecture, model.get
    heads, n_rope = get("attention.head_count"), None
    config = {**config_of(name), **(config_of(name).get("rope_parameters") or {})}
    values: list[tuple[str, object, str]] = [("general.architecture", a, "str"), ("general.type", "model", "str")]

    def add(key: str, value, kind: str = "u32") -> None:
        if value is not None:
            values.append((f"{a}.{key}", value, kind))

    for key in ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"):
        add(key, get(key))
    width = config.get("head_dim") or get("embedding_length") // heads
    n_rope = int(width * (config.get("partial_rotary_factor") or config.get("rotary_pct") or 1))
    add("context_length", 128)
    add("vocab_size", config["vocab_size"])
    add("feed_forward_length", config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_hidden_size") or 4 * get("embedding_length"))
    add("rope.freq_base", float(config.get("rope_theta") or 10000.0), "f32")
    epsilon = config.get("rms_norm_eps")
    add("attention.layer_norm_rms_epsilon", epsilon, "f32")
    add("attention.layer_norm_epsilon", next((config[k] for k in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon") if k in config), 1e-5), "f32")
    if a == "deepseek2":
        n_rope = config["qk_rope_head_dim"]
        add("attention.key_length_mla", config["qk_nope_head_dim"] + n_rope)
        add("attention.value_length_mla", config["v_head_dim"])
        values = [entry for entry in values if not entry[0].endswith("head_count_kv")]
        add("attention.head_count_kv", 1)
        add("attention.key_length", config["kv_lora_rank"] + n_rope)
        add("attention.value_length", config["kv_lora_rank"])
        add("attention.kv_lora_rank", config["kv_lora_rank"])
        add("attention.q_lora_rank", config["q_lora_rank"])
        add("leading_dense_block_count", config["first_k_dense_replace"])
        add("expert_shared_count", config["n_shared_experts"])
        add("expert_weights_scale", 1.0, "f32")
        add("expert_weights_norm", False, "bool")
        add("expert_gating_func", 1)
    else:
        add("attention.key_length", width)
        add("attention.value_length", width)
    add("rope.dimension_count", n_rope)
    add("expert_count", get("expert_count"))
    add("expert_used_count", config.get("num_experts_per_tok"))
    if a != "llama":
        add("expert_feed_forward_length", config.get("moe_intermediate_size") or (config.get("intermediate_size") if get("expert_count") else None))
    add("expert_shared_feed_forward_length", config.get("shared_expert_intermediate_size"))
    add("attention.sliding_window", config.get("sliding_window"))
    add("attn_logit_softcapping", config.get("attn_logit_softcapping"), "f32")
    add("final_logit_softcapping", config.get("final_logit_softcapping"), "f32")
    if a.startswith("granite"):
        for key, field in (("attention.scale", "attention_multiplier"), ("embedding_scale", "embedding_multiplier"), ("residual_scale", "residual_multiplier"), ("logit_scale", "logits_scaling")):
            add(key, config[field], "f32")
    if a == "phi3":
        add("rope.scaling.original_context_length", 128)
    if a == "gptneox":
        add("use_parallel_residual", True, "bool")
    if a == "bert":
        add("attention.causal", False, "bool")
        add("pooling_type", 1)
    if a.startswith(("qwen3next", "qwen35")):
        for key in ("ssm.group_count", "ssm.time_step_rank", "ssm.state_size", "ssm.inner_size"):
            add(key, get(key))
        add("ssm.conv_kernel", config["linear_conv_kernel_dim"])
        add("full_attention_interval", 2)
        if a == "qwen35":
            values.append((f"{a}.rope.dimension_sections", (config.get("mrope_section") or [1, 1, 0]) + [0], "i32"))
    if a == "falcon-h1":
        for key, field in (("inner_size", "mamba_d_ssm"), ("time_step_rank", "mamba_n_heads"), ("state_size", "mamba_d_state"), ("group_count", "mamba_n_groups"), ("conv_kernel", "mamba_d_conv")):
            add(f"ssm.{key}", config[field])
    return [key_value(*entry) for entry in values] + vocabulary(config["vocab_size"], a)


def vocabulary(n: int, architecture: str) -> list[bytes]:
    """Three control tokens, and words that are whole characters, so that a server reports each token alone."""
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i};" for i in range(3, n - 1)), "<0x0A>"]
    types = [2, 3, 3, *[1] * (n - 4), 6]
    if architecture == "bert":
        return [
            key_value("tokenizer.ggml.model", "bert", "str"),
            key_value("tokenizer.ggml.tokens", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"\u2581t{i}" for i in range(n - 4))], "str"),
            key_value("tokenizer.ggml.token_type", [3, 2, 3, 3, *[1] * (n - 4)], "i32"),
            key_value("tokenizer.ggml.token_type_count", 2, "u32"),
            *(key_value(f"tokenizer.ggml.{what}_token_id", i, "u32") for what, i in (("bos", 2), ("eos", 3), ("unknown", 1), ("seperator", 3), ("padding", 0), ("cls", 2))),
        ]
    return [
        key_value("tokenizer.ggml.model", "llama", "str"),
        key_value("tokenizer.ggml.tokens", tokens, "str"),
        key_value("tokenizer.ggml.scores", [0.0] * n, "f32"),
        key_value("tokenizer.ggml.token_type", types, "i32"),
        key_value("tokenizer.ggml.bos_token_id", 1, "u32"),
        key_value("tokenizer.ggml.eos_token_id", 2, "u32"),
        key_value("tokenizer.ggml.unknown_token_id", 0, "u32"),
    ]


def write_gguf(path: Path, name: str, tensors: dict[str, np.ndarray]) -> Path:
    """An F32 GGUF of the model ``name`` with ``tensors``."""
    model = from_config(config_of(name))
    specs = [TensorSpec(key, BY_NAME["F32"], array.shape) for key, array in tensors.items()]
    with GgufWriter(path, key_values(name, model), specs, force=True) as writer:
        for key, array in tensors.items():
            writer.write(writer.tensors[key], 0, np.ascontiguousarray(array, np.float32))
        writer.commit()
    return path


def base_gguf(folder: Path, name: str) -> Path:
    """The model ``name`` of ``fixtures/tiny`` as a GGUF in ``folder``."""
    return write_gguf(Path(folder) / f"{name}.gguf", name, tensors_of(name, from_config(config_of(name))))


def server(model: Path, adapter: Path | None = None, embedding: bool = False):
    """llama.cpp on a model, in F32 throughout."""
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
    request = {"prompt": PROMPT, "n_predict": 8, "temperature": 0, "n_probs": 5, "ignore_eos": True, "cache_prompt": False}
    choice = server(model, adapter).handle_completions(request)["choices"][0]
    return [[(token["id"], token["logprob"]) for token in step["top_logprobs"]] for step in choice["logprobs"]["content"]]


def embed(model: Path, adapter: Path | None = None) -> list[float]:
    """The embedding of ``PROMPT``."""
    return server(model, adapter, embedding=True).handle_embeddings({"input": [PROMPT]})["data"][0]["embedding"]
