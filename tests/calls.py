"""``merge`` of the library, its rounding and types as a ``Policy``."""

from __future__ import annotations

from lora_gguf import api
from lora_gguf.commands.merge import MergeReport
from lora_gguf.merging.options import Policy


def merge(base, adapters, out, policy: Policy = Policy(), *, shards: bool = False, **options) -> MergeReport:
    """Merge as ``policy`` says; ``options`` are those of the library."""
    chosen = {"rounding": policy.rounding, "seed": policy.seed, "type": policy.type, "imatrix": policy.imatrix}
    return api.merge(base, adapters, out, quantize=policy.mix, keep_split=shards, **chosen, **options)
