"""``names``: every weight matrix of the model classes that transformers has, and of those with code of their own, finds
its tensor."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import pytest

from lora_gguf.errors import MalformedError
from lora_gguf.mapping.architectures import ARCHITECTURES
from lora_gguf.mapping.hparams import Hparams, architecture_of
from lora_gguf.mapping.names import (
    candidates,
    is_other_tower,
    layer_of,
    pieces,
    split_expert,
    tensor_name,
    tensors_of,
    why_skipped,
)
from tests.common import FIXTURES

MODULES = json.loads((FIXTURES / "modules.json").read_text())
CASES = [(architecture, name) for architecture, classes in MODULES.items() for name in classes]
SIZES = {
    "block_count": 4,
    "expert_count": 4,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
}
SIZES |= {
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.state_size": 8,
    "ssm.inner_size": 32,
    "attention.key_length_mla": 16,
}
SIZES |= {"attention.value_length_mla": 8, "rope.dimension_count": 8}
MULTIPLIERS = {
    "mlp_multipliers": [1, 1],
    "ssm_multipliers": [1] * 5,
    "mamba_d_ssm": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}
# architectures of which one class has layers that only some bases have
FUSED_OR_DENSE = ("granitehybrid", "nomic-bert")
# the fixed shapes that some layouts need
ROWS = {"kv_b_proj": 64, "in_proj_qkv": 64, "in_proj_qkvz": 96, "q_proj": 5120}


def model(architecture):
    return Hparams(
        architecture,
        SIZES,
        None,
        dict.fromkeys(("attention_in_multiplier", "key_multiplier"), 1.0) | MULTIPLIERS,
        "base",
    )


def targets(architecture, path):
    """The GGUF tensors of a module; the layout's own demands on the shape do not matter here."""
    hparams = model(architecture)
    try:
        return [piece.name for piece in pieces(path, (ROWS.get(path.rpartition(".")[2], 960), 960), hparams)]
    except (ValueError, MalformedError):
        return [tensor_name(path, hparams)]


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_every_matrix_of_a_class_has_its_tensor(architecture, name):
    from gguf.constants import TENSOR_NAMES

    paths = MODULES[architecture][name]
    architecture = {"nemotron_h": "nemotron_h_moe"}.get(architecture, architecture)
    known = {TENSOR_NAMES[tensor] for tensor in tensors_of(architecture)}
    claimed = defaultdict(set)
    for path in paths:
        if is_other_tower(path) or why_skipped(path, model(architecture)):
            continue
        found = targets(architecture, path)
        assert found and None not in found, path
        for tensor in found:
            claimed[tensor].add(split_expert(path)[0])
            template = re.sub(r"blk\.\d+", "blk.{bid}", tensor.removesuffix(".weight"))
            assert template in known or architecture in FUSED_OR_DENSE, (path, tensor)
    twice = {tensor: paths for tensor, paths in claimed.items() if len(paths) > 1}
    assert not twice


