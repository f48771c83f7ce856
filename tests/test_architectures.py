"""The table of architectures: every row's layout against a dense port of it, every row's names against gguf's."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.updates import Dora, Rotated, Scaled
from lora_gguf.errors import UnsupportedError
from lora_gguf.mapping.architectures import ARCHITECTURES
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.names import is_other_tower, pieces, why_skipped
from tests.common import FIXTURES
from tests.test_names import MODULES, OWN_CODE

LAYER = 3


def random_dims(seed):
    """A model's dimensions, all different where they may be; ``values`` are its GGUF keys, ``config`` its
    config.json."""
    rng = np.random.default_rng(seed)
    d = SimpleNamespace(
        kv=int(rng.integers(1, 4)), d=2 * int(rng.integers(1, 5)), E=int(rng.integers(2, 6)), ff=int(rng.integers(3, 9))
    )
    d.q, d.n = d.kv * int(rng.integers(1, 4)), int(rng.integers(5, 12))
    d.rope, d.nope, d.v, d.latent = (
        2 * int(rng.integers(1, d.d // 2 + 1)),
        int(rng.integers(2, 5)),
        int(rng.integers(2, 5)),
        int(rng.integers(3, 6)),
    )
    d.nk, d.hk, d.hv = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 5))
    d.nv = d.nk * int(rng.integers(1, 4))
    d.values = {
        "block_count": 8,
        "embedding_length": d.n,
        "attention.head_count": d.q,
        "attention.head_count_kv": [d.kv] * 8,
        "attention.key_length": d.d,
        "attention.value_length": d.d,
        "expert_count": d.E,
        "rope.dimension_count": d.rope,
        "rescale_every_n_layers": 2,
        "attention.key_length_mla": d.nope + d.rope,
        "attention.value_length_mla": d.v,
        "rope.dimension_sections": [1, 1, 1, 0],
        "ssm.group_count": d.nk,
        "ssm.time_step_rank": d.nv,
        "ssm.state_size": d.hk,
        "ssm.inner_size": d.nv * d.hv,
        "attention.indexer.head_count": 2,
        "attention.indexer.key_length": 3,
    }
    d.index_heads, d.index_width = 2, 3
    d.inner, d.state = 3, 4
    d.config = {
        "attention_in_multiplier": 2.0,
        "key_multiplier": 3.0,
        "attention_out_multiplier": 5.0,
        "mlp_multipliers": [7.0, 11.0],
        "ssm_out_multiplier": 13.0,
        "ssm_in_multiplier": 2.0,
        "ssm_multipliers": [2.0, 3.0, 5.0, 7.0, 11.0],
        "mamba_d_ssm": 3,
        "mamba_n_groups": 2,
        "mamba_d_state": 2,
        "lm_head_multiplier": 17.0,
        "embedding_multiplier": 19.0,
        "mup_embeddings_scale": 23.0,
        "mup_output_alpha": 29.0,
        "mup_width_scale": 3.0,
    }
    return d


# the documented layouts on a dense weight (out, in)
def rotary(w, heads):
    return w.reshape(heads, 2, len(w) // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def groups(w, d):
    """(q, k, v) out of rows grouped by key/value head."""
    g = w.reshape(d.kv, d.q // d.kv + 2, d.d, -1)
    return [part.reshape(-1, w.shape[1]) for part in (g[:, :-2], g[:, -2], g[:, -1])]


def tiled(w, d, hd):
    """Value heads, grouped by key head, tiled."""
    return w.reshape(d.nk, d.nv // d.nk, hd, -1).transpose(1, 0, 2, 3).reshape(w.shape)


def neox(w, heads, d):
    """GLM's rotary rows: even ones before odd ones, head by head."""
    w = w.reshape(heads, d.d, -1)
    turned = np.concatenate([w[:, : d.rope : 2], w[:, 1 : d.rope : 2], w[:, d.rope :]], axis=1)
    return turned.reshape(heads * d.d, -1)


