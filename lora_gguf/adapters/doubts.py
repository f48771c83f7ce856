"""What is odd about an adapter that can be read: said as warnings, as its user may know better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_gguf.adapters.adapter_config import FIELDS, kind_of
from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.patterns import all_matches
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import UnsupportedError, printable

# PEFT's initialisations that leave the base's weights as they are; those that do not are refused
INITS = re.compile(r"true|false|gaussian|eva|orthogonal|mica")
# how PEFT calls an option that makes another kind of LoRA, and those of that form that only train it
OPTIONS = re.compile(r"(use|enable)_\w+|\w+_config")
# entries of alpha_pattern: more are names that a program wrote, which do not overlap
MANY = 64
OF_TRAINING = {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"}


def doubts(
    directory: Path, updates: Iterable[LoraPair | Update], config: dict, expert_b_layout: str | None
) -> list[str]:
    """Return warnings on an adapter before it meets a base."""
    layout = layout_doubt(directory, updates, config, expert_b_layout)
    names = [update.name for update in updates]
    return [*layout, *init_doubt(config), *option_doubt(config), *scale_doubt(config), *pattern_doubt(names, config)]


def layout_doubt(
    directory: Path, updates: Iterable[LoraPair | Update], config: dict, expert_b_layout: str | None
) -> list[str]:
    """Return a warning where packed experts come from Unsloth, whose older versions laid B out in another order than
    PEFT.
    """
    if expert_b_layout or all(len(update.shape) < 3 for update in updates) or "mlx" in kind_of(config).lower():
        return []
    if "lora_B_layout" in config or "unsloth_fused_expert_lora" in config:
        return []
    said = b""
    if (readme := directory / "README.md").is_file():
        with open(readme, "rb") as file:
            said = file.read(65536).lower()
    if "unsloth" not in str(config.get("base_model_name_or_path", "")).lower() and b"unsloth" not in said:
        return []
    return [
        "packed experts trained with Unsloth: read in PEFT's order; if the result is gibberish, the adapter is from "
        "before September 2026: give --expert-b-layout expert-major"
    ]


def init_doubt(config: dict) -> list[str]:
    """Return a warning where the adapter began in a way that is not known here, and may have changed the base."""
    init = str(config.get("init_lora_weights", True)).lower()
    if kind_of(config) != "LORA" or INITS.fullmatch(init):
        return []
    return [
        f"init_lora_weights={printable(init, 40)} is not known here: if it changes the base's weights, the adapter "
        "does not fit the unchanged base: save it again in PEFT with "
        "save_pretrained(path_initial_model_for_weight_conversion=...)"
    ]


def option_doubt(config: dict) -> list[str]:
    """Return a warning where a LoRA has options on that are not known here: a newer PEFT may do with it what they
    say.
    """
    if kind_of(config) != "LORA":
        return []
    on = [key for key, value in config.items() if value and OPTIONS.fullmatch(key)]
    unknown = sorted(key for key in on if key not in FIELDS and key not in OF_TRAINING)
    if not unknown:
        return []
    return [
        f"adapter_config.json: {printable(', '.join(unknown), 100)} is not known here: the adapter is read without it; "
        "if it changes what the adapter does, merge it with the PEFT that saved it"
    ]


def scale_doubt(config: dict) -> list[str]:
    """Return a warning where two versions of mlx-vlm mean different scales by the same file."""
    rank = config.get("rank")
    if kind_of(config) != "MLX_VLM" or not rank or rank == 1:
        return []
    return [
        "saved by mlx-vlm before 0.6: read with its alpha as the factor; mlx-vlm 0.5.0 alone divided that by the rank: "
        f"if that trained it, give --scale {1 / rank:.6g}"
    ]


def pattern_doubt(modules: Sequence[str], config: dict) -> list[str]:
    """Return a warning where two entries of ``alpha_pattern`` give a module different values: the first one counts, and
    PEFT sorts them when it saves, so that another one may have counted in training.
    """
    pattern = config.get("alpha_pattern") or {}
    if not 1 < len(pattern) <= MANY:
        return []
    for module in modules:
        try:
            first, *others = all_matches(pattern, module) or [""]
        except UnsupportedError:  # an expression takes too long: a doubt refuses nothing
            return []
        other = next((key for key in others if pattern[key] != pattern[first]), None)
        if other is not None:
            return [
                f"adapter_config.json: alpha_pattern: '{printable(first, 40)}' and '{printable(other, 40)}' both match "
                f"{printable(module, 80)}: the first counts, as in PEFT, which sorts them when it saves: if training "
                "had them in another order, correct the file"
            ]
    return []
