"""What is particular to each vision or audio tower and its projector, as data: the modules of Hugging Face, and the
tensors of the mmproj GGUF that hold their weights.

A row stands under ``clip.projector_type`` (or ``clip.vision.projector_type``, ``clip.audio.projector_type``). A rule's
pattern is a regular expression for the end of a module's path; ``#`` in a tensor's name is the number that the pattern
finds, ``##`` the tensor's number that comes in that place in the mmproj. Of several rules for one module the first
counts whose tensors the mmproj has: converters have changed over time, and the file is the authority.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_gguf.mapping import transforms as t
from lora_gguf.mapping.architectures import Out, Rule

CLIP = "clip"  # general.architecture of every mmproj
VISION_HEADS = "vision.attention.head_count"

Tensor = str | Out | tuple[Out, ...]


@dataclass(frozen=True)
class Tower:
    """``hf`` are the class names in config.json's ``architectures``."""

    hf: tuple[str, ...]
    rules: tuple[Rule, ...]


def under(root: str, tensors: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Return the rules of modules below ``root``, a regular expression: module, ``#`` for a number, and tensor.

    A tensor's name, or an ``Out`` of it, or the several that the module is cut into.
    """
    return tuple(Rule(root + numbers(module), outs(tensor)) for module, tensor in tensors.items())


def numbers(module: str) -> str:
    """Return a regular expression for a module's name in which ``#`` is any number."""
    return re.escape(module).replace(re.escape("#"), r"(\d+)")


def outs(tensor: Tensor) -> tuple[Out, ...]:
    if isinstance(tensor, str):
        return (Out(tensor),)
    return (tensor,) if isinstance(tensor, Out) else tensor


def layers(root: str, block: str, tensors: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Return ``under``, of each layer: ``root`` ends before the layer's number, the tensors stand in ``block``."""
    named = {
        f"#.{module}": tuple(Out(f"{block}.#.{out.tensor}", out.rows, out.cols) for out in outs(tensor))
        for module, tensor in tensors.items()
    }
    return under(root, named)


def apart(*names: str) -> tuple[Out, ...]:
    """Return the tensors that equal parts of a module's rows become."""
    return tuple(Out(name, (t.part(i, len(names)),)) for i, name in enumerate(names))


def frames(tensor: str) -> tuple[Out, ...]:
    """Return a convolution over two frames, as one over each."""
    return Out(tensor, cols=(t.frame(0, 2),)), Out(f"{tensor}.weight.1", cols=(t.frame(1, 2),))


QKV = apart("attn_q", "attn_k", "attn_v")
PATCHES = frames("v.patch_embd")
ROTARY_Q = t.rotary(VISION_HEADS)

# a layer's modules and tensors, as models have them in common
ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
}  # fmt: skip
MLP = {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
GATED_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"layer_norm1": "ln1", "layer_norm2": "ln2"}
NORMS_1 = {"norm1": "ln1", "norm2": "ln2"}
BLOCK = NORMS_1 | {"attn.proj": "attn_out"}

# SigLIP and CLIP, under the names that models give them
VIT_ROOT = r"(vision_tower|vision_model|vpm|siglip2|visual)\.(vision_model\.)?"
VIT = layers(rf"{VIT_ROOT}encoder\.layers\.", "v.blk", ATTENTION | MLP | NORMS) + under(
    VIT_ROOT,
    {
        "embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd",
        "pre_layrnorm": "v.pre_ln", "post_layernorm": "v.post_ln",
    },
)  # fmt: skip
# SigLIP 2: patches are rows of pixels, whose colours lie side by side
FLAT_VIT = under(VIT_ROOT, {"embeddings.patch_embedding": Out("v.patch_embd", cols=(t.channels_first,))}) + VIT
WHISPER_ROOT = r"(audio_tower|audio_encoder\.whisper|speech_encoder)\."
WHISPER = layers(
    rf"{WHISPER_ROOT}layers\.",
    "a.blk",
    ATTENTION | {"fc1": "ffn_up", "fc2": "ffn_down", "self_attn_layer_norm": "ln1", "final_layer_norm": "ln2"},
) + under(WHISPER_ROOT, {"conv#": "a.conv1d.#", "layer_norm": "a.post_ln"})
PROJECTOR = r"multi_modal_projector\."
# Qwen's and GLM's
VISUAL = r"visual\."
QWEN_BLOCKS = (
    layers(
        rf"{VISUAL}blocks\.",
        "v.blk",
        BLOCK | MLP | GATED_MLP | {"mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down"} | {"attn.qkv": "attn_qkv"},
    )
    + layers(
        rf"{VISUAL}blocks\.", "v.blk", {"attn.qkv": QKV, "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v"}
    )
    + under(VISUAL, {"patch_embed.proj": PATCHES, "pos_embed": "v.position_embd"})
)
QWEN2VL = QWEN_BLOCKS + under(r"(visual\.|vision_tower\.)merger\.", {"mlp.#": "mm.#", "ln_q": "v.post_ln"})
DEEPSTACK = {"norm": "v.deepstack.##.norm", "linear_fc1": "v.deepstack.##.fc1", "linear_fc2": "v.deepstack.##.fc2"}
OMNI_NAMES = {"ln_q": "norm", "mlp.0": "linear_fc1", "mlp.2": "linear_fc2"}
QWEN3VL = (
    QWEN_BLOCKS
    + under(rf"{VISUAL}merger\.", {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"})
    + under(rf"{VISUAL}merger\.", {"ln_q": "v.post_ln", "mlp.0": "mm.0", "mlp.2": "mm.2"})
    + under(rf"{VISUAL}deepstack_merger_list\.", {f"#.{module}": tensor for module, tensor in DEEPSTACK.items()})
    + under(rf"{VISUAL}merger_list\.", {f"#.{old}": DEEPSTACK[new] for old, new in OMNI_NAMES.items()})
)
LING3VL = QWEN_BLOCKS + under(rf"{VISUAL}merger\.", {"norm": "mm.input_norm"}) + under(r"linear_proj\.", {"#": "mm.#"})
GLM4V = QWEN_BLOCKS + under(
    VISUAL,
    {
        "merger.proj": "mm.model.fc", "merger.gate_proj": "mm.gate", "merger.up_proj": "mm.up",
        "merger.down_proj": "mm.down", "merger.post_projection_norm": "mm.post_norm", "downsample": "mm.patch_merger",
        "post_conv_layernorm": "v.norm_embd", "post_layernorm": "v.post_ln",
        "embeddings.position_embedding": "v.position_embd",
    },
)  # fmt: skip
# Pixtral's, whose attention turns pairs
PIXTRAL_ROOT = r"(vision_tower|vision_encoder)\."
PIXTRAL = (
    layers(
        rf"{PIXTRAL_ROOT}transformer\.layers\.",
        "v.blk",
        {
            "attention.q_proj": Out("attn_q", (ROTARY_Q,)), "attention.k_proj": Out("attn_k", (ROTARY_Q,)),
            "attention.v_proj": "attn_v", "attention.o_proj": "attn_out", "feed_forward.gate_proj": "ffn_gate",
            "feed_forward.up_proj": "ffn_up", "feed_forward.down_proj": "ffn_down", "attention_norm": "ln1",
            "ffn_norm": "ln2",
        },
    )
    + under(PIXTRAL_ROOT, {"patch_conv": "v.patch_embd", "ln_pre": "v.pre_ln"})
    + under(
        r"(multi_modal_projector|vision_projection)\.",
        {"linear_#": "mm.#", "norm": "mm.input_norm", "patch_merger.merging_layer": "mm.patch_merger"},
    )
)  # fmt: skip
INTERNVL = (
    layers(r"vision_tower\.encoder\.layer\.", "v.blk", MLP | {
        "attention.q_proj": "attn_q", "attention.k_proj": "attn_k", "attention.v_proj": "attn_v",
        "attention.projection_layer": "attn_out", "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
        "layernorm_before": "ln1", "layernorm_after": "ln2",
    })
    + layers(rf"{VIT_ROOT}encoder\.layers\.", "v.blk", MLP | BLOCK | {
        "attn.qkv": QKV, "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
    })
    + under(r"vision_tower\.", {"embeddings.patch_embeddings.projection": "v.patch_embd"})
    + under(r"mlp1\.", {"#": "mm.model.mlp.#"})
    + under(PROJECTOR, {
        "layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3",
    })
    + VIT
)  # fmt: skip
LLAMA4 = (
    layers(r"vision_model\.model\.layers\.", "v.blk", ATTENTION | MLP | {
        "self_attn.o_proj": "attn_out", "input_layernorm": "ln1", "post_attention_layernorm": "ln2",
    })
    + under(r"vision_model\.", {
        "patch_embedding.linear": "v.patch_embd", "vision_adapter.mlp.fc#": "mm.model.mlp.#",
        "layernorm_pre": "v.pre_ln", "layernorm_post": "v.post_ln",
    })
    + under(PROJECTOR, {"linear_1": "mm.model.fc"})
)  # fmt: skip
SOFT_NORM = Out("mm.soft_emb_norm", shift=1.0)
GEMMA3 = VIT + under(
    PROJECTOR,
    {
        "mm_input_projection": "mm.input_projection",
        "mm_input_projection_weight": "mm.input_projection",
        "mm_soft_emb_norm": SOFT_NORM,
    },
)
LINEAR = r"(\.linear)?"  # Gemma 4 clips what goes in and out of a layer's linear parts, by a module of its own
GEMMA4V = (
    layers(r"vision_tower\.encoder\.layers\.", "v.blk", {
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "ln1",
        "post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ffn_post_norm",
    })
    + under(r"vision_tower\.patch_embedder\.", {"input_proj": Out("v.patch_embd", cols=(t.channels_first,))})
    + under(r"embed_vision\.(multimodal_embedder\.)?", {"embedding_projection": "mm.input_projection"})
    + under(r"(vision_embedder|embed_vision)\.", {"patch_dense": Out("v.patch_embd", cols=(t.channels_first,))})
)  # fmt: skip
GEMMA4V = (
    tuple(
        Rule(f"{rule.pattern}{LINEAR}", rule.outs)
        for rule in layers(
            r"vision_tower\.encoder\.layers\.", "v.blk", ATTENTION | GATED_MLP | {"self_attn.o_proj": "attn_out"}
        )
    )
    + GEMMA4V
)
GEMMA4A = tuple(
    Rule(f"{rule.pattern}{LINEAR}", rule.outs)
    for rule in layers(r"(audio_tower|conformer)\.layers\.", "a.blk", {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.post": "attn_out", "self_attn.relative_k_proj": "attn_k_rel",
        "feed_forward1.ffw_layer_1": "ffn_up", "feed_forward1.ffw_layer_2": "ffn_down",
        "feed_forward2.ffw_layer_1": "ffn_up_1", "feed_forward2.ffw_layer_2": "ffn_down_1",
        "lconv1d.linear_start": "conv_pw1", "lconv1d.linear_end": "conv_pw2", "lconv1d.depthwise_conv1d": "conv_dw",
        "lconv1d.pre_layer_norm": "conv_norm", "lconv1d.conv_norm": "norm_conv", "norm_pre_attn": "attn_pre_norm",
        "norm_post_attn": "attn_post_norm", "norm_out": "ln2", "feed_forward1.pre_layer_norm": "ffn_norm",
        "feed_forward1.post_layer_norm": "ffn_post_norm", "feed_forward2.pre_layer_norm": "ffn_norm_1",
        "feed_forward2.post_layer_norm": "ffn_post_norm_1",
    })
) + under(r"audio_tower\.", {
    "subsample_conv_projection.layer#.conv": "a.conv1d.#", "subsample_conv_projection.layer#.norm": "a.conv1d.#.norm",
    "subsample_conv_projection.input_proj_linear": "a.input_projection", "output_proj": "a.pre_encode.out",
}) + under(r"embed_audio\.", {"embedding_projection": "mm.a.input_projection"})  # fmt: skip
MINICPMV46 = VIT + under(
    r"vit_merger\.",
    {
        **{module: f"v.vit_merger.{tensor}" for module, tensor in ATTENTION.items()},
        "layer_norm1": "v.vit_merger.ln1", "pre_norm": "v.vit_merger.ds_ln", "linear_1": "v.vit_merger.ds_ffn_up",
        "linear_2": "v.vit_merger.ds_ffn_down",
    },
) + under(r"merger\.mlp\.0\.", {"pre_norm": "mm.input_norm", "linear_1": "mm.up", "linear_2": "mm.down"})  # fmt: skip
IDEFICS3 = VIT + under(r"connector\.", {"modality_projection.proj": "mm.model.fc"})
LFM2 = FLAT_VIT + under(PROJECTOR, {"linear_#": "mm.#", "layer_norm": "mm.input_norm"})
# LLaVA's own two layers, with and without norms, and MobileVLM's; the old converter's names
LLAVA = (
    VIT
    + under(PROJECTOR, {"linear_1": "mm.0", "linear_2": "mm.2"})
    + under(r"mm_projector\.", {"#": "mm.#", "mlp.mlp.#": "mm.model.mlp.#", "peg.peg.#": "mm.model.peg.#"})
)
RESAMPLER = VIT + under(
    r"resampler\.",
    {
        "kv_proj": "resampler.kv", "attn.out_proj": "resampler.attn.out", "proj": "resampler.proj",
        "attn.in_proj": apart("resampler.attn.q", "resampler.attn.k", "resampler.attn.v"),
        "ln_q": "resampler.ln_q", "ln_kv": "resampler.ln_kv", "ln_post": "resampler.ln_post",
    },
)  # fmt: skip
QWEN2A = WHISPER + under(r"(multi_modal_projector\.linear|audio_tower\.proj)", {"": "mm.a.fc"})
VOXTRAL = WHISPER + under(PROJECTOR, {"linear_#": "mm.a.mlp.#"})
ULTRAVOX = VOXTRAL + under(PROJECTOR, {"ln_pre": "mm.a.norm_pre", "ln_mid": "mm.a.norm_mid"})
QWEN3A = (
    WHISPER
    + under(
        r"audio_tower\.",
        {"conv2d#": "a.conv2d.#", "conv_out": "a.conv_out", "ln_post": "a.post_ln", "proj#": "mm.a.mlp.#"},
    )
    + under(PROJECTOR, {"linear_#": "mm.a.mlp.#"})
)
GLMA = WHISPER + under(
    r"audio_encoder\.",
    {"adapting.0": "mm.a.mlp.1", "adapting.2": "mm.a.mlp.2", "layer_norm": "mm.a.norm_pre"},
)
MERALION = WHISPER + under(r"", {"ln_speech": "mm.a.norm_pre"}) + under(
    r"speech_audio_adapter\.",
    {"mlp_adapter.0": "mm.a.mlp.0", "gate_proj": "mm.a.mlp.1", "pool_proj": "mm.a.mlp.2", "out_proj": "mm.a.mlp.3"},
)  # fmt: skip
CONFORMER_LAYER = {
    "self_attn.linear_q": "attn_q", "self_attn.linear_k": "attn_k", "self_attn.linear_v": "attn_v",
    "self_attn.linear_out": "attn_out", "self_attn.linear_pos": "linear_pos", "feed_forward1.linear1": "ffn_up",
    "feed_forward1.linear2": "ffn_down", "feed_forward2.linear1": "ffn_up_1", "feed_forward2.linear2": "ffn_down_1",
    "conv.pointwise_conv1": "conv_pw1", "conv.pointwise_conv2": "conv_pw2", "conv.depthwise_conv": "conv_dw",
    "norm_self_att": "ln1", "norm_out": "ln2", "norm_feed_forward1": "ffn_norm", "norm_feed_forward2": "ffn_norm_1",
    "norm_conv": "norm_conv",
}  # fmt: skip
LFM2A = (
    layers(r"conformer\.layers\.", "a.blk", CONFORMER_LAYER)
    + under(r"conformer\.", {"pre_encode.conv.#": "a.conv1d.#", "pre_encode.out": "a.pre_encode.out"})
    + under(r"audio_adapter\.", {"model.#": "mm.a.mlp.#"})
)
QFORMER_LAYER = {
    **{f"attention.attention.{name}": f"self_attn_{name[0]}" for name in ("query", "key", "value")},
    **{f"crossattention.attention.{name}": f"cross_attn_{name[0]}" for name in ("query", "key", "value")},
    "attention.output.dense": "self_attn_out", "crossattention.output.dense": "cross_attn_out",
    "attention.output.LayerNorm": "self_attn_norm", "crossattention.output.LayerNorm": "cross_attn_norm",
    "intermediate_query.dense": "ffn_up", "output_query.dense": "ffn_down", "output_query.LayerNorm": "ffn_norm",
}  # fmt: skip
GRANITE_SPEECH = (
    layers(r"encoder\.layers\.", "a.blk", {
        "attn.to_q": "attn_q", "attn.to_kv": apart("attn_k", "attn_v"), "attn.to_out": "attn_out",
        "ff1.up_proj": "ffn_up", "ff1.down_proj": "ffn_down", "ff2.up_proj": "ffn_up_1", "ff2.down_proj": "ffn_down_1",
        "conv.up_conv": "conv_pw1", "conv.down_conv": "conv_pw2", "conv.depth_conv.conv": "conv_dw",
        "attn.pre_norm": "ln1", "post_norm": "ln2", "ff1.pre_norm": "ffn_norm", "ff2.pre_norm": "ffn_norm_1",
        "conv.norm": "norm_conv",
    })
    + layers(r"projector\.qformer\.encoder\.layer\.", "a.proj_blk", QFORMER_LAYER)
    + under(r"encoder\.", {"input_linear": "a.input_projection", "out": "a.enc_ctc_out", "out_mid": "a.enc_ctc_out_mid"})
    + under(r"projector\.", {"linear": "a.proj_linear", "qformer.layernorm": "a.proj_norm"})
)  # fmt: skip
MOONVIT = layers(r"vision_tower\.encoder\.blocks\.", "v.blk", {
    "wqkv": QKV, "wo": "attn_out", "mlp.fc0": "ffn_up", "mlp.fc1": "ffn_down", "norm0": "ln1", "norm1": "ln2",
}) + under(r"vision_tower\.", {"patch_embed.proj": "v.patch_embd", "encoder.final_layernorm": "v.post_ln"})  # fmt: skip
MOONVIT_3D = layers(r"vision_tower\.encoder\.blocks\.", "v.blk", {"wqkv": Out("attn_qkv", (t.moonvit_qkv,))}) + MOONVIT
KIMIVL = MOONVIT + under(PROJECTOR, {"linear_#": "mm.#", "pre_norm": "mm.input_norm"})
KIMIK25 = MOONVIT_3D + under(r"mm_projector\.", {
    "proj.0": "mm.1", "proj.2": "mm.2", "linear_#": "mm.#", "pre_norm": "mm.input_norm",
})  # fmt: skip
JANUS = (
    layers(r"vision_model\.encoder\.layers\.", "v.blk", {"self_attn.projection_layer": "attn_out"})
    + VIT
    + under(r"aligner\.", {"fc1": "mm.0", **{f"hidden_layers.{i}": f"mm.{i + 1}" for i in range(8)}})
)
COGVLM = layers(r"vision\.transformer\.layers\.", "v.blk", MLP | {
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_out", "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
}) + under(r"vision\.", {
    "patch_embedding.proj": "v.patch_embd", "patch_embedding.position_embedding": "v.position_embd",
    "linear_proj.linear_proj": "mm.model.fc", "linear_proj.dense_h_to_4h": "mm.up", "linear_proj.gate_proj": "mm.gate",
    "linear_proj.dense_4h_to_h": "mm.down", "linear_proj.norm1": "mm.post_fc_norm",
})  # fmt: skip
DOTS_OCR = layers(r"vision_tower\.blocks\.", "v.blk", BLOCK | {
    "attn.qkv": "attn_qkv", "mlp.fc1": "ffn_gate", "mlp.fc2": "ffn_down", "mlp.fc3": "ffn_up",
}) + under(r"vision_tower\.", {
    "patch_embed.patchifier.proj": "v.patch_embd", "merger.mlp.#": "mm.#", "merger.ln_q": "mm.input_norm",
    "post_trunk_norm": "mm.post_norm",
})  # fmt: skip
PADDLEOCR = VIT + under(r"(mlp_AR|projector)\.", {"linear_#": "mm.#", "pre_norm": "mm.input_norm"})
YOUTUVL = VIT + under(r"merger\.", {"mlp.#": "mm.#", "ln_q": "mm.input_norm"})
HUNYUANVL = layers(r"(vit|vision_tower)\.layers\.", "v.blk", ATTENTION | MLP | {
    "self_attn.o_proj": "attn_out", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
    "input_layernorm": "ln1", "post_attention_layernorm": "ln2",
}) + under(r"vit\.", {
    "embeddings.patch_embedding": "v.patch_embd", "perceive.proj.#": "mm.#", "perceive.mlp": "mm.model.fc",
    "perceive.before_rms": "mm.pre_norm", "perceive.after_rms": "mm.post_norm",
}) + under(r"vision_tower\.", {
    "embeddings.patch_embedding": "v.patch_embd", "patch_merger.proj_conv": "mm.0", "patch_merger.proj_out": "mm.2",
    "patch_merger.mlp": "mm.model.fc", "patch_merger.before_rms": "mm.pre_norm", "patch_merger.after_rms": "mm.post_norm",
})  # fmt: skip
STEP3VL = layers(r"vision_model\.transformer\.resblocks\.", "v.blk", {
    "attn.in_proj": "attn_qkv", "attn.out_proj": "attn_out", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "ln_1": "ln1", "ln_2": "ln2",
}) + under(r"", {
    "vision_model.conv1": "v.patch_embd", "vision_model.ln_pre": "v.pre_ln", "vision_model.vit_downsampler1": "mm.0",
    "vision_model.vit_downsampler2": "mm.1", "vit_large_projector": "mm.model.fc",
})  # fmt: skip
NEMOTRON = layers(r"radio_model\.model\.blocks\.", "v.blk", MLP | BLOCK | {"attn.qkv": "attn_qkv"}) + under(
    r"", {"patch_generator.embedder": "v.patch_embd", "mlp1.#": "mm.model.mlp.#"}
)
MINIMAX_M3 = layers(rf"{VIT_ROOT}encoder\.layers\.", "v.blk", {
    "self_attn.q_proj": Out("attn_q", (t.minimax_qk,)), "self_attn.k_proj": Out("attn_k", (t.minimax_qk,)),
}) + under(VIT_ROOT, {"embeddings.patch_embedding": PATCHES}) + VIT + under(
    PROJECTOR, {"linear_#": "mm.#", "merge_linear_#": "mm.merger.fc#"}
) + under(r"patch_merge_mlp\.", {"linear_#": "mm.merger.fc#"})  # fmt: skip
# as transformers calls them
MINIMAX_M3 += layers(r"vision_tower\.layers\.", "v.blk", ATTENTION | MLP | NORMS | {
    "self_attn.q_proj": Out("attn_q", (t.minimax_qk,)), "self_attn.k_proj": Out("attn_k", (t.minimax_qk,)),
}) + under(r"vision_tower\.", {"embeddings.proj": PATCHES, "pre_layrnorm": "v.pre_ln"})  # fmt: skip
FRAMES_ADDED = tuple(Out("v.patch_embd", cols=(t.part(i, 2),)) for i in range(2))  # two frames that hold one image
MUSE = layers(r"vision_tower\.layers\.", "v.blk", MLP | BLOCK | {
    "attn.q_proj": Out("attn_q", (ROTARY_Q,)), "attn.k_proj": Out("attn_k", (ROTARY_Q,)), "attn.v_proj": "attn_v",
}) + under(r"", {
    "vision_adapter.fc1": "mm.0", "vision_adapter.fc2": "mm.1", "vision_projection": "mm.2",
    "patch_embedder.patch_embedding": FRAMES_ADDED,
}) + under(r"vision_tower\.", {"ln_pre": "v.pre_ln", "ln_post": "v.post_ln"})  # fmt: skip
PHI4 = FLAT_VIT + under(r"mm_projector\.", {"#": "mm.#"})
DEEPSEEK_OCR = layers(r"sam_model\.blocks\.", "v.sam.blk", {
    "attn.qkv": "attn.qkv", "attn.proj": "attn.out", "mlp.lin1": "mlp.lin1", "mlp.lin2": "mlp.lin2", "norm1": "pre_ln",
    "norm2": "post_ln",
}) + layers(r"vision_model\.transformer\.layers\.", "v.blk", MLP | NORMS | {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.out_proj": "attn_out",
}) + layers(r"qwen2_model\.model\.model\.layers\.", "v.blk", ATTENTION | GATED_MLP | {"self_attn.o_proj": "attn_out"}) + under(
    r"", {
        "sam_model.patch_embed.proj": "v.sam.patch_embd", "sam_model.neck.#": "v.sam.neck.#",
        "sam_model.net_2": "v.sam.net_2", "sam_model.net_3": "v.sam.net_3", "projector.layers": "mm.model.fc",
        "vision_model.embeddings.patch_embedding": "v.patch_embd",
    }
)  # fmt: skip

# clip.projector_type -> its row
TOWERS: dict[str, Tower] = {
    "mlp": Tower(("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM", "LlavaNextForConditionalGeneration"), LLAVA),
    "mlp_norm": Tower((), LLAVA),
    "ldp": Tower(("MobileLlamaForCausalLM",), LLAVA),
    "ldpv2": Tower((), LLAVA),
    "resampler": Tower(("MiniCPMV", "MiniCPMO"), RESAMPLER),
    "minicpmv4_6": Tower(("MiniCPMV4_6ForConditionalGeneration",), MINICPMV46),
    "qwen2vl_merger": Tower(
        ("Qwen2VLForConditionalGeneration", "Qwen2VLModel", "Sarashina2VisionForCausalLM"), QWEN2VL
    ),
    "qwen2.5vl_merger": Tower(("Qwen2_5_VLForConditionalGeneration",), QWEN2VL),
    "qwen2.5o": Tower(("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel"), QWEN2VL + QWEN2A),
    "qwen3vl_merger": Tower(
        (
            "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration", "Qwen4ExpForConditionalGeneration",
        ),
        QWEN3VL,
    ),
    "ling3vl": Tower(("BailingMoeV3VLForConditionalGeneration",), LING3VL),
    "glm4v": Tower(
        ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "GlmOcrForConditionalGeneration"), GLM4V
    ),
    "glm5v": Tower(("Glm5NextForConditionalGeneration",), GLM4V),
    "exaone4_5": Tower(("Exaone4_5_ForConditionalGeneration",), QWEN2VL),
    "gemma3": Tower(("Gemma3ForConditionalGeneration",), GEMMA3),
    "gemma4v": Tower(("Gemma4ForConditionalGeneration",), GEMMA4V),
    "gemma4a": Tower((), GEMMA4A),
    "gemma4uv": Tower(("Gemma4UnifiedForConditionalGeneration",), GEMMA4V),
    "gemma4ua": Tower((), GEMMA4A),
    "llama4": Tower(("Llama4ForConditionalGeneration",), LLAMA4),
    "internvl": Tower(("InternVLForConditionalGeneration", "InternVLChatModel", "InternVisionModel"), INTERNVL),
    "idefics3": Tower(("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), IDEFICS3),
    "pixtral": Tower(("Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration (Pixtral)"), PIXTRAL),
    "lightonocr": Tower(("LightOnOCRForConditionalGeneration",), PIXTRAL),
    "lfm2": Tower(("Lfm2VlForConditionalGeneration",), LFM2),
    "lfm2a": Tower(("Lfm2AudioForConditionalGeneration",), LFM2A),
    "ultravox": Tower(("UltravoxModel",), ULTRAVOX),
    "qwen2a": Tower(("Qwen2AudioForConditionalGeneration",), QWEN2A),
    "qwen3a": Tower(("Qwen3ASRForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"), QWEN3A),
    "voxtral": Tower(("VoxtralForConditionalGeneration",), VOXTRAL),
    "musicflamingo": Tower(("AudioFlamingo3ForConditionalGeneration",), VOXTRAL),
    "glma": Tower(("GlmasrModel",), GLMA),
    "meralion": Tower(("MERaLiON2ForConditionalGeneration",), MERALION),
    "granite_speech": Tower(
        ("GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration"), GRANITE_SPEECH
    ),
    "kimivl": Tower(("KimiVLForConditionalGeneration",), KIMIVL),
    "kimik25": Tower(("KimiK25ForConditionalGeneration", "Glm5vForConditionalGeneration"), KIMIK25),
    "janus_pro": Tower(("JanusForConditionalGeneration",), JANUS),
    "cogvlm": Tower(("CogVLMForCausalLM",), COGVLM),
    "dots_ocr": Tower(("DotsOCRForCausalLM",), DOTS_OCR),
    "paddleocr": Tower(("PaddleOCRVLForConditionalGeneration", "PaddleOCRVisionModel"), PADDLEOCR),
    "youtuvl": Tower(("YoutuVLForConditionalGeneration",), YOUTUVL),
    "hunyuanvl": Tower(("HunYuanVLForConditionalGeneration",), HUNYUANVL),
    "step3vl": Tower(("StepVLForConditionalGeneration", "Step3p7ForConditionalGeneration"), STEP3VL),
    "nemotron_v2_vl": Tower(("NemotronH_Nano_VL_V2", "RADIOModel"), NEMOTRON),
    "minimax_m3": Tower(("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLForConditionalGeneration"), MINIMAX_M3),
    "phi4": Tower(("Phi4ForCausalLMV",), PHI4),
    "deepseekocr": Tower(("DeepseekOCRForCausalLM", "UnlimitedOCRForCausalLM"), DEEPSEEK_OCR),
    "deepseekocr2": Tower(("DeepseekOCR2ForCausalLM",), DEEPSEEK_OCR),
    "muse-glimmer": Tower(("MuseGlimmerForConditionalGeneration",), MUSE),
}  # fmt: skip
UNKNOWN_LAYOUT = (
    "the layout of its weights is not known to us: merge with PEFT, then convert the merged model with llama.cpp's "
    "convert_hf_to_gguf.py --mmproj"
)
SPEECH = "a part that makes speech, which is not fine-tuned with adapters: name the GGUF of the language model"
# what llama.cpp's converter makes and no adapter is merged into: clip.projector_type -> (the classes, why)
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "deepseek4v": (("DeepseekV4ForCausalLM",), UNKNOWN_LAYOUT),
    "dots3note_v": (("Dots3NoteForCausalLM", "Dots3NoteForConditionalGeneration"), UNKNOWN_LAYOUT),
    "dots3note_a": (("Dots3NoteForCausalLM", "Dots3NoteForConditionalGeneration"), UNKNOWN_LAYOUT),
    "gemma3nv": (("Gemma3nForConditionalGeneration",), UNKNOWN_LAYOUT),
    "gemma3na": (("Gemma3nForConditionalGeneration",), UNKNOWN_LAYOUT),
    "granite4_vision": (("Granite4VisionForConditionalGeneration",), UNKNOWN_LAYOUT),
    "mimovl": (("MiMoV2ForCausalLM",), UNKNOWN_LAYOUT),
    "mimo_audio": (("MiMoV2ForCausalLM",), UNKNOWN_LAYOUT),
    "parakeet": (("NemotronH_Nano_VL_V2",), UNKNOWN_LAYOUT),
    "pockettts_spkenc": (("PocketTTSModel",), SPEECH),
    "pockettts_gen": (("PocketTTSModel",), SPEECH),
    "qwen3tts_spkenc": (("Qwen3TTSForConditionalGeneration",), SPEECH),
    "qwen3tts_gen": (("Qwen3TTSForConditionalGeneration",), SPEECH),
}
