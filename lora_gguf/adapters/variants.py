"""PEFT's variants of LoRA whose factors are stored in a form of their own: block-diagonal, or over groups of inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

GROUP = 16  # PEFT's default
LARGEST = 1 << 28  # numbers of a factor: far more than any layer's has
BLOCKS = (("lora_A", "target_modules_bd_a"), ("lora_B", "target_modules_bd_b"))


def unpacked(path: str, factors: Mapping[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """Return those of a module's ``factors`` that QA-LoRA or BD-LoRA store, as LoRA has them. Raises ``ValueError``.

    QA-LoRA's A has one column for a group of the module's inputs, whose mean it takes, times the number of groups;
    BD-LoRA's A or B holds the blocks on its diagonal alone.
    """
    found = {}
    a = factors.get("lora_A")
    if config.get("use_qalora") and a is not None and a.ndim == 2:
        size = config.get("qalora_group_size", GROUP)
        if a.size * size > LARGEST:
            raise ValueError(f"expected a smaller qalora_group_size for lora_A {a.shape}, found {size}")
        found["lora_A"] = np.repeat(a, size, axis=1) * np.float32(a.shape[1] / size)
    said = config.get("use_bdlora") or {}
    n = said.get("nblocks", 1)
    for factor, field in BLOCKS:
        stored, patterns = factors.get(factor), said.get(field)
        patterns = patterns if isinstance(patterns, list) else []
        if stored is None or not any(str(pattern) in path.rpartition(".")[2] for pattern in patterns):
            continue
        if type(n) is not int or n < 1 or stored.ndim != 2 or len(stored) % n or stored.size * n > LARGEST:
            raise ValueError(f"expected {factor} in {n} blocks (use_bdlora), found {stored.shape}")
        found[factor] = diagonal(stored.reshape(n, -1, stored.shape[1]))
    return found


def diagonal(blocks: np.ndarray) -> np.ndarray:
    """Return blocks (n, rows, cols) on the diagonal of a matrix (n * rows, n * cols)."""
    n, rows, cols = blocks.shape
    whole = np.zeros((n, rows, n, cols), np.float32)
    whole[np.arange(n), :, np.arange(n)] = blocks
    return whole.reshape(n * rows, n * cols)
