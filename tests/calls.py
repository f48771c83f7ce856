"""The library's calls, the options of each as tests write them."""

from __future__ import annotations

from lora_gguf import api
from lora_gguf.commands.merge import MergeReport
from lora_gguf.mapping import placement
from lora_gguf.mapping.accounts import Placement
from lora_gguf.mapping.reading import Reading
from lora_gguf.merging.options import Policy


def merge(base, adapters, out, policy: Policy = Policy(), *, shards: bool = False, **options) -> MergeReport:
    """Merge as ``policy`` says; ``options`` are those of the library."""
    chosen = {"rounding": policy.rounding, "seed": policy.seed, "type": policy.type, "imatrix": policy.imatrix}
    return api.merge(base, adapters, out, quantize=policy.mix, keep_split=shards, **chosen, **options)


def gguf_pairs(adapter, base, *, config=None, updates=False, new_tokens=False, **reading) -> Placement:
    """Place an adapter, read as ``reading`` says; a tied head is refused where it does not say."""
    chosen = Reading(**{"tied": "refuse", **reading})
    return placement.gguf_pairs(adapter, base, chosen, config=config, updates=updates, new_tokens=new_tokens)


def adapter_gguf_pairs(path, base, **reading) -> Placement:
    """Place an adapter GGUF, read as ``reading`` says."""
    return placement.adapter_gguf_pairs(path, base, Reading(**reading))
