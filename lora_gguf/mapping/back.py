"""The way back: an adapter's pairs in a GGUF base's terms as updates of Hugging Face modules.

The layouts are those of the way there, undone: the pieces of a module say where its rows and columns went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lora_gguf.adapters.lora import LoraPair, Piece
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.module_paths import DEFAULT, OTHERS
from lora_gguf.mapping.names import layer_of, outward, pieces, shape_in_base

PART = tuple[np.ndarray, np.ndarray, float]
HEAD_MODULE = DEFAULT["output"]


@dataclass
class Modules:
    """Updates named by module path, and the tensors that no module is known for, with the reason."""

    pairs: list[LoraPair] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)


def module_pairs(pairs: Sequence[LoraPair], hparams: Hparams) -> Modules:
    """Return the updates of modules that ``pairs``, as they fit a base, are made of; of packed experts (E, …)."""
    found, by_name = Modules(), {pair.name: pair for pair in pairs}
    done: set[str] = set()
    for pair in pairs:
        path = path_of(pair.name, hparams)
        if path is None:
            found.without[pair.name] = "no module of Hugging Face's is known for it"
        elif path not in done:
            done.add(path)
            try:
                found.pairs += of_module(path, by_name, hparams)
            except ValueError as error:
                found.without[pair.name] = f"{path}: {error}"
    for pair in [pair for pair in found.pairs if pair.shared]:  # PEFT saves the head's share of it too
        found.pairs.append(replace(pair, name=HEAD_MODULE))
    return found


def path_of(name: str, hparams: Hparams) -> str | None:
    """Return the path of the module that becomes the tensor ``name``, perhaps among others."""
    layer = layer_of(f".{name}")
    stem = name.removesuffix(".weight").replace(f"blk.{layer}.", "blk.", 1).removeprefix("blk.")
    for table in (OTHERS.get(hparams.architecture, {}), DEFAULT):
        for stems, template in table.items():
            if stem in stems.split():
                path = template.replace("{bid}", str(layer))
                if name in {piece.name for piece in places(path.replace("{slot}", "0"), hparams)}:
                    return path
    return None


def places(path: str, hparams: Hparams) -> list[Piece]:
    """Return where the module at ``path`` goes; empty where the base has no tensor for it."""
    try:
        shape = shape_in_base(path, hparams)
        return [] if shape is None else pieces(path, shape, hparams)
    except ValueError:
        return []


def of_module(path: str, by_name: dict[str, LoraPair], hparams: Hparams) -> list[LoraPair]:
    """Return the update of the module at ``path``, or those of all experts' where it has a number to fill in."""
    if "{slot}" not in path:
        return [joined(path, places(path, hparams), by_name, hparams)]
    n = hparams.get("expert_count") or 0
    found = [path.replace("{slot}", str(slot)) for slot in range(n if isinstance(n, int) else 0)]
    made = [joined(one, places(one, hparams), by_name, hparams) for one in found]
    return [pair for pair in made if pair.b.any()]


def joined(path: str, found: list[Piece], by_name: dict[str, LoraPair], hparams: Hparams) -> LoraPair:
    """Return one pair of all that a module became: rows side by side, under one A where the parts share theirs."""
    shape = shape_in_base(path, hparams) or (0, 0)
    parts: list[PART] = []
    sources: dict[str, None] = {}
    for piece in found:
        if pair := by_name.get(piece.name):
            sources |= dict.fromkeys(pair.sources)
            a, b = undone(pair, piece, shape)
            add(parts, a, b, pair.scale)
    a = np.concatenate([part[0] for part in parts], axis=-2)
    scale = next((part[2] for part in parts if part[2]), 1.0)
    b = np.concatenate([part[1] * np.float32(part[2] / scale) for part in parts], axis=-1)
    shared = any(by_name[piece.name].shared for piece in found if piece.name in by_name)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b, np.float32)
    return LoraPair(outward(path, hparams), a, b, scale, tuple(sources), shared=shared)


def add(parts: list[PART], a: np.ndarray, b: np.ndarray, scale: float) -> None:
    """Add a part to ``parts``: to the B of one that has the same A, else on its own."""
    for i, (known, so_far, its_scale) in enumerate(parts):
        if its_scale == scale and known.shape == a.shape and np.array_equal(known, a):
            parts[i] = (known, so_far + b, its_scale)
            return
    parts.append((a, b, scale))


def undone(pair: LoraPair, piece: Piece, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of ``pair`` in the module's own layout; its B is zero in the rows of other pieces."""
    a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
    if piece.slot is not None and a.ndim == 3:
        a, b = a[piece.slot], b[piece.slot]
    if piece.transpose:
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    rows = np.arange(shape[0]) if piece.rows is None else piece.rows
    if piece.offset is not None:
        b = b[..., piece.offset : piece.offset + len(rows), :]
    if piece.scale is not None:
        if not piece.scale.all():
            raise ValueError("its rows are multiplied by zero in the GGUF")
        b = (b / piece.scale[:, None]).astype(np.float32)
    if len(rows) != b.shape[-2]:
        raise ValueError(f"expected {len(rows)} rows, found {b.shape[-2]}")
    whole = np.zeros((*b.shape[:-2], shape[0], b.shape[-1]), np.float32)
    whole[..., rows, :] = b
    if piece.cols is not None:
        turned = np.empty_like(a)
        turned[..., piece.cols] = a
        a = turned
    return a, whole