def qkvz(w, d):
    value = d.nv // d.nk * d.hv
    q, k, v, z = np.split(w.T.reshape(-1, d.nk, 2 * d.hk + 2 * value), np.cumsum([d.hk, d.hk, value]), axis=-1)
    flat = [part.reshape(w.shape[1], -1) for part in (q, k, v, z)]
    return {"attn_qkv": np.concatenate(flat[:3], axis=-1).T, "attn_gate": flat[3].T}


def latent(w, d):
    heads = w.reshape(d.q, d.nope + d.v, -1)
    return {"attn_k_b": heads[:, : d.nope].transpose(0, 2, 1), "attn_v_b": heads[:, d.nope :]}


def halves(w, gate, up):
    return dict(zip((gate, up), np.split(w, 2), strict=True))


def thirds(w, d):
    q, k, v = np.split(w, 3)
    return {"attn_q": rotary(q, d.q), "attn_k": rotary(k, d.kv), "attn_v": v}


def internlm2(w, d):
    q, k, v = groups(w, d)
    return {"attn_q": rotary(q, d.q), "attn_k": rotary(k, d.kv), "attn_v": v}


def blocks(w, d, turn):
    q, k, v = np.split(w, np.cumsum([d.q * d.d, d.kv * d.d]))
    return (
        {"attn_q": rotary(q, d.q), "attn_k": rotary(k, d.kv), "attn_v": v}
        if turn
        else {"attn_q": q, "attn_k": k, "attn_v": v}
    )