# classes that transformers does not have: modules as their own code calls them, and their tensors
OWN_CODE_TEXT = """
bailingmoe3
    model.layers.3.attention.q_proj attn_q
    model.layers.3.attention.f_proj ssm_f_a
    model.layers.3.attention.b_proj ssm_beta
    model.layers.3.attention.dense attn_output
    model.layers.3.attention.q_a_proj attn_q_a
    model.layers.3.attention.kv_a_proj_with_mqa attn_kv_a_mqa
    model.layers.3.mlp.gate_proj ffn_gate
cohere2moe
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.experts.7.up_proj ffn_up_exps
    model.layers.3.mlp.gate ffn_gate_inp
deepseek32
    model.layers.3.self_attn.q_a_proj attn_q_a
    model.layers.3.self_attn.o_proj attn_output
    model.layers.3.mlp.shared_experts.down_proj ffn_down_shexp
dots3note
    model.layers.3.self_attn.q_a_proj attn_q_a
    model.layers.3.mlp.experts.7.gate_proj ffn_gate_exps
glm5-next
    model.layers.3.self_attn.q_a_proj attn_q_a
    model.layers.3.mlp.down_proj ffn_down
granite_swa
    model.layers.3.self_attn.o_proj attn_output
    model.layers.3.mlp.gate_proj ffn_gate
    model.layers.3.block_sparse_moe.input_linear ffn_gate_up_exps
    model.layers.3.shared_mlp.output_linear ffn_down_shexp
hy_v3
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.experts.7.down_proj ffn_down_exps
    model.layers.3.mlp.shared_mlp.up_proj ffn_up_shexp
hy_v4
    model.layers.3.self_attn.q_a_proj attn_q_a
    model.layers.3.self_attn.indexer.wq_b indexer.attn_q_b
kimi-k3
    model.layers.3.self_attn.b_proj ssm_beta
    model.layers.3.block_sparse_moe.routed_expert_up_proj ffn_routed_up
    model.layers.3.self_attn.q_a_proj attn_q_a
laguna
    model.layers.3.self_attn.g_proj attn_gate
    model.layers.3.mlp.experts.7.up_proj ffn_up_exps
maple
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.experts.7.up_proj ffn_up_exps
mellum
    model.layers.3.self_attn.k_proj attn_k
    model.layers.3.mlp.gate ffn_gate_inp
minimax-01
    model.layers.3.self_attn.qkv_proj attn_qkv
    model.layers.3.self_attn.output_gate attn_gate
    model.layers.3.self_attn.out_proj attn_output
    model.layers.3.block_sparse_moe.experts.7.w1 ffn_gate_exps
minimax-m3
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.self_attn.index_q_proj indexer.q_proj
    model.layers.3.block_sparse_moe.experts.7.w2 ffn_down_exps
muse-glimmer
    model.layers.3.self_attn.v_proj attn_v
    model.layers.3.mlp.up_proj ffn_up
nanbeige
    model.layers.3.self_attn.v_proj attn_v
    model.layers.3.mlp.up_proj ffn_up
spark2_5
    model.layers.3.self_attn.q_k_v_proj attn_qkv
    model.layers.3.self_attn.o_proj attn_output
    model.layers.3.mlp.down_proj ffn_down
qwen3tts
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.gate_proj ffn_gate
qwen4exp
    model.layers.3.mlp.shared_expert.up_proj ffn_up_shexp
    model.layers.3.linear_attn.in_proj_qkv attn_qkv
hrm_text
    model.layers.3.attn.o_proj attn_output
    model.layers.3.mlp.down_proj ffn_down
talkie
    model.blocks.3.attn.attn_value attn_v
    model.blocks.3.attn.attn_resid attn_output
    model.blocks.3.mlp.mlp_gate ffn_gate
    model.blocks.3.mlp.mlp_linear ffn_up
    model.blocks.3.mlp.mlp_resid ffn_down
    lm_head output
pockettts
    transformer.layers.3.self_attn.out_proj attn_output
    transformer.layers.3.linear2 ffn_down
graniteswitch
    model.layers.3.shared_mlp.output_linear.base_layer ffn_down
    model.layers.3.self_attn.o_proj.base_layer attn_output
deepseek4
    layers.3.attn.wq_b attn_q_b
    layers.3.ffn.shared_experts.w1 ffn_gate_shexp
    layers.3.ffn.experts.7.w1 ffn_gate_exps
    model.layers.3.mlp.experts.7.up_proj ffn_up_exps
    head output
    embed token_embd
qwen
    transformer.h.3.attn.c_attn attn_qkv
    transformer.h.3.attn.c_proj attn_output
    transformer.h.3.mlp.w1 ffn_up
    transformer.h.3.mlp.w2 ffn_gate
    transformer.h.3.mlp.c_proj ffn_down
baichuan
    model.layers.3.self_attn.o_proj attn_output
    model.layers.3.mlp.gate_proj ffn_gate
    lm_head output
internlm2
    model.layers.3.attention.wo attn_output
    model.layers.3.feed_forward.w1 ffn_gate
    model.layers.3.feed_forward.w2 ffn_down
    model.layers.3.feed_forward.w3 ffn_up
    output output
    model.tok_embeddings token_embd
minicpm
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.up_proj ffn_up
minicpm3
    model.layers.3.self_attn.q_a_proj attn_q_a
    model.layers.3.self_attn.kv_b_proj attn_kv_b
chatglm
    transformer.encoder.layers.3.self_attention.query_key_value attn_qkv
    transformer.encoder.layers.3.self_attention.dense attn_output
    transformer.encoder.layers.3.mlp.dense_h_to_4h ffn_up
    transformer.encoder.layers.3.mlp.dense_4h_to_h ffn_down
    transformer.embedding.word_embeddings token_embd
    transformer.output_layer output
exaone
    transformer.h.3.attn.attention.q_proj attn_q
    transformer.h.3.attn.attention.out_proj attn_output
    transformer.h.3.mlp.c_fc_0 ffn_gate
    transformer.h.3.mlp.c_fc_1 ffn_up
    transformer.h.3.mlp.c_proj ffn_down
orion
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.down_proj ffn_down
xverse
    model.layers.3.self_attn.o_proj attn_output
    model.layers.3.mlp.gate_proj ffn_gate
codeshell
    transformer.h.3.attn.c_attn attn_qkv
    transformer.h.3.attn.c_proj attn_output
    transformer.h.3.mlp.c_fc ffn_up
    transformer.h.3.mlp.c_proj ffn_down
refact
    transformer.h.3.attn.c_proj attn_output
    transformer.h.3.mlp.c_proj ffn_down
openelm
    transformer.layers.3.attn.qkv_proj attn_qkv
    transformer.layers.3.attn.out_proj attn_output
    transformer.layers.3.ffn.proj_2 ffn_down
plamo
    model.layers.layers.3.self_attn.k_proj attn_k
    model.layers.layers.3.mlp.down_proj ffn_down
plamo2
    model.layers.layers.3.mixer.qkv_proj attn_qkv
    model.layers.layers.3.mixer.o_proj attn_output
    model.layers.layers.3.mlp.gate_up_proj ffn_up
    model.layers.layers.3.mixer.in_proj ssm_in
plm
    model.layers.3.self_attn.kv_a_proj_with_mqa attn_kv_a_mqa
    model.layers.3.mlp.up_proj ffn_up
deepseek
    model.layers.3.mlp.experts.2.gate_proj ffn_gate_exps
    model.layers.3.mlp.shared_experts.down_proj ffn_down_shexp
    model.layers.3.mlp.gate ffn_gate_inp
dbrx
    transformer.blocks.3.norm_attn_norm.attn.Wqkv attn_qkv
    transformer.blocks.3.norm_attn_norm.attn.out_proj attn_output
    transformer.blocks.3.ffn.router.layer ffn_gate_inp
dots1
    model.layers.3.mlp.experts.2.up_proj ffn_up_exps
    model.layers.3.mlp.shared_experts.up_proj ffn_up_shexp
arctic
    model.layers.3.block_sparse_moe.experts.2.w2 ffn_down_exps
    model.layers.3.residual_mlp.w1 ffn_gate
bailingmoe
    model.layers.3.attention.dense attn_output
    model.layers.3.mlp.experts.2.down_proj ffn_down_exps
hunyuan-moe
    model.layers.3.mlp.experts.2.gate_proj ffn_gate_exps
    model.layers.3.mlp.shared_mlp.up_proj ffn_up_shexp
hunyuan-dense
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.up_proj ffn_up
jamba
    model.layers.3.feed_forward.experts.2.gate_proj ffn_gate_exps
    model.layers.3.mamba.in_proj ssm_in
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.feed_forward.router ffn_gate_inp
mamba
    backbone.layers.3.mixer.in_proj ssm_in
    backbone.layers.3.mixer.x_proj ssm_x
    backbone.layers.3.mixer.out_proj ssm_out
mamba2
    backbone.layers.3.mixer.in_proj ssm_in
    model.backbone.layers.3.mixer.out_proj ssm_out
nemotron
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.up_proj ffn_up
    model.layers.3.mlp.down_proj ffn_down
nemotron_h_moe
    model.layers.3.mixer.experts.2.up_proj ffn_up_exps
    backbone.layers.3.mixer.shared_experts.down_proj ffn_down_shexp
    model.layers.3.mixer.gate ffn_gate_inp
lfm2moe
    model.layers.3.feed_forward.experts.2.w1 ffn_gate_exps
    model.layers.3.feed_forward.gate ffn_gate_inp
    model.layers.3.conv.in_proj shortconv.in_proj
gemma3n
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.per_layer_input_gate inp_gate
    model.layers.3.laurel.linear_left laurel_l
    model.language_model.altup_projections.2 altup_proj
    model.altup_unembed_projections.0 altup_unembd_proj
    model.layers.3.altup.modality_router altup_router
falcon-h1
    model.layers.3.mamba.in_proj ssm_in
    model.layers.3.feed_forward.up_proj ffn_up
llada
    model.transformer.blocks.3.v_proj attn_v
    model.transformer.blocks.3.attn_out attn_output
    model.transformer.blocks.3.ff_proj ffn_gate
    model.transformer.blocks.3.up_proj ffn_up
    model.transformer.blocks.3.ff_out ffn_down
llada-moe
    model.layers.3.mlp.experts.2.up_proj ffn_up_exps
dream
    model.layers.3.self_attn.q_proj attn_q
rnd1
    model.layers.3.mlp.experts.2.up_proj ffn_up_exps
smallthinker
    model.layers.3.block_sparse_moe.experts.2.up ffn_up_exps
    model.layers.3.block_sparse_moe.primary_router ffn_gate_inp
pangu-embedded
    model.layers.3.self_attn.q_proj attn_q
bailingmoe2
    model.layers.3.attention.query_key_value attn_qkv
    model.layers.3.mlp.shared_experts.up_proj ffn_up_shexp
deci
    model.layers.3.mlp.gate_proj ffn_gate
cogvlm
    model.layers.3.self_attn.language_expert_query_key_value attn_qkv
neo-bert
    transformer_encoder.3.qkv attn_qkv
jina-bert-v2
    encoder.layer.3.attention.self.query attn_q
    encoder.layer.3.mlp.up_gated_layer ffn_up
nomic-bert-moe
    encoder.layers.3.attn.Wqkv attn_qkv
    encoder.layers.3.mlp.fc1 ffn_up
maincoder
    model.layers.3.self_attn.q_proj attn_q
bitnet
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.down_proj ffn_down
chameleon
    model.layers.3.self_attn.q_proj attn_q
exaone-moe
    model.layers.3.mlp.experts.2.up_proj ffn_up_exps
plamo3
    model.layers.layers.3.mlp.down_proj ffn_down
jais
    transformer.h.3.attn.c_attn attn_qkv
    transformer.h.3.mlp.c_fc ffn_up
    transformer.h.3.mlp.c_fc2 ffn_gate
llama-embed
    layers.3.self_attn.q_proj attn_q
grok
    transformer.decoder_layer.3.moe.2.linear_v ffn_up_exps
    transformer.decoder_layer.3.moe.2.linear_1 ffn_down_exps
    model.layers.3.block_sparse_moe.experts.2.w1 ffn_gate_exps
    transformer.decoder_layer.3.multi_head_attention.query attn_q
grovemoe
    model.layers.3.mlp.chunk_experts.1.gate_proj ffn_gate_chexps
    model.layers.3.mlp.experts.1.gate_proj ffn_gate_exps
jais2
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.up_proj ffn_up
hunyuan_vl
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.mlp.down_proj ffn_down
paddleocr
    model.layers.3.self_attn.o_proj attn_output
    model.layers.3.mlp.down_proj ffn_down
deepseek2-ocr
    model.layers.3.self_attn.q_proj attn_q
jina-bert-v3
    roberta.encoder.layers.3.mixer.Wqkv attn_qkv
    roberta.encoder.layers.3.mixer.out_proj attn_output
    roberta.encoder.layers.3.mlp.fc1 ffn_up
    roberta.encoder.layers.3.mlp.fc2 ffn_down
rwkv6
    rwkv.blocks.3.attention.key time_mix_key
    rwkv.blocks.3.attention.gate time_mix_gate
    rwkv.blocks.3.attention.output time_mix_output
    rwkv.blocks.3.feed_forward.receptance channel_mix_receptance
    rwkv.blocks.3.feed_forward.value channel_mix_value
    rwkv.embeddings token_embd
    head output
rwkv6qwen2
    model.layers.3.self_attn.q_proj time_mix_receptance
    model.layers.3.self_attn.o_proj time_mix_output
    model.layers.3.mlp.gate_proj ffn_gate
rwkv7
    model.layers.3.attn.r_proj time_mix_receptance
    model.layers.3.attention.key time_mix_key
    model.layers.3.attn.o_proj time_mix_output
    model.layers.3.ffn.key channel_mix_key
    model.layers.3.feed_forward.value channel_mix_value
    lm_head output
arwkv7
    model.layers.3.self_attn.time_mixer.receptance time_mix_receptance
    model.layers.3.self_attn.time_mixer.v_proj time_mix_value
    model.layers.3.mlp.up_proj ffn_up
step35
    model.layers.3.self_attn.q_proj attn_q
    model.layers.3.self_attn.g_proj attn_gate
    model.layers.3.moe.gate ffn_gate_inp
    model.layers.3.moe.up_proj ffn_up_exps
    model.layers.3.share_expert.up_proj ffn_up_shexp
    model.layers.3.mlp.down_proj ffn_down
"""


