"""What is said where an adapter does not fit: the likely cause, and what to do."""

from __future__ import annotations

import re

from lora_gguf.adapters.adapter import Adapter
from lora_gguf.errors import printable
from lora_gguf.mapping.hparams import Hparams

UNUSED = "--allow-unused"
# heads that reward models and classifiers are trained with, on top of a text model
REWARD_HEAD = re.compile(
    r"(^|\.)(?P<head>score|v_head|value_head|reward_head|rm_head|regression_head|classifier)(\.|$)"
)


def other_part(hparams: Hparams) -> str:
    """Return what to do with an adapter of another part of the model than the base is."""
    if hparams.is_tower:
        return "it adapts the text model only: merge it into that model's GGUF"
    return "it adapts other parts than the text model: merge it into the model's mmproj"


def no_place(path: str, hparams: Hparams) -> str:
    """Return why a module finds no tensor."""
    if match := REWARD_HEAD.search(path):
        way_out = f"leave it out with {UNUSED} '{match['head']}'"
        return f"a reward or classification head, which {hparams.label} has no place for: {way_out}"
    return f"no tensor of {hparams.kind} is known by this name"


def likely_cause(adapter: Adapter, hparams: Hparams, errors: list[str]) -> str:
    """Return a guess at what went wrong, and what to do."""
    trained_on = f" (the adapter says {adapter.base_model})" if adapter.base_model else ""
    if all(UNUSED in error for error in errors):
        return f"{len(adapter.updates) - len(errors)} other modules fit"
    if any("tied" in error for error in errors):
        return "merge with --tied separate or shared, or train without lm_head and embed_tokens"
    if any("--base-config" in error for error in errors):
        return f"the GGUF alone does not tell the layout of {len(errors)} of {len(adapter.updates)} modules"
    if len(errors) == len(adapter.updates):
        return f"is {printable(hparams.label)} ({hparams.kind}) the base it was trained on{trained_on}?"
    n = f"{len(errors)} of {len(adapter.updates)} modules do not fit"
    return f"{n}: is the base of the same size and version{trained_on}?"
