"""``adapter_config.json``: read, type-checked, and what it asks for that we can't do refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from lora_gguf.adapters.kinds import KINDS
from lora_gguf.errors import FileError, MalformedError, UnsupportedError, printable
from lora_gguf.files.input_file import open_input

NAME = "adapter_config.json"
MAX_BYTES = 16 << 20
MAX_RANK = 1 << 16
MAX_PARAMETERS = 4096


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _is_rank(value: object) -> bool:
    return (value == 0 and type(value) is int) or _is_count(value)


def _is_mask(value: object) -> bool:
    """AdaLoRA's: which of the ranks are left."""
    return isinstance(value, list) and all(isinstance(item, bool) for item in value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_indices(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 31 for item in value)


def _is_map_of(test: Callable) -> Callable:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


# what a field must be -> (its test, its description); null passes for every field and means that it is absent
TYPES: dict[str, tuple[Callable, str]] = {
    "text": (lambda v: isinstance(v, str), "a string"),
    "flag": (lambda v: isinstance(v, bool), "true or false"),
    "number": (_is_number, "a finite number"),
    "count": (_is_count, f"a whole number from 1 to {MAX_RANK}"),
    "rank": (_is_rank, f"a whole number up to {MAX_RANK}"),
    "ranks": (_is_map_of(lambda v: _is_count(v) or _is_mask(v)), f"a map to whole numbers from 1 to {MAX_RANK}"),
    "numbers": (_is_map_of(_is_number), "a map to finite numbers"),
    "names": (_is_names, "a list of strings"),
    "parameters": (lambda v: _is_names(v) and len(v) <= MAX_PARAMETERS, f"a list of at most {MAX_PARAMETERS} strings"),
    "targets": (lambda v: isinstance(v, str) or _is_names(v), "a string or a list of strings"),
    "init": (lambda v: isinstance(v, (bool, str)), "true, false or a string"),
    "tokens": (lambda v: _is_indices(v) or _is_map_of(_is_indices)(v), "a list of token ids, or a map to such lists"),
    "indices": (_is_indices, "a list of token ids"),
    "object": (lambda v: isinstance(v, dict), "an object"),
    "list": (lambda v: isinstance(v, list), "a list"),
}
FIELDS = {
    "peft_type": "text",
    "peft_version": "text",
    "base_model_name_or_path": "text",
    "r": "rank",
    "init_r": "count",
    "lora_alpha": "number",
    "use_rslora": "flag",
    "rank_pattern": "ranks",
    "alpha_pattern": "numbers",
    "target_modules": "targets",
    "target_parameters": "parameters",
    "fan_in_fan_out": "flag",
    "bias": "text",
    "lora_bias": "flag",
    "use_dora": "flag",
    "use_qalora": "flag",
    "use_bdlora": "object",
    "velora_config": "object",
    "kasa_config": "object",
    "arrow_config": "object",
    "monteclora_config": "object",
    "megatron_config": "object",
    "qalora_group_size": "count",
    "alpha": "number",
    "rank": "rank",
    "lora_parameters": "object",
    "fine_tune_type": "text",
    "save_projection": "flag",
    "token_indices": "indices",
    "block_share": "flag",
    "coft": "flag",
    "eps": "number",
    "use_cayley_neumann": "flag",
    "num_cayley_neumann_terms": "count",
    "lora_B_layout": "text",
    "unsloth_fused_expert_lora": "object",
    "init_lora_weights": "init",
    "modules_to_save": "names",
    "trainable_token_indices": "tokens",
    "layer_replication": "list",
    "alora_invocation_tokens": "indices",
    "invocation_string": "text",
}
# a LoRA initialised by one of these replaces the base's weights while it trains
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# field -> why its adapter is refused and what to do
REFUSED = {
    "kasa_config": "KaSA takes small singular values out of the base: merge it with PEFT",
    "arrow_config": "Arrow routes between adapters at run time: merge one of those that it routes between",
    "megatron_config": "Megatron's parts are not joined here: where each tensor is whole, take this field out",
    "layer_replication": "copies of a layer share weights and differ in updates: in PEFT, give each weights of its own "
    "(module.base_layer.weight = Parameter(module.base_layer.weight.clone())), then merge",
}
UNSUPPORTED_KIND = "turn it into LoRA with PEFT's convert_to_lora, or merge it with PEFT"


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict:
    """Return the object in a JSON file from an untrusted source: limited size, no duplicate keys, no NaN."""
    label = printable(path.name)
    try:
        with os.fdopen(open_input(path), "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise FileError(f"{printable(path)}: cannot read: {error.strerror}: check the path") from error
    if len(raw) > max_bytes:
        raise MalformedError(f"{label}: expected at most {max_bytes >> 20} MiB: this is no configuration")
    if raw.lstrip()[:1] == b"<":
        raise MalformedError(f"{label}: a web page instead of the file: download it again")
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{label}: not valid JSON: {printable(error, 100)}: download it again") from None
    if not isinstance(value, dict):
        raise MalformedError(
            f"{label}: expected a JSON object, found {printable(json.dumps(value), 40)}: download it again"
        )
    return value


def _unique(items: list) -> dict:
    found = dict(items)
    if len(found) != len(items):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def read_config(directory: Path) -> dict:
    """Return the checked fields of ``adapter_config.json``: null fields are left out, unknown ones kept as they are."""
    config = {key: value for key, value in read_json(directory / NAME).items() if value is not None}
    for field, kind in FIELDS.items():
        test, description = TYPES[kind]
        if field in config and not test(config[field]):
            found = printable(json.dumps(config[field]), 60)
            raise MalformedError(f"{NAME}: {field}: expected {description}, found {found}: correct the file")
    return config


def check_supported(config: dict) -> None:
    """Raise ``UnsupportedError``, with all reasons, for an adapter that can't be converted or merged."""
    kind = kind_of(config)
    reasons = [] if kind in KINDS else [f"peft_type {printable(kind, 40)} is not supported: {UNSUPPORTED_KIND}"]
    reasons += [f"{field}: {why}" for field, why in REFUSED.items() if config.get(field)]
    if config.get("invocation_string") and not config.get("alora_invocation_tokens"):
        reasons.append("invocation_string: an aLoRA of an old format: add its ids as alora_invocation_tokens")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(BASE_CHANGING_INITS):
        reasons.append(
            f"init_lora_weights={printable(init, 40)} changed the base: save it again in PEFT with "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if reasons:
        raise UnsupportedError(f"{NAME}: {reasons[0]}", reasons if len(reasons) > 1 else ())


def kind_of(config: dict) -> str:
    """Return the ``peft_type`` in capitals; LORA where the file does not say. MLX is what mlx-lm saves, MLX_VLM
    mlx-vlm.
    """
    if {"rank", "alpha"} <= config.keys() and not {"r", "peft_type"} & config.keys():
        return "MLX_VLM"
    default = "MLX" if "lora_parameters" in config or "fine_tune_type" in config else "LORA"
    return config.get("peft_type", default).upper().removeprefix("PEFTTYPE.")
