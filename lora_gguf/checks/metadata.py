"""The metadata of a merged file beside its base's: every key that changes what a program makes of it, as raw bytes."""

from __future__ import annotations

from collections.abc import Iterator

from lora_gguf.checks.findings import Finding
from lora_gguf.errors import printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_writer import raw_key_values
from lora_gguf.merging.plan import Plan

# of ``general.*``; names, licences and file types are other tools' own affair
GENERAL = ("general.architecture", "general.type", "general.sampling.", "general.causal_attention")


def metadata_findings(model: Base, result: Base, plan: Plan) -> Iterator[Finding]:
    """Yield what differs: keys that are lost, added, of another type or value; ``plan`` has what a merge changes."""
    before, after = _pairs(model), _pairs(result)
    for key in [*before, *(key for key in after if key not in before)]:
        if not key.startswith((f"{model.architecture}.", "tokenizer.", *GENERAL)):
            continue
        wanted = plan.key_values.get(key, before.get(key))
        if wanted == after.get(key):
            continue
        if wanted is None:
            yield Finding("metadata", (), f"no key {printable(key)}, as in the base", "one")
        else:
            whose = "the base's and the adapter's " if key in plan.key_values else "the base's "
            yield Finding("metadata", (), whose + printable(key), "another value" if key in after else "none")
    for key in plan.key_values.keys() - before.keys() - after.keys():
        yield Finding("metadata", (), f"the base's and the adapter's {printable(key)}", "none")


def _pairs(base: Base) -> dict[str, bytes]:
    return dict(zip(base.kv, raw_key_values(base.readers[0]), strict=True))
