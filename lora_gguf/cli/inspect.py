"""The ``inspect`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from lora_gguf.cli.helping import gguf_files
from lora_gguf.text import json_text

if TYPE_CHECKING:
    from lora_gguf.checks.inspection import AdapterInspection, Inspection, ModelInspection, Provenance, TowerFacts


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|DIR|REPO",
            help="A GGUF or an adapter, here or on the Hub (user/model:Q4_K_M).",
            autocompletion=gguf_files,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Tell what a model, an adapter or a merged file is, from its header; nothing large is downloaded.

    lora-gguf inspect merged.gguf
    """
    from lora_gguf import api

    found = api.inspect(source)
    print(json_text(found.as_dict()) if as_json else as_text(found))


def as_text(found: Inspection) -> str:
    """Return the inspection for a reader: a line of what it is, its facts, its types."""
    from lora_gguf.checks.inspection import ModelInspection
    from lora_gguf.text import aligned, count_text, size_text, text_table

    facts = (
        model_facts(found) if isinstance(found, ModelInspection) else adapter_facts(cast("AdapterInspection", found))
    )
    n_files = f" in {len(found.files)} files" if len(found.files) > 1 else ""
    rows = [
        ("name", found.name),
        ("architecture", found.architecture),
        ("parameters", count_text(found.n_parameters)),
        ("size", size_text(found.n_bytes) + n_files),
        *facts,
        *(("note", note) for note in found.notes),
    ]
    parts = [f"{found.source}: {found.kind}", aligned([row for row in rows if row[1]], left=2)]
    if found.types:
        types = [
            (name, share.n_tensors, count_text(share.n_parameters), size_text(share.n_bytes))
            for name, share in found.types.items()
        ]
        parts.append(text_table(("type", "tensors", "parameters", "size"), types))
    return "\n\n".join(parts)


def model_facts(found: ModelInspection) -> list[tuple[str, str]]:
    """Return what is particular to a model; what is unknown is empty."""
    made = found.provenance
    layers = found.n_layers and found.embedding_length and f"{found.n_layers} of width {found.embedding_length}"
    heads = found.n_heads and f"{found.n_heads}" + (
        f", {found.n_kv_heads} of keys and values" if found.n_kv_heads else ""
    )
    has_words = found.vocabulary_size > 0
    return [
        ("quantization", found.quantization),
        *((tower.part, tower_text(tower)) for tower in found.towers),
        ("layers", layers or ""),
        ("heads", heads or ""),
        ("experts", str(found.n_experts or "")),
        ("output head", "shared with the embedding" if found.tied_head else ""),
        ("context", f"{found.context_length} tokens" if found.context_length else ""),
        ("vocabulary", f"{found.vocabulary_size} tokens ({found.tokenizer})" if has_words else ""),
        ("chat template", ("yes" if found.chat_template else "none") if has_words else ""),
        ("base model", found.base_model),
        *(
            (("adapters" if i == 0 else " "), f"{name}, scale {scale:g}")
            for i, (name, scale) in enumerate(made.adapters if made else ())
        ),
        ("merged by", f"lora-gguf {made.version}, rounding {made.rounding}, seed {made.seed}" if made else ""),
        ("imatrix", made.imatrix if made else ""),
        *(("before it" if i == 0 else " ", merge_text(merge)) for i, merge in enumerate(reversed(found.earlier))),
    ]


def tower_text(tower: TowerFacts) -> str:
    """Return a tower of an mmproj, in a line."""
    size = tower.n_layers and tower.embedding_length and f"{tower.n_layers} layers of width {tower.embedding_length}"
    heads = f", {tower.n_heads} heads" if size and tower.n_heads else ""
    return ": ".join(filter(None, [tower.projector, f"{size}{heads}" if size else ""]))


def merge_text(made: Provenance) -> str:
    """Return one merge of several, in a line."""
    adapters = ", ".join(f"{name}, scale {scale:g}" for name, scale in made.adapters)
    return f"{adapters}; lora-gguf {made.version}, rounding {made.rounding}, seed {made.seed}"


def adapter_facts(found: AdapterInspection) -> list[tuple[str, str]]:
    """Return what is particular to an adapter; what is unknown is empty."""
    ranks = [
        f"{group.rank}"
        + (f", scale {group.scale:g}" if group.scale is not None else "")
        + f": {modules(group.n_modules)}"
        for group in found.ranks
    ]
    shown = ranks[:8] + ([f"and {len(ranks) - 8} more"] if len(ranks) > 8 else [])
    return [
        ("base model", found.base_model),
        ("method", found.method),
        ("alpha", f"{found.alpha:g}" if found.alpha else ""),
        *((("rank" if i == 0 else " "), line) for i, line in enumerate(shown)),
        ("targets", counts(found.targets)),
        ("trained whole", counts(found.whole)),
        ("layers", str(found.n_layers or "")),
        ("tokenizer", ", ".join(found.tokenizer_files)),
        ("refused", found.refusal),
    ]


def modules(n: int) -> str:
    return f"{n} module{'s' if n != 1 else ''}"


def counts(found: dict[str, int]) -> str:
    """Return names with how often, where that differs; a line stays readable."""
    if len(set(found.values())) == 1 and len(found) > 1:
        return f"{', '.join(found)} ({next(iter(found.values()))} each)"
    return ", ".join(f"{name} ({n})" for name, n in found.items())
