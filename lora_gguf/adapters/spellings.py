"""How other programs than PEFT call an adapter's tensors: their names in PEFT's spelling.

What wraps a model while it trains leaves its mark before a module's path: DDP (``module.``), TRL's value heads
(``pretrained_model.``), RLHF trainers (``actor.``), sentence-transformers (``0.auto_model.``), and PEFT itself, once
or more.
"""

from __future__ import annotations

import re

PREFIX = "base_model.model."
# compilers' and sharders' wrappers, anywhere in a path
WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
BEFORE = re.compile(r"^(module|pretrained_model|actor|policy|_forward_module|(\d+\.)?auto_model)\.")
# a factor's spelling -> PEFT's; with .weight, as mlx's lora_a has none and lies the other way round
FACTORS = (
    (re.compile(r"\.lora_down\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora_up\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.lora_a\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora_b\.weight$"), ".lora_B.weight"),
)
MODULES = ((re.compile(r"(^|\.)(model\.)?unembed_tokens(?=\.|$)"), r"\1lm_head"),)
# torchtune's own names, with Meta's for the parts of a layer
TORCHTUNE = re.compile(
    r"(?:(?P<layer>layers\.\d+\.)(?P<part>attn|mlp)\.(?P<module>\w+)|output)\.(?P<factor>lora_[ab]\.weight|magnitude)"
)
_TORCHTUNE_PARTS = {"attn": "self_attn", "mlp": "mlp"}
_TORCHTUNE_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_TORCHTUNE_FACTORS = {
    "lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector",
}  # fmt: skip


def peft_name(name: str) -> str:
    """Return a tensor's name with its factor as PEFT calls it."""
    if match := TORCHTUNE.fullmatch(name):
        return f"{_torchtunes_module(match)}.{_TORCHTUNE_FACTORS[match['factor']]}"
    for pattern, spelling in FACTORS:
        name = pattern.sub(spelling, name)
    return name


def _torchtunes_module(match: re.Match) -> str:
    if not match["layer"]:
        return "lm_head"
    module = _TORCHTUNE_MODULES.get(match["module"], match["module"])
    return f"model.{match['layer']}{_TORCHTUNE_PARTS[match['part']]}.{module}"


def module_path(path: str) -> str:
    """Return the path of a module in the base model, without what wraps it."""
    for wrapper in WITHIN:
        path = path.replace(wrapper, "")
    path = path.rpartition(PREFIX)[2]
    while match := BEFORE.match(path):
        path = path[match.end() :]
    for pattern, spelling in MODULES:
        path = pattern.sub(spelling, path)
    return path.replace(".token_adapter", "")
