"""Names of tensors that the gguf package does not know yet, beside its name map: of architectures that are newer than
it.

A module's path, without what wraps it, with ``{bid}`` for the layer -> what its weight may be called in the GGUF. Of
several the base has one.
"""

from __future__ import annotations

_LAYER = "model.layers.{bid}."
_ATTENTION = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "dt_proj": "ssm_dt",
    "b_proj": "ssm_beta", "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b", "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_b_proj": "attn_kv_b", "dense": "attn_output",
}  # fmt: skip
_TALKIE = {
    "attn.attn_query": "attn_q", "attn.attn_key": "attn_k", "attn.attn_value": "attn_v", "attn.attn_resid": "attn_output",
    "mlp.mlp_linear": "ffn_up", "mlp.mlp_gate": "ffn_gate", "mlp.mlp_resid": "ffn_down",
}  # fmt: skip
_BLOCK = {
    "self_attn.output_gate": "attn_gate", "self_attn.linear_gate": "attn_gate",
    "block_sparse_moe.router": "ffn_gate_inp", "block_sparse_moe.routed_expert_down_proj": "ffn_routed_down",
    "block_sparse_moe.routed_expert_up_proj": "ffn_routed_up", "self_attn.index_q_proj": "indexer.q_proj",
    "self_attn.index_k_proj": "indexer.k_proj", "attention_conv.kernel_projection": "attn_conv_proj",
    "mlp_conv.kernel_projection": "ffn_conv_proj",
}  # fmt: skip
_HYPER = {"input_mix_weight_down": "down", "input_mix_weight_up": "up", "block_inject_weight": "inject"}
OWN_NAMES: dict[str, tuple[str, ...]] = {
    "model.embed": ("token_embd",),
    "embed": ("token_embd",),
    "head": ("output",),
    "model.lm_head": ("output",),
    **{
        f"{_LAYER}{part}_hyper_connection.{module}": (f"blk.{{bid}}.hc_{stem}_{tensor}",)
        for part, stem in (("attn", "attn"), ("mlp", "ffn"))
        for module, tensor in _HYPER.items()
    },
    **{f"model.hyper_connection_mixer.{module}": (f"output_hc_{tensor}",) for module, tensor in _HYPER.items()},
    f"{_LAYER}ple.key_proj": ("blk.{bid}.ple_key",),
    f"{_LAYER}ple.value_proj": ("blk.{bid}.ple_value",),
    **{f"{_LAYER}attention.{module}": (f"blk.{{bid}}.{tensor}",) for module, tensor in _ATTENTION.items()},
    **{f"model.blocks.{{bid}}.{module}": (f"blk.{{bid}}.{tensor}",) for module, tensor in _TALKIE.items()},
    **{f"{_LAYER}{module}": (f"blk.{{bid}}.{tensor}",) for module, tensor in _BLOCK.items()},
}
