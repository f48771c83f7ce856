"""What is supported, as tables in Markdown: made from the tables that the program itself works with."""

from __future__ import annotations

from lora_gguf.adapters.adapter_config import REFUSED
from lora_gguf.mapping.architectures import ARCHITECTURES, Architecture, Out
from lora_gguf.mapping.architectures import REFUSED as REFUSED_MODELS
from lora_gguf.mapping.names import has_head
from lora_gguf.mapping.towers import CLIP, TOWERS
from lora_gguf.mapping.towers import REFUSED as REFUSED_TOWERS
from lora_gguf.mapping.transforms import rwkv6_rescaled

EXACT, APPROXIMATE, NO = "exact", "`--rank N`", "refused"
# kind of adapter -> what convert and merge do with it. Tests hold each line against adapters that PEFT made.
KINDS = {
    "LoRA, rsLoRA, `rank_pattern`, `alpha_pattern`, QLoRA-trained": (EXACT, EXACT),
    "`target_parameters` (fused experts, routers), any PEFT layout": (EXACT, EXACT),
    "LoRA on embeddings and heads": (EXACT, EXACT),
    "AdaLoRA": (EXACT, EXACT),
    "VeLoRA, MonteCLoRA, BD-LoRA, QA-LoRA": (EXACT, EXACT),
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
    "DoRA on embeddings": (APPROXIMATE, EXACT),
    "other PEFT methods": ("refused: `convert_to_lora`",) * 2,
    **{f"`{field}`": (NO, NO) for field in REFUSED},
    "mlx-lm, mlx-vlm: LoRA, DoRA, full": ("as above", EXACT),
    "torchtune's own files: LoRA, DoRA": ("as above", EXACT),
}


def kinds_table() -> str:
    """Return kinds of adapter, and what becomes of each."""
    rows = [f"| {kind} | {convert} | {merge} |" for kind, (convert, merge) in KINDS.items()]
    return "\n".join(["| adapter | `convert` | `merge` |", "|---|---|---|", *rows])


def architectures_table() -> str:
    """Return architectures × kinds of adapter: what a merge does with each."""
    head = "| GGUF architecture | Hugging Face classes | low rank | by row or column | norms | heads | remarks |"
    rows = [
        f"| {name} | {', '.join(row.hf) or 'as above'} | {' | '.join(cells(name, row))} |"
        for name, row in ARCHITECTURES.items()
        if name != CLIP
    ]
    n_classes = sum(len(row.hf) for row in ARCHITECTURES.values())
    refused: dict[str, list[str]] = {}
    for name, why in REFUSED_MODELS.items():
        refused.setdefault(why, []).append(name)
    count = f"{len(ARCHITECTURES) - 1} architectures, {n_classes} classes. Refused by name: " + "; ".join(
        f"{', '.join(names)} ({why.partition(',')[0]})" for why, names in refused.items()
    )
    return "\n".join([f"{count}.", "", head, "|---|---|---|---|---|---|---|", *rows])


def towers_table() -> str:
    """Return projectors of mmproj files, and the Hugging Face classes that have them."""
    rows = [f"| {name} | {', '.join(row.hf) or 'as above'} |" for name, row in TOWERS.items()]
    refused = [f"{name} ({', '.join(classes)})" for name, (classes, _) in REFUSED_TOWERS.items()]
    count = f"{len(TOWERS)} projectors. Refused by name: {'; '.join(refused)}."
    return "\n".join([count, "", "| `clip.projector_type` | Hugging Face classes |", "|---|---|", *rows])


def cells(name: str, row: Architecture) -> tuple[str, ...]:
    """Return what a merge does with adapters of low rank, with those that need whole rows or columns, with norms and
    with heads; and what is particular to the architecture.
    """
    outs = [(rule.pattern, out) for rule in row.rules for out in rule.outs]
    turned = dict.fromkeys(pattern.replace("\\", "").rpartition(".")[2] for pattern, out in outs if out.transpose)
    by_row = f"exact; OFT and BOFT refused on {', '.join(f'`{path}`' for path in turned)}" if turned else EXACT
    norms = NO if row.norm_shift is None else EXACT
    heads = "none" if row.headless else EXACT if has_head(name) else "`--tied shared`"
    return (EXACT, by_row, norms, heads, remarks(row, [out for _, out in outs]))


def remarks(row: Architecture, outs: list[Out]) -> str:
    """Return what is needed beyond the base's GGUF, and whether llama.cpp applies all of a converted adapter."""
    from_config = any(out.scale and out.scale is not rwkv6_rescaled for out in outs)
    found = ["needs `--base-config`"] if from_config else []
    if row.ignored_at_run_time:
        found.append("converted, some tensors do nothing in llama.cpp: merge")
    return ", ".join(found)