def by_head(w, d):
    return w.reshape(d.q, 3, len(w) // d.q // 3, -1).transpose(1, 0, 2, 3).reshape(w.shape)


def experts(w, d, transpose=False):
    stacked = w.reshape(d.E, d.ff, -1)
    return stacked.transpose(0, 2, 1) if transpose else stacked


def in_proj(w, d):
    factors = [2, 2, 2, 3, 3, 3, *[5] * 4, *[7] * 4, *[11] * (len(w) - 14)]
    return w * 2.0 * np.array(factors)[:, None]


def plamo_q(w):
    return w.reshape(8, 5, 128, -1).transpose(1, 0, 2, 3).reshape(w.shape)


def plamo_o(w):
    return w.reshape(-1, 8, 5, 128).transpose(0, 2, 1, 3).reshape(w.shape)


Q = ("model.layers.3.self_attn.q_proj", lambda d: (d.q * d.d, d.n), lambda w, d: {"attn_q": rotary(w, d.q)})
K = ("model.layers.3.self_attn.k_proj", lambda d: (d.kv * d.d, d.n), lambda w, d: {"attn_k": rotary(w, d.kv)})
V = ("model.layers.3.self_attn.v_proj", lambda d: (d.kv * d.d, d.n), lambda w, d: {"attn_v": w})
O = ("model.layers.3.self_attn.o_proj", lambda d: (d.n, d.q * d.d), lambda w, d: {"attn_output": w})
ROTARY = [Q, K, V, O]
LATENT = [
    ("model.layers.3.self_attn.kv_b_proj", lambda d: (d.q * (d.nope + d.v), d.latent), latent),
    (
        "model.layers.3.self_attn.kv_a_proj_with_mqa",
        lambda d: (d.latent + d.rope, d.n),
        lambda w, d: {"attn_kv_a_mqa": w},
    ),
]
GATE_UP_EXPERT = "model.layers.3.mlp.experts.gate_up_proj"
LINEAR = "model.layers.3.linear_attn."
QWEN35 = [
    (
        f"{LINEAR}in_proj_qkv",
        lambda d: (2 * d.nk * d.hk + d.nv * d.hv, d.n),
        lambda w, d: {"attn_qkv": np.concatenate([w[: 2 * d.nk * d.hk], tiled(w[2 * d.nk * d.hk :], d, d.hv)])},
    ),
    (f"{LINEAR}in_proj_z", lambda d: (d.nv * d.hv, d.n), lambda w, d: {"attn_gate": tiled(w, d, d.hv)}),
    (f"{LINEAR}in_proj_a", lambda d: (d.nv, d.n), lambda w, d: {"ssm_alpha": tiled(w, d, 1)}),
    (f"{LINEAR}in_proj_b", lambda d: (d.nv, d.n), lambda w, d: {"ssm_beta": tiled(w, d, 1)}),
    (f"{LINEAR}out_proj", lambda d: (d.n, d.nv * d.hv), lambda w, d: {"ssm_out": tiled(w.T, d, d.hv).T}),
]
ERNIE_QKV = (
    "model.layers.3.self_attn.qkv_proj",
    lambda d: ((d.q + 2 * d.kv) * d.d, d.n),
    lambda w, d: blocks(w, d, turn=False),
)
GRANITE_DENSE = [
    ("model.layers.3.shared_mlp.input_linear", lambda d: (2 * d.ff, d.n), lambda w, d: halves(w, "ffn_gate", "ffn_up")),
    ("model.layers.3.shared_mlp.output_linear", lambda d: (d.n, d.ff), lambda w, d: {"ffn_down": w}),
]
GRANITE_MOE = [
    (
        "model.layers.3.block_sparse_moe.input_linear",
        lambda d: (2 * d.ff, d.n),
        lambda w, d: halves(w, "ffn_gate_exps", "ffn_up_exps"),
    ),
    (
        "model.layers.3.shared_mlp.input_linear",
        lambda d: (2 * d.ff, d.n),
        lambda w, d: halves(w, "ffn_gate_shexp", "ffn_up_shexp"),
    ),
    ("model.layers.3.shared_mlp.output_linear", lambda d: (d.n, d.ff), lambda w, d: {"ffn_down_shexp": w}),
]


def times(path, shape, tensor, factor):
    return (path, shape, lambda w, d: {tensor: w * factor})


FALCON_H1 = [
    times("model.layers.3.self_attn.q_proj", Q[1], "attn_q", 2.0),
    times("model.layers.3.self_attn.k_proj", K[1], "attn_k", 6.0),
    times("model.layers.3.self_attn.v_proj", V[1], "attn_v", 2.0),
    times("model.layers.3.self_attn.o_proj", O[1], "attn_output", 5.0),
    times("model.layers.3.feed_forward.gate_proj", lambda d: (d.ff, d.n), "ffn_gate", 7.0),
    times("model.layers.3.feed_forward.down_proj", lambda d: (d.n, d.ff), "ffn_down", 11.0),
    times("model.layers.3.feed_forward.up_proj", lambda d: (d.ff, d.n), "ffn_up", 1.0),
    times("model.layers.3.mamba.out_proj", lambda d: (d.n, 3), "ssm_out", 13.0),
    ("model.layers.3.mamba.in_proj", lambda d: (14 + d.ff, d.n), lambda w, d: {"ssm_in": in_proj(w, d)}),
    times("lm_head", lambda d: (20, d.n), "output", 17.0),
    times("model.embed_tokens", lambda d: (20, d.n), "token_embd", 19.0),
]
# architecture -> modules: (path, shape of the weight, the tensors that it becomes)
LAYOUTS = {
    **dict.fromkeys(
        (
            "llama",
            "llama-embed",
            "mistral3",
            "smollm3",
            "arcee",
            "arctic",
            "deci",
            "minicpm",
            "olmo",
            "chameleon",
            "deepseek",
            "granite",
            "granitemoe",
            "granitehybrid",
        ),
        ROTARY,
    ),
    "nemotron_h": [("model.layers.3.mixer.q_proj", Q[1], Q[2]), ("backbone.layers.3.mixer.k_proj", K[1], K[2])],
    "nemotron_h_moe": [("backbone.layers.3.mixer.q_proj", Q[1], Q[2]), ("model.layers.3.mixer.k_proj", K[1], K[2])],
    "llada": [("model.transformer.blocks.3.q_proj", Q[1], Q[2]), ("model.transformer.blocks.3.k_proj", K[1], K[2])],
    "xverse": [
        Q,
        (K[0], K[1], lambda w, d: {"attn_k": rotary(w, d.q if d.q == d.kv else d.q // d.kv)}),
    ],
    "internlm2": [("model.layers.3.attention.wqkv", lambda d: ((d.q + 2 * d.kv) * d.d, d.n), internlm2)],
    "baichuan": [("model.layers.3.self_attn.W_pack", lambda d: (3 * d.q * d.kv * d.d, d.n), thirds)],
    "bailingmoe": [
        (
            "model.layers.3.attention.query_key_value",
            lambda d: ((d.q + 2 * d.kv) * d.d, d.n),
            lambda w, d: blocks(w, d, turn=True),
        )
    ],
    "ernie4_5": [
        ERNIE_QKV,
        ("model.layers.3.mlp.up_gate_proj", lambda d: (2 * d.ff, d.n), lambda w, d: halves(w, "ffn_gate", "ffn_up")),
    ],
    "ernie4_5-moe": [
        ERNIE_QKV,
        ("model.layers.3.mlp.up_gate_proj", lambda d: (2 * d.ff, d.n), lambda w, d: halves(w, "ffn_gate", "ffn_up")),
    ],
    "qwen3next": [(f"{LINEAR}in_proj_qkvz", lambda d: (2 * d.nk * d.hk + 2 * d.nv * d.hv, d.n), qkvz)],
    "qwen35": QWEN35,
    "qwen35moe": QWEN35,
    "falcon": [
        (
            "transformer.h.3.self_attention.query_key_value",
            lambda d: ((d.q + 2 * d.kv) * d.d, d.n),
            lambda w, d: {"attn_qkv": np.concatenate(groups(w, d))},
        )
    ],
    "gptneox": [
        (
            "gpt_neox.layers.3.attention.query_key_value",
            lambda d: (3 * d.q * d.d, d.n),
            lambda w, d: {"attn_qkv": by_head(w, d)},
        )
    ],
    "bloom": [
        (
            "transformer.h.3.self_attention.query_key_value",
            lambda d: (3 * d.q * d.d, d.n),
            lambda w, d: {"attn_qkv": by_head(w, d)},
        )
    ],
    "falcon-h1": FALCON_H1,
    "refact": [
        (
            "transformer.h.3.attn.kv",
            lambda d: (2 * d.d, d.n),
            lambda w, d: dict(zip(("attn_k", "attn_v"), np.split(w, 2), strict=True)),
        ),
        ("transformer.h.3.mlp.gate_up_proj", lambda d: (2 * d.ff, d.n), lambda w, d: halves(w, "ffn_gate", "ffn_up")),
        ("transformer.h.3.attn.q", lambda d: (d.q * d.d, d.n), lambda w, d: {"attn_q": w}),
    ],
    "openelm": [
        ("transformer.layers.3.ffn.proj_1", lambda d: (2 * d.ff, d.n), lambda w, d: halves(w, "ffn_gate", "ffn_up"))
    ],
    "dbrx": [
        (
            "transformer.blocks.3.ffn.experts.mlp.w1",
            lambda d: (d.E * d.ff, d.n),
            lambda w, d: {"ffn_gate_exps": experts(w, d)},
        ),
        (
            "transformer.blocks.3.ffn.experts.mlp.v1",
            lambda d: (d.E * d.ff, d.n),
            lambda w, d: {"ffn_up_exps": experts(w, d)},
        ),
        (
            "transformer.blocks.3.ffn.experts.mlp.w2",
            lambda d: (d.E * d.ff, d.n),
            lambda w, d: {"ffn_down_exps": experts(w, d, True)},
        ),
    ],
    "nomic-bert-moe": [
        (
            "encoder.layers.3.mlp.experts.mlp.w1",
            lambda d: (d.E * d.ff, d.n),
            lambda w, d: {"ffn_up_exps": experts(w, d)},
        ),
        (
            "encoder.layers.3.mlp.experts.mlp.w2",
            lambda d: (d.E * d.ff, d.n),
            lambda w, d: {"ffn_down_exps": experts(w, d, True)},
        ),
    ],
    "deepseek2": LATENT,
    "glm-dsa": LATENT,
    "kimi-linear": LATENT,
    "mistral4": LATENT,
    "glm4": [
        (Q[0], Q[1], lambda w, d: {"attn_q": neox(w, d.q, d)}),
        (K[0], K[1], lambda w, d: {"attn_k": neox(w, d.kv, d)}),
    ],
    "plamo": [
        ("model.layers.layers.3.self_attn.q_proj", lambda d: (5120, 2), lambda w, d: {"attn_q": plamo_q(w)}),
        ("model.layers.layers.3.self_attn.o_proj", lambda d: (2, 5120), lambda w, d: {"attn_output": plamo_o(w)}),
    ],
    "gpt-oss": [
        (GATE_UP_EXPERT, lambda d: (2 * d.ff, d.n), lambda w, d: {"ffn_gate_exps": w[::2], "ffn_up_exps": w[1::2]}),
    ],
    "qwen3moe": [(GATE_UP_EXPERT, lambda d: (2 * d.ff, d.n), lambda w, d: halves(w, "ffn_gate_exps", "ffn_up_exps"))],
    "gemma4": [
        ("model.layers.3.experts.gate_up_proj", lambda d: (2 * d.ff, d.n), lambda w, d: {"ffn_gate_up_exps": w})
    ],
}
LAYOUTS["rwkv6"] = [
    ("rwkv.blocks.3.attention.output", lambda d: (d.n, d.n), lambda w, d: {"time_mix_output": w / 2.0}),
    ("rwkv.blocks.3.feed_forward.value", lambda d: (d.n, d.ff), lambda w, d: {"channel_mix_value": w / 2.0}),
]
for name in ("bailingmoe3", "deepseek32", "dots3note", "glm5-next", "kimi-k3", "hy_v4"):
    LAYOUTS[name] = LATENT[:1]
LAYOUTS["bailingmoe3"] = [("model.layers.3.attention.kv_b_proj", *LATENT[0][1:])]
for name in ("granite_swa", "muse-glimmer", "nanbeige"):
    LAYOUTS[name] = ROTARY


def indexer(w, d):
    q, k = np.split(w, [d.index_heads * d.index_width])
    return {"indexer.q_proj": q, "indexer.k_proj": k}


def switch(w, d):
    q, k, v = np.split(w, np.cumsum([d.q * d.d, d.kv * d.d]))
    return {"attn_qkv": np.concatenate([rotary(q, d.q), rotary(k, d.kv), v])}


def negated(w, d):
    signs = np.repeat([1.0, -1.0], d.d // 2)
    return (w.reshape(-1, d.d, w.shape[1]) * signs[:, None]).reshape(w.shape)


def quarters(w, d):
    return dict(zip(("attn_gate", "attn_q", "attn_k", "attn_v"), np.split(w, 4), strict=True))


LAYOUTS["qwen4exp"] = [
    *QWEN35,
    (
        "model.layers.3.self_attn.indexer.index_qk_proj",
        lambda d: (d.index_heads * d.index_width + d.index_width, d.n),
        indexer,
    ),
]
LAYOUTS["graniteswitch"] = [
    ("model.layers.3.self_attn.qkv_proj.base_layer", lambda d: ((d.q + 2 * d.kv) * d.d, d.n), switch),
    ("model.layers.3.self_attn.o_proj.base_layer", O[1], O[2]),
    (
        "model.layers.3.shared_mlp.input_linear.base_layer",
        lambda d: (2 * d.ff, d.n),
        lambda w, d: halves(w, "ffn_gate", "ffn_up"),
    ),
]
LAYOUTS["hrm_text"] = [
    ("model.layers.3.attn.gqkv_proj", lambda d: (4 * d.q * d.d, d.n), quarters),
    ("model.layers.3.mlp.gate_up_proj", lambda d: (2 * d.ff, d.n), lambda w, d: halves(w, "ffn_gate", "ffn_up")),
]
LAYOUTS["talkie"] = [
    ("model.blocks.3.attn.attn_query", Q[1], lambda w, d: {"attn_q": negated(w, d)}),
    ("model.blocks.3.attn.attn_key", K[1], lambda w, d: {"attn_k": negated(w, d)}),
    ("model.blocks.3.attn.attn_value", V[1], V[2]),
]
LAYOUTS["pockettts"] = [
    (
        "transformer.layers.3.self_attn.in_proj",
        lambda d: (3 * d.q * d.d, d.n),
        lambda w, d: dict(zip(("attn_q", "attn_k", "attn_v"), np.split(w, 3), strict=True)),
    ),
    ("transformer.layers.3.linear1", lambda d: (d.ff, d.n), lambda w, d: {"ffn_up": w}),
]
LAYOUTS["spark2_5"] = [
    ("model.layers.3.self_attn.q_k_v_proj", lambda d: ((d.q + 2 * d.kv) * d.d, d.n), lambda w, d: {"attn_qkv": w}),
    ("model.layers.3.self_attn.g_proj", lambda d: (d.q, d.n), lambda w, d: {"attn_gate": w}),
]
LAYOUTS["deepseek4"] = [
    (f"{prefix}layers.3.{path}", lambda d: (d.ff, d.n), lambda w, d, tensor=tensor: {tensor: w})
    for prefix, paths in {
        "": {"attn.wq_a": "attn_q_a", "attn.wkv": "attn_kv", "attn.wo_a": "attn_output_a", "attn.wo_b": "attn_output_b",
             "attn.compressor.wkv": "attn_compressor_kv", "attn.indexer.compressor.wgate": "indexer_compressor_gate",
             "attn.indexer.wq_b": "indexer.attn_q_b", "attn.indexer.weights_proj": "indexer.proj",
             "ffn.gate": "ffn_gate_inp", "ffn.shared_experts.w3": "ffn_up_shexp"},
        "model.": {"self_attn.q_a_proj": "attn_q_a", "self_attn.kv_proj": "attn_kv", "self_attn.o_a_proj": "attn_output_a",
                   "self_attn.compressor.gate_proj": "attn_compressor_gate", "mlp.gate": "ffn_gate_inp",
                   "self_attn.compressor.indexer.kv_proj": "indexer_compressor_kv",
                   "self_attn.compressor.indexer.scorer.weights_proj": "indexer.proj",
                   "mlp.shared_experts.up_proj": "ffn_up_shexp"},
    }.items()
    for path, tensor in paths.items()
]  # fmt: skip
LAYOUTS["paddleocr"] = LAYOUTS["ernie4_5"]
LAYOUTS["jais"] = [
    times("transformer.wte", lambda d: (20, d.n), "token_embd", 23.0),
    times("lm_head", lambda d: (20, d.n), "output", 29.0 * 3.0),
    times("transformer.h.3.attn.c_attn", lambda d: (3 * d.n, d.n), "attn_qkv", 1.0),
]
LAYOUTS["granitemoe"] = LAYOUTS["granitemoe"] + GRANITE_MOE
LAYOUTS["granitehybrid"] = LAYOUTS["granitehybrid"] + GRANITE_MOE
LAYOUTS["granite"] = LAYOUTS["granite"] + GRANITE_DENSE


def model(architecture, dims, **changes):
    return Hparams(architecture, {**dims.values, **changes}, None, dims.config, "base")


def converted(path, pair, hparams):
    """GGUF name in the block -> the update of the tensor, stacked where it has slots."""
    found = {}
    for piece in pieces(path, pair.shape[-2:], hparams):
        stem = piece.name.removeprefix(f"blk.{LAYER}.").removesuffix(".weight")
        part = pair.take(piece)
        delta = part.b.astype(np.float64) @ part.a.astype(np.float64)
        assert piece.slot is None or piece.slot == len(found.get(stem, ()))
        found[stem] = (
            np.concatenate([found.get(stem, delta[None][:0]), delta[None]]) if piece.slot is not None else delta
        )
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("architecture", LAYOUTS)
def test_the_update_is_that_of_the_dense_layout(architecture, seed):
    dims = random_dims(seed)
    rng = np.random.default_rng(seed)
    for path, shape, layout in LAYOUTS[architecture]:
        n_out, n_in = shape(dims)
        a, b = (rng.integers(-8, 9, size).astype(np.float32) for size in ((2, n_in), (n_out, 2)))
        pair = LoraPair(path, a, b, 1.0)
        expected = layout(b.astype(np.float64) @ a.astype(np.float64), dims)
        found = converted(
            path, pair, model(architecture, dims, **({"expert_count": 0} if architecture == "granite" else {}))
        )
        assert found.keys() == expected.keys(), path
        for name, delta in expected.items():
            np.testing.assert_array_equal(found[name], delta, err_msg=f"{path} {name}")


def by_row_or_column(kind, path, n_out, n_in, rng):
    """An update that is not low rank, of a module of (n_out, n_in)."""
    place = dict(name=path, shape=(n_out, n_in))
    if kind == "dora":
        a, b = (rng.standard_normal(size).astype(np.float32) for size in ((2, n_in), (n_out, 2)))
        return Dora(**place, pair=LoraPair(path, a, b, 0.5), magnitude=rng.uniform(1, 2, n_out).astype(np.float32))
    if kind == "rows":
        return Scaled(**place, row_factors=rng.uniform(1, 2, n_out).astype(np.float32))
    if kind == "columns":
        return Scaled(**place, col_factors=rng.uniform(1, 2, n_in).astype(np.float32))
    normal = rng.standard_normal(n_in)
    turn = (np.eye(n_in) - 2 * np.outer(normal, normal) / (normal @ normal)).astype(np.float32)[None]
    return Rotated(**place, stages=[(None, turn)], row_factors=rng.uniform(1, 2, n_out).astype(np.float32))


@pytest.mark.parametrize("kind", ["dora", "rows", "columns", "turned"])
@pytest.mark.parametrize("architecture", LAYOUTS)
def test_updates_by_row_and_column_follow_the_layout_or_are_refused(architecture, kind):
    dims, rng = random_dims(2), np.random.default_rng(2)
    hparams = model(architecture, dims, **({"expert_count": 0} if architecture == "granite" else {}))
    for path, shape, layout in LAYOUTS[architecture]:
        n_out, n_in = shape(dims)
        if n_out * n_in > 20000:
            continue
        update = by_row_or_column(kind, path, n_out, n_in, rng)
        weights = rng.standard_normal((n_out, n_in)).astype(np.float32)
        before, after = layout(weights, dims), layout(weights + update.change(0, weights), dims)
        before, after = ({key: w.reshape(-1, w.shape[-1]) for key, w in found.items()} for found in (before, after))
        found = {key: w.astype(np.float32) for key, w in before.items()}
        turned = False
        for piece in pieces(path, (n_out, n_in), hparams):
            stem = piece.name.removeprefix(f"blk.{LAYER}.").removesuffix(".weight")
            if piece.transpose and kind == "dora":
                part, rows = update.take(piece), before[stem].astype(np.float32)
                part.measure(lambda first, n, rows=rows: rows[first : first + n])
                found[stem] = found[stem] + part.change(0, rows)
            elif piece.transpose and kind == "turned":
                with pytest.raises(UnsupportedError, match="transposed"):
                    update.take(piece)
                turned = True
            else:
                found[stem] = found[stem] + update.take(piece).change(0, before[stem].astype(np.float32))
        assert turned == (kind == "turned" and path.rpartition(".")[2] in ("kv_b_proj", "w2")), path
        for stem in [] if turned else after:
            np.testing.assert_allclose(found[stem], after[stem], rtol=1e-4, atol=1e-4, err_msg=f"{path} {stem}")


def kind(path):
    """The last two parts of a module's path, without numbers."""
    return tuple(re.sub(r"\.\d+(?=\.|$)", "", path).split(".")[-2:])


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "clip"])
def test_all_other_modules_stay_as_they_are(architecture):
    """Of each row: every module of its classes that has no layout here is the tensor, or one expert of it."""
    modules = [path for paths in MODULES.get(architecture, {}).values() for path in paths]
    modules += OWN_CODE.get(architecture, {})
    own = {kind(path) for path, _, _ in LAYOUTS.get(architecture, ())}
    dims, rng, n = random_dims(3), np.random.default_rng(3), 0
    hparams = model({"nemotron_h": "nemotron_h_moe"}.get(architecture, architecture), dims)
    for path in dict.fromkeys(modules):
        if kind(path) in own or kind(path)[-1] == "gate_up_proj" or is_other_tower(path) or why_skipped(path, hparams):
            continue
        a, b = (rng.integers(-8, 9, size).astype(np.float32) for size in ((2, 20), (24, 2)))
        (piece,) = pieces(path, (24, 20), hparams)
        part = LoraPair(path, a, b, 1.0).take(piece)
        np.testing.assert_array_equal(part.b.astype(np.float64) @ part.a, b.astype(np.float64) @ a, err_msg=path)
        assert (piece.slot is not None) == bool(re.search(r"(experts|moe)\.\d+\.|altup_\w*projections", path)), path
        n += 1
    assert n or architecture in LAYOUTS


MOE = [
    name
    for name in ARCHITECTURES
    if any(path.endswith("experts.gate_up_proj") for p in MODULES.get(name, {}).values() for path in p)
]


@pytest.mark.parametrize("architecture", MOE)
def test_gate_and_up_of_packed_experts(architecture):
    dims, rng = random_dims(1), np.random.default_rng(1)
    path = next(p for ps in MODULES[architecture].values() for p in ps if p.endswith("experts.gate_up_proj"))
    path = re.sub(r"\.\d+\.", f".{LAYER}.", path)
    a, b = (rng.integers(-8, 9, size).astype(np.float32) for size in ((dims.E, 2, 20), (dims.E, 24, 2)))
    whole = b.astype(np.float64) @ a
    found = converted(path, LoraPair(path, a, b, 1.0), model(architecture, dims))
    if architecture in ("gemma4", "mistral4"):
        np.testing.assert_array_equal(found["ffn_gate_up_exps"], whole)
    else:
        gate, up = (whole[:, ::2], whole[:, 1::2]) if architecture == "gpt-oss" else np.split(whole, 2, axis=1)
        np.testing.assert_array_equal(found["ffn_gate_exps"], gate)
        np.testing.assert_array_equal(found["ffn_up_exps"], up)


def test_every_row_with_a_rule_has_its_layout_here():
    def moves(out):
        return out.rows or out.cols or out.scale or out.slots

    assert {
        name for name, row in ARCHITECTURES.items() if any(moves(out) for rule in row.rules for out in rule.outs)
    } <= LAYOUTS.keys()


def test_a_dense_granite_hybrid_has_no_shared_expert():
    dims = random_dims(1)
    found = pieces(
        "model.layers.3.shared_mlp.input_linear", (2 * dims.ff, dims.n), model("granitehybrid", dims, expert_count=0)
    )
    assert [piece.name for piece in found] == ["blk.3.ffn_gate.weight", "blk.3.ffn_up.weight"]


def test_glm4_without_sections_keeps_its_rows():
    dims = random_dims(1)
    (piece,) = pieces(Q[0], Q[1](dims), model("glm4", dims, **{"rope.dimension_sections": None}))
    assert piece.rows is None


@pytest.mark.parametrize("architecture", ["llama", "falcon", "qwen35", "deepseek2"])
def test_a_shape_that_does_not_divide_is_an_error(architecture):
    dims = random_dims(2)
    path, shape, _ = LAYOUTS[architecture][0]
    with pytest.raises(ValueError):
        pieces(path, (shape(dims)[0] + 1, dims.n), model(architecture, dims))


def test_no_class_has_two_rows():
    classes = [name for row in ARCHITECTURES.values() for name in row.hf]
    assert len(classes) == len(set(classes))


def test_gguf_or_its_successor_knows_every_row():
    """What PyPI's gguf does not know, llama.cpp's converter does: it registers the classes."""
    from gguf.constants import MODEL_ARCH_NAMES

    census = json.loads((FIXTURES / "llama-cpp-classes.json").read_text())
    assert ARCHITECTURES.keys() <= set(MODEL_ARCH_NAMES.values()) | set(census["text"].values())
