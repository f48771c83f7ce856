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
# torchtune's own names: what it saves beside them in PEFT's is what can be read
TORCHTUNE = re.compile(r"^layers\.\d+\.(attn|mlp)\.\w+\.lora_[ab]\.weight$|^(output|tok_embeddings)\.lora_")


def peft_name(name: str) -> str:
    """Return a tensor's name with its factor as PEFT calls it."""
    for pattern, spelling in () if TORCHTUNE.search(name) else FACTORS:
        name = pattern.sub(spelling, name)
    return name


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
