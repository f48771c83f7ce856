"""The way back: an adapter GGUF becomes a folder that PEFT loads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lora_gguf.adapters.adapter import allowed, read_adapter
from lora_gguf.adapters.lora import LoraPair
from lora_gguf.adapters.peft_folder import config_of, tensors_of, write_folder
from lora_gguf.errors import LoraGgufError, UnsupportedError, UsageError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.under_way import temporary_folder
from lora_gguf.hub.base_models import stated_by
from lora_gguf.mapping.accounts import Account, Placement
from lora_gguf.mapping.architectures import ARCHITECTURES
from lora_gguf.mapping.back import module_pairs
from lora_gguf.mapping.hparams import from_base
from lora_gguf.mapping.placement import adapter_gguf_pairs, gguf_pairs
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.sources import read_base_config

SAME = 1e-4  # relative: more than the roundings of f32 take
TURNED = ("gpt2", "jais")


def unconvert(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    reading: Reading = Reading(),
    *,
    force: bool = False,
) -> Placement:
    """Write the adapter GGUF ``adapter``, which fits ``base``, as a PEFT folder; return the account of its tensors.

    What is written is read again and placed in the base: it must be the same update. Raises ``UnsupportedError`` that
    lists what no module of Hugging Face's is known for, unless ``reading`` allows to leave it out.
    """
    path = Path(adapter)
    if not (path.is_file() and path.suffix == ".gguf"):
        raise UsageError(f"{printable(path)}: --to peft wants an adapter GGUF: a PEFT folder is one already")
    with Base(base) as model:
        placement = adapter_gguf_pairs(path, model, reading)
        config_json = read_base_config(reading.base_config)
        hparams = from_base(model, config_json, reading.layout_of)
        found = module_pairs(placement.pairs, hparams)
        left = {name: why for name, why in found.without.items() if not allowed([name], reading.allow_unused)}
        if left:
            raise UnsupportedError(
                f"{path.name}: {next(iter(left))}: {next(iter(left.values()))}: leave it out with --allow-unused REGEX",
                [f"{name}: {why}" for name, why in left.items()] if len(left) > 1 else (),
            )
        stored = ARCHITECTURES[hparams.architecture].packed_experts[0]
        tensors = tensors_of(found.pairs, stored.in_out and not stored.declared)
        turned = hparams.architecture in TURNED
        with GgufReader(path) as reader:
            config = config_of(found.pairs, stated_by(reader), turned=turned)
        kept = [pair for pair in placement.pairs if pair.name not in found.without]
        check_same(kept, tensors, config, model, reading)
        write_folder(folder, tensors, config, force=force, inputs=[path, *model.paths])
    accounts = dict(found.without)
    placement.accounts = [
        Account(account.tensor, "ignored", "", f"--allow-unused: {accounts[account.target]}")
        if account.target in accounts
        else account
        for account in placement.accounts
    ]
    placement.pairs = found.pairs
    return placement


def check_same(
    pairs: list[LoraPair], tensors: dict[str, np.ndarray], config: dict[str, object], model: Base, reading: Reading
) -> None:
    """Raise ``UnsupportedError`` unless a folder of ``tensors`` and ``config`` is the same update of ``model``."""
    with temporary_folder() as folder:
        write_folder(folder, tensors, config)
        try:
            config_json = read_base_config(reading.base_config)
            again = gguf_pairs(read_adapter(folder), model, reading, config=config_json, updates=True)
        except LoraGgufError as error:
            raise UnsupportedError(f"its layout cannot be undone: {error}", error.details) from error
    by_name = {pair.name: pair for pair in again.pairs}
    wrong = [pair.name for pair in pairs if pair.name not in by_name or not is_same(pair, by_name[pair.name])]
    if wrong:
        raise UnsupportedError(f"{wrong[0]}: its layout cannot be undone: merge the adapter instead", wrong)


def is_same(one: LoraPair, other: LoraPair) -> bool:
    """Return whether two pairs make the same update."""
    if one.shape != other.shape:
        return False
    n = one.shape[0] if one.a.ndim == 3 else 1
    for i in range(n):
        pairs = [(pair.a[i], pair.b[i]) if pair.a.ndim == 3 else (pair.a, pair.b) for pair in (one, other)]
        (a, b), (c, d) = pairs
        if not close(np.float64(one.scale) * b, a, np.float64(other.scale) * d, c):
            return False
    return True


def close(b: np.ndarray, a: np.ndarray, d: np.ndarray, c: np.ndarray) -> bool:
    """Return whether b @ a and d @ c are the same within roundings, without making either."""
    left, right = np.concatenate([b, -d], axis=1), np.concatenate([a, c]).astype(np.float64)
    products = (left.T @ left) * (right @ right.T)
    r = b.shape[1]
    size = products[:r, :r].sum()
    return bool(products.sum() <= SAME**2 * size + 1e-30)