def own_code():
    """architecture -> module path -> tensor."""
    architecture, found = "", {}
    for line in OWN_CODE_TEXT.split("\n"):
        if line.startswith(" "):
            path, tensor = line.split()
            found[architecture][path] = tensor
        elif line:
            architecture, found[line] = line, {}
    return found


OWN_CODE = own_code()


@pytest.mark.parametrize("architecture", OWN_CODE)
def test_modules_of_classes_with_code_of_their_own(architecture):
    for path, tensor in OWN_CODE[architecture].items():
        name = f"blk.{layer_of(path)}.{tensor}.weight" if layer_of(path) is not None else f"{tensor}.weight"
        assert targets(architecture, path) == [name], path


def test_every_row_is_tested_by_name():
    assert ARCHITECTURES.keys() - {"clip"} <= MODULES.keys() | OWN_CODE.keys()  # its towers: test_towers.py


@pytest.mark.parametrize(
    ("path", "whole", "slot"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj", "model.layers.3.mlp.experts.gate_proj", 17),
        ("model.layers.3.mlp.experts.gate_up_projs.5", "model.layers.3.mlp.experts.gate_up_proj", 5),
        ("transformer.decoder_layer.3.moe.2.linear_v", "transformer.decoder_layer.3.moe.linear_v", 2),
        ("model.altup_unembed_projections.2", "model.altup_unembed_projections", 2),
        ("model.layers.3.mlp.shared_experts.gate_proj", "model.layers.3.mlp.shared_experts.gate_proj", None),
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.gate_up_proj", None),
    ],
)
def test_experts_are_told_by_number(path, whole, slot):
    assert split_expert(path) == (whole, slot)


def test_candidates_unwrap_text_models():
    for path in ("language_model.model.layers.0.x", "model.language_model.layers.0.x", "model.text_model.layers.0.x"):
        assert "model.layers.0.x" in candidates(path)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 8}}, "gemma3"),
        (
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "text_config": {"architectures": ["Qwen2ForCausalLM"]},
            },
            "qwen2",
        ),
        (
            {"architectures": ["InternVLChatModel"], "llm_config": {"architectures": ["InternLM2ForCausalLM"]}},
            "internlm2",
        ),
        ({"architectures": ["NemotronHForCausalLM"], "num_experts_per_tok": 6}, "nemotron_h_moe"),
        ({"architectures": ["NemotronHForCausalLM"]}, "nemotron_h"),
        ({"architectures": ["XLMRobertaModel"], "lora_adaptations": ["text-matching"]}, "jina-bert-v3"),
        ({"architectures": ["NomicBertModel"], "moe_every_n_layers": 2}, "nomic-bert-moe"),
        ({"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention", "mamba"]}, "granitehybrid"),
        ({"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["attention"]}, "granite"),
    ],
)
def test_the_architecture_of_a_configuration(config, architecture):
    assert architecture_of(config) == architecture
