"""What is supported, as tables in Markdown: made from the tables that the program itself works with."""

from __future__ import annotations

from lora_gguf.adapters.adapter_config import REFUSED
from lora_gguf.mapping.architectures import ARCHITECTURES, Architecture

EXACT, APPROXIMATE, NO = "exact", "`--rank N`", "refused"
# kind of adapter -> what convert and merge do with it. Tests hold each line against adapters that PEFT made.
KINDS = {
    "LoRA, rsLoRA, `rank_pattern`, `alpha_pattern`, QLoRA-trained": (EXACT, EXACT),
    "`target_parameters` (fused experts, routers), any PEFT layout": (EXACT, EXACT),
    "LoRA on embeddings and heads": (EXACT, EXACT),
    "AdaLoRA": (EXACT, EXACT),
    "VeRA (with `save_projection`)": (EXACT, EXACT),
    "LoHa, LoKr": ("exact, at a higher rank", EXACT),
    "DoRA": (APPROXIMATE, EXACT),
    "OFT, BOFT": (APPROXIMATE, EXACT),
    "IA³": ("`--rank N`, without biases", EXACT),
    "`trainable_token_indices`": (APPROXIMATE, EXACT),
    "`modules_to_save`: embeddings, heads": (APPROXIMATE, EXACT),
    "`modules_to_save`: norms; LN tuning": (NO, EXACT),
    "new tokens (a resized vocabulary)": (NO, EXACT),
    '`lora_bias`, `bias="all"`, `bias="lora_only"`': (NO, EXACT),
    "aLoRA": (EXACT, "refused: active only after its tokens"),
    "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA": ("exact if saved against the original base, else refused",) * 2,
    "DoRA on embeddings": (NO, NO),
    "other PEFT methods": ("refused: `convert_to_lora`",) * 2,
    **{f"`{field}`": (NO, NO) for field in REFUSED},
    "mlx-lm: LoRA, DoRA, full": ("as above", EXACT),
}


def kinds_table() -> str:
    """Kinds of adapter, and what becomes of each."""
    rows = [f"| {kind} | {convert} | {merge} |" for kind, (convert, merge) in KINDS.items()]
    return "\n".join(["| adapter | `convert` | `merge` |", "|---|---|---|", *rows])


def architectures_table() -> str:
    """Architectures, their Hugging Face classes, and what is particular to each."""
    rows = [f"| {name} | {', '.join(row.hf) or 'as above'} | {notes(row)} |" for name, row in ARCHITECTURES.items()]
    return "\n".join(["| GGUF architecture | Hugging Face classes | notes |", "|---|---|---|", *rows])


def notes(row: Architecture) -> str:
    """A word on the layout of the weights, and on what llama.cpp ignores."""
    found = []
    if any(out.rows or out.cols or out.scale or out.slots for rule in row.rules for out in rule.outs):
        found.append("weights rearranged")
    if row.ignored_at_run_time:
        found.append("some tensors adapted by `merge` only")
    return ", ".join(found)
