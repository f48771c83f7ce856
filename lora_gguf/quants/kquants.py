"""Q2_K to Q6_K as ggml quantizes them; their bytes are in ``kquants_blocks.py``.

A search gives each group's scale, and its minimum where the type has one; a second search, or simply the largest, gives
the super-block's f16 scale and the groups' codes under it; then the weights are rounded to the grid that results.
Without an importance matrix those are ggml's reference quantizers, with one those that weigh each error by it.
"""

from __future__ import annotations

import numpy as np

from lora_gguf.quants import fit, kquants_blocks, quant


def _k_quant(name, encode=None, group=0, code_max=0):
    kernels = {step: getattr(kquants_blocks, f"{step}_{name.lower()}") for step in ("decode", "unpack", "pack")}
    return quant(name, **kernels, encode=encode, group=group, code_max=code_max)


K_QUANTS = [
    _k_quant("Q2_K", group=16, code_max=3),
    _k_quant("Q3_K", group=16, code_max=7),
    _k_quant("Q4_K", group=32, code_max=15),
    _k_quant("Q5_K", group=32, code_max=31),
    _k_quant("Q6_K", group=16, code_max=63),
]
