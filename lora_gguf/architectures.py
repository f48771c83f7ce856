"""What is particular to each architecture, as data: its Hugging Face classes and the layout of its weights.

A layer without a rule keeps its layout, and its name is the one that the ``gguf`` package's name map gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_gguf.transforms import Op, rotary_k, rotary_q


@dataclass(frozen=True)
class Out:
    """One GGUF tensor that a module becomes: ``tensor`` is its name in the block (None: as the name map says)."""

    tensor: str | None = None
    rows: tuple[Op, ...] = ()
    cols: tuple[Op, ...] = ()


@dataclass(frozen=True)
class Rule:
    """The modules whose path ends with a match of ``pattern``, and the tensors that each becomes."""

    pattern: str
    outs: tuple[Out, ...]


@dataclass(frozen=True)
class Architecture:
    """``hf`` are the class names in config.json's ``architectures``."""

    hf: tuple[str, ...]
    rules: tuple[Rule, ...] = ()


ROTARY = (Rule(r"q_proj", (Out(rows=(rotary_q,)),)), Rule(r"k_proj", (Out(rows=(rotary_k,)),)))

# GGUF's general.architecture -> its row
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "LlamaModel"), ROTARY),
    "qwen2": Architecture(("Qwen2ForCausalLM", "Qwen2Model")),
    "qwen3": Architecture(("Qwen3ForCausalLM", "Qwen3Model")),
    "gemma": Architecture(("GemmaForCausalLM",)),
    "gemma2": Architecture(("Gemma2ForCausalLM",)),
    "gemma3": Architecture(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")),
    "phi3": Architecture(("Phi3ForCausalLM",)),
}
