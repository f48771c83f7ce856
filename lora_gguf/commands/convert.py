"""Path 1: an adapter directory becomes an adapter GGUF that llama.cpp loads with --lora."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from lora_gguf.adapters.adapter import Adapter, read_adapter
from lora_gguf.adapters.adapter_file import AdapterFile
from lora_gguf.adapters.factoring import factor
from lora_gguf.adapters.lora import LoraPair, decode, write_adapter_gguf
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import UnsupportedError, UsageError
from lora_gguf.files.base import Base
from lora_gguf.hub.references import REPO_ID
from lora_gguf.mapping import hparams
from lora_gguf.mapping.accounts import Placement
from lora_gguf.mapping.placement import gguf_pairs, measure_columns
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.sources import read_base_config
from lora_gguf.progress import Progress


def convert(
    directory: str | os.PathLike[str],
    output: AdapterFile,
    base: str | os.PathLike[str] | None = None,
    reading: Reading = Reading(),
    progress: Progress | None = None,
) -> Placement:
    """Write the PEFT adapter in ``directory`` as a GGUF, and return the account of its tensors.

    The layout follows the header of ``base``, a GGUF, and the ``config.json`` that ``reading`` names, where the GGUF
    does not say or is not given. What isn't low rank (DoRA, OFT, …) is refused, or approximated at the rank of
    ``output`` against ``base``. That takes its time: ``progress`` is called with (bytes of the base done since the
    last call, bytes in all, tensor name).
    """
    adapter = read_adapter(directory, reading.expert_b_layout, reading.allow_unused)
    with Base(base) if base is not None else nullcontext() as opened:
        model = base_model(opened, reading)
        placement = gguf_pairs(adapter, model, replace(reading, tied="refuse"), updates=True)
        if opened is not None:
            measure_columns(placement, opened)
        to_pairs(placement, adapter, opened, output.rank, progress)
        placement.warnings += [
            f"{pair.name}: it is the head too (tied), and llama.cpp stops at an adapter of such a tensor: merge instead"
            for pair in placement.pairs
            if pair.shared
        ]
        config = [reading.base_config] if reading.base_config else []
        inputs = [adapter.directory, *(opened.paths if opened else ()), *config]
    write_adapter_gguf(
        output.path,
        placement.pairs,
        model.stated,
        output.outtype,
        metadata(adapter),
        force=output.force,
        inputs=inputs,
    )
    return placement


def to_pairs(
    placement: Placement, adapter: Adapter, base: Base | None, rank: int | None, progress: Progress | None = None
) -> None:
    """Turn the updates of ``placement`` into pairs: those that are low rank after all exactly, others at ``rank``.

    Raises ``UnsupportedError`` that lists what an adapter GGUF cannot hold.
    """
    pairs = {id(update): pair for update in placement.updates if (pair := update.as_pair())}
    exact = {key: pair for key, pair in pairs.items() if base is None or base.tensors[pair.name].shape == pair.shape}
    others = [update for update in placement.updates if id(update) not in exact]
    vectors = [update for update in others if update.part == "bias" or "norm" in update.name]
    refused = vectors if rank and base else others
    if refused:
        hint = "vectors have no such form:" if vectors else "approximate it with --rank N and --base, or"
        raise UnsupportedError(
            f"{adapter.label}: {refused[0].name}: {refused[0].kind}: an adapter GGUF is low rank: {hint} "
            "merge it into the base",
            [f"{update.name}: {update.kind}" for update in refused],
        )
    placement.pairs += exact.values()
    placement.updates = []
    if rank and base:
        names = dict.fromkeys(update.name for update in others)
        n_bytes = sum([base.tensors[name].n_bytes for name in names])
        for name in names:
            approximate(name, [update for update in others if update.name == name], placement, base, rank)
            if progress:
                progress(base.tensors[name].n_bytes, n_bytes, name)


def approximate(name: str, updates: list[Update], placement: Placement, base: Base, rank: int) -> None:
    """Replace all that changes tensor ``name`` by one pair of ``rank``; note its relative error."""
    info = base.tensors[name]
    weights = decode(base.reader_of(name), info).reshape(-1, info.n_cols)
    delta = np.zeros_like(weights)
    for update in updates:
        delta = delta + update.change(0, weights)
    own = [pair for pair in placement.pairs if pair.name == name]
    for pair in own:
        delta = delta + pair.delta().reshape(delta.shape)
    found = [factor(matrix, rank) for matrix in delta.reshape(-1, *info.shape[-2:])]
    a, b = np.stack([part.a for part in found]), np.stack([part.b for part in found])
    changes: list[LoraPair | Update] = [*own, *updates]
    sources = dict.fromkeys(source for change in changes for source in change.sources)
    pair = (
        LoraPair(name, a, b, 1.0, tuple(sources))
        if len(info.shape) == 3
        else LoraPair(name, a[0], b[0], 1.0, tuple(sources))
    )
    placement.pairs = [other for other in placement.pairs if other.name != name] + [pair]
    kept, energy = sum(part.kept for part in found), sum(part.energy for part in found)
    placement.approximations[name] = max(0.0, 1.0 - kept / energy) ** 0.5 if energy else 0.0


def base_model(base: Base | None, reading: Reading) -> hparams.Hparams:
    """Return the base's dimensions, from its GGUF and its ``config.json``."""
    config = read_base_config(reading.base_config)
    if base is not None:
        found = hparams.from_base(base, config, reading.layout_of)
        if found.is_tower:
            raise UnsupportedError(f"{base.label}: llama.cpp applies no adapters to an mmproj: merge it instead")
        return found
    if config is None:
        raise UsageError("the layout depends on the base: give --base BASE.gguf or --base-config DIR")
    return hparams.from_config(config)


def metadata(adapter: Adapter) -> list[tuple[str, object, str]]:
    """Return further keys of the file: what it is called and what it was trained on."""
    found: list[tuple[str, object, str]] = [("general.name", adapter.label, "str")]
    if adapter.invocation_tokens:
        found.append(("adapter.alora.invocation_tokens", adapter.invocation_tokens, "u32"))
    if adapter.base_model:
        owner, _, name = adapter.base_model.rpartition("/")
        found += [("general.base_model.count", 1, "u32"), ("general.base_model.0.name", name, "str")]
        if re.fullmatch(REPO_ID, adapter.base_model, re.ASCII):
            found += [
                ("general.base_model.0.organization", owner, "str"),
                ("general.base_model.0.repo_url", f"https://huggingface.co/{adapter.base_model}", "str"),
            ]
    return found
