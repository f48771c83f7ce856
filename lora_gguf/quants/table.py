"""All types that can be merged into, by name."""

from __future__ import annotations

from lora_gguf.quants.floats import FLOATS
from lora_gguf.quants.iq4 import IQ4
from lora_gguf.quants.iquants import IQUANTS
from lora_gguf.quants.kquants import K_QUANTS
from lora_gguf.quants.legacy import LEGACY
from lora_gguf.quants.microscaling import MICROSCALING
from lora_gguf.quants.ternary import TERNARY

FAMILIES = (FLOATS, LEGACY, K_QUANTS, IQ4, IQUANTS, TERNARY, MICROSCALING)
CODECS = {entry.type.name: entry for family in FAMILIES for entry in family}
