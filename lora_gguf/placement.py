"""Where every tensor of an adapter goes in the base: the pairs in GGUF terms, and an account of each tensor.

Both paths, ``convert`` and ``merge``, start here. With a base GGUF its tensor table is the authority; all that does not
fit is reported at once.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lora_gguf.adapter import Adapter
from lora_gguf.errors import MalformedError, MismatchError, printable
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.hparams import Hparams, from_base
from lora_gguf.lora import EMBEDDING, LoraPair, read_adapter_gguf
from lora_gguf.names import is_other_tower, pieces
from lora_gguf.transforms import cut


@dataclass(frozen=True)
class Account:
    """What happened to one adapter tensor: ``outcome`` is applied, ignored or error."""

    tensor: str
    outcome: str
    target: str = ""
    reason: str = ""


@dataclass
class Placement:
    """``pairs`` in GGUF terms, and one ``Account`` for each tensor of the adapter, in the adapter's order."""

    pairs: list[LoraPair] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)

    def __str__(self) -> str:
        counts = Counter(account.outcome for account in self.accounts)
        return f"{len(self.pairs)} tensors updated; of the adapter's, " + ", ".join(f"{n} {what}" for what, n in counts.items())


def gguf_pairs(adapter: Adapter, base: GgufReader | Hparams) -> Placement:
    """Place all updates of ``adapter`` in ``base``: an open GGUF, or the dimensions in a ``config.json``.

    Raises ``MismatchError`` that lists every update which does not fit, with the likely cause.
    """
    hparams = from_base(base) if isinstance(base, GgufReader) else base
    placement = Placement(accounts=[Account(name, "ignored", "", why) for name, why in adapter.ignored.items()])
    errors: list[str] = []
    for pair in adapter.pairs:
        errors += place(pair, hparams, placement)
    errors += duplicates(placement.pairs)
    if errors:
        raise MismatchError(f"{adapter.label}: {errors[0]}: {likely_cause(adapter, hparams, errors)}", errors)
    if not placement.pairs:
        raise MismatchError(f"{adapter.label}: nothing in it belongs to the text model: it adapts other parts only")
    return placement


def adapter_gguf_pairs(path: str | os.PathLike, base: GgufReader) -> Placement:
    """The pairs of the adapter GGUF at ``path``, checked against the open ``base``. Raises as ``gguf_pairs`` does."""
    pairs, architecture = read_adapter_gguf(path)
    hparams = from_base(base)
    label = printable(Path(path).name)
    if architecture != hparams.architecture:
        raise MismatchError(
            f"{label}: expected an adapter for {hparams.architecture} ({base.label}), found one for "
            f"{printable(architecture, 40)}: is it for another base model?"
        )
    errors = [error for pair in pairs if (error := misfit(pair, hparams))]
    if errors:
        raise MismatchError(f"{label}: {errors[0]}: is {base.label} the base it was trained on?", errors)
    return Placement(pairs, [Account(name, "applied", pair.name) for pair in pairs for name in pair.sources])


def place(pair: LoraPair, hparams: Hparams, placement: Placement) -> list[str]:
    """Add what ``pair`` (named by module path) becomes to ``placement``; return what is wrong with it."""
    if is_other_tower(pair.name):
        reason = "part of a vision or audio tower, which the text model's GGUF does not hold"
        placement.accounts += [Account(name, "ignored", "", reason) for name in pair.sources]
        return []
    try:
        parts = [cut(pair, piece) for piece in pieces(pair.name, pair.shape, hparams)]
    except ValueError:
        return [f"{pair.name}: shape {pair.shape} does not divide into the heads of {hparams.label}"]
    except MalformedError as error:
        return [f"{pair.name}: {error}"]
    if not parts:
        return [f"{pair.name}: no tensor of {hparams.architecture} is known by this name"]
    errors = [error for part in parts if (error := misfit(part, hparams))]
    if not errors:
        placement.pairs += parts
        target = ", ".join(part.name for part in parts)
        placement.accounts += [Account(name, "applied", target) for name in pair.sources]
    return errors


def misfit(pair: LoraPair, hparams: Hparams) -> str | None:
    """What keeps ``pair`` (in GGUF terms) from the base, or None."""
    if hparams.tensors is None:
        return None
    info = hparams.tensors.get(pair.name)
    if info is None and pair.name == "output.weight":
        return f"{pair.name}: {hparams.label} has none: its head is tied to the embedding"
    if info is None:
        return f"{pair.name}: expected in {hparams.label}, not found"
    if pair.name == EMBEDDING and "output.weight" not in hparams.tensors:
        return f"{pair.name}: the embedding of {hparams.label} is also its head (tied): llama.cpp cannot run this adapter"
    if tuple(info.shape) != pair.shape:
        return f"{pair.name}: expected {tuple(info.shape)}, found {pair.shape}"
    return None


def duplicates(pairs: list[LoraPair]) -> list[str]:
    """The GGUF tensors that two modules claim."""
    seen: set[str] = set()
    return [f"{pair.name}: two modules claim it" for pair in pairs if pair.name in seen or seen.add(pair.name)]


def likely_cause(adapter: Adapter, hparams: Hparams, errors: list[str]) -> str:
    """A guess at what went wrong, and what to do."""
    trained_on = f" (the adapter says {adapter.base_model})" if adapter.base_model else ""
    if any("tied" in error for error in errors):
        return "train without lm_head and embed_tokens in target_modules, or untie the base"
    if len(errors) == len(adapter.pairs):
        return f"is {printable(hparams.label)} ({hparams.architecture}) the base it was trained on{trained_on}?"
    return f"{len(errors)} of {len(adapter.pairs)} modules do not fit: is the base of the same size and version{trained_on}?"
