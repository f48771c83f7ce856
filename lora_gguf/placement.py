"""Where every tensor of an adapter goes in the base: the pairs in GGUF terms, and an account of each tensor.

Both paths, ``convert`` and ``merge``, start here. With a base GGUF its tensor table is the authority; all that does not
fit is reported at once.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_gguf.adapter import Adapter
from lora_gguf.architectures import ARCHITECTURES
from lora_gguf.errors import MalformedError, MismatchError, printable
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.hparams import Hparams, from_base
from lora_gguf.lora import EMBEDDING, LoraPair, Piece, read_adapter_gguf
from lora_gguf.names import is_other_tower, layer_of, pieces


@dataclass(frozen=True)
class Account:
    """What happened to one adapter tensor: ``outcome`` is applied, ignored or error."""

    tensor: str
    outcome: str
    target: str = ""
    reason: str = ""


@dataclass
class Placement:
    """``pairs`` in GGUF terms, one for each tensor, one ``Account`` for each tensor of the adapter, and warnings."""

    pairs: list[LoraPair] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = Counter(account.outcome for account in self.accounts)
        return f"{len(self.pairs)} tensors updated; of the adapter's, " + ", ".join(f"{n} {what}" for what, n in counts.items())


Part = tuple[Piece, LoraPair]


def gguf_pairs(adapter: Adapter, base: GgufReader | Hparams) -> Placement:
    """Place all updates of ``adapter`` in ``base``: an open GGUF, or the dimensions in a ``config.json``.

    Raises ``MismatchError`` that lists every update which does not fit, with the likely cause.
    """
    hparams = from_base(base) if isinstance(base, GgufReader) else base
    placement = Placement(accounts=[Account(name, "ignored", "", why) for name, why in adapter.ignored.items()])
    errors: list[str] = []
    parts: dict[str, list[Part]] = {}
    for pair in oriented(adapter.pairs, hparams):
        errors += place(pair, hparams, parts, placement.accounts)
    for name, found in parts.items():
        errors += combine(name, found, hparams, placement.pairs)
    if errors:
        raise MismatchError(f"{adapter.label}: {errors[0]}: {likely_cause(adapter, hparams, errors)}", errors)
    if not placement.pairs:
        raise MismatchError(f"{adapter.label}: nothing in it belongs to the text model: it adapts other parts only")
    placement.warnings += run_time_warnings(placement.pairs, hparams)
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


def oriented(pairs: list[LoraPair], hparams: Hparams) -> list[LoraPair]:
    """``pairs`` with those of packed experts (E, …) turned to (out, in).

    PEFT's versions disagree on which axis of a packed parameter is in and which is out; the model's width tells. Where it
    is square it goes as the other parameters of the adapter do.
    """
    packed = [pair for pair in pairs if pair.a.ndim == 3]
    turns = [turn for pair in packed if (turn := is_turned(pair, hparams)) is not None]
    default = bool(turns) and all(turns)
    turned = {id(pair) for pair in packed if (is_turned(pair, hparams), default)[is_turned(pair, hparams) is None]}
    return [pair.take(Piece(pair.name, transpose=True)) if id(pair) in turned else pair for pair in pairs]


def is_turned(pair: LoraPair, hparams: Hparams) -> bool | None:
    """Whether a packed parameter's update is (in, out); None where the shape cannot tell."""
    width, (n_out, n_in) = hparams.get("embedding_length"), pair.shape[-2:]
    if n_out == n_in or width not in (n_out, n_in):
        return None
    into_width = pair.name.rpartition(".")[2] in ("down_proj", "w2", "output_linear")
    return (n_in if into_width else n_out) == width


def place(pair: LoraPair, hparams: Hparams, parts: dict[str, list[Part]], accounts: list[Account]) -> list[str]:
    """Add what ``pair`` (named by module path) becomes to ``parts``; return what is wrong with it."""
    skipped = why_skipped(pair.name, hparams)
    if skipped:
        accounts += [Account(name, "ignored", "", skipped) for name in pair.sources]
        return []
    try:
        found = pieces(pair.name, pair.shape[-2:], hparams)
    except ValueError:
        return [f"{pair.name}: shape {pair.shape} does not divide as the heads of {hparams.label} do"]
    except MalformedError as error:
        return [f"{pair.name}: {error}"]
    if not found:
        return [f"{pair.name}: no tensor of {hparams.architecture} is known by this name"]
    for piece in found:
        parts.setdefault(piece.name, []).append((piece, pair.take(piece)))
    target = ", ".join(dict.fromkeys(piece.name for piece in found))
    accounts += [Account(name, "applied", target) for name in pair.sources]
    return []


def why_skipped(path: str, hparams: Hparams) -> str | None:
    """The reason why a module has no place in a text model's GGUF, or None."""
    if is_other_tower(path):
        return "part of a vision or audio tower, which the text model's GGUF does not hold"
    if re.match(r"(model\.)?mtp\.", path):
        return "multi-token prediction, which the GGUF does not hold"
    n_layers, layer = hparams.get("block_count"), layer_of(path)
    extra = hparams.get("config.num_nextn_predict_layers")
    if hparams.tensors is None and extra and layer is not None and n_layers and layer >= n_layers:
        return "multi-token prediction, which the GGUF may not hold"
    return None


def combine(name: str, parts: list[Part], hparams: Hparams, pairs: list[LoraPair]) -> list[str]:
    """Make one pair of all ``parts`` of a tensor and add it to ``pairs``; return what is wrong with it."""
    shape = None if hparams.tensors is None or name not in hparams.tensors else tuple(hparams.tensors[name].shape)
    try:
        pair = parts[0][1] if len(parts) == 1 and parts[0][0].slot is None and not parts[0][0].offset else None
        if pair is None or (shape and len(shape) == 3 and pair.a.ndim == 2):
            pair = joined(name, parts, shape, hparams)
    except MismatchError as error:
        return [f"{name}: {error}"]
    error = misfit(pair, hparams)
    if not error:
        pairs.append(pair)
    return [error] if error else []


def joined(name: str, parts: list[Part], shape: tuple[int, ...] | None, hparams: Hparams) -> LoraPair:
    """One pair of all parts: experts stacked, absent ones zero; rows of a fused tensor side by side, ranks added."""
    sources = tuple(dict.fromkeys(source for _, pair in parts for source in pair.sources))
    if parts[0][0].slot is not None:
        return stacked(name, parts, sources, shape[0] if shape and len(shape) == 3 else hparams.get("expert_count"))
    if shape is None or all(piece.offset == 0 and pair.shape == shape for piece, pair in parts):
        raise MismatchError("two modules claim it")
    return fused(name, parts, sources, shape)


def stacked(name: str, parts: list[Part], sources: tuple[str, ...], n: int | None) -> LoraPair:
    """Experts' pairs as one, (E, r, in) and (E, out, r); smaller ranks are padded with zeros."""
    slots = [piece.slot for piece, _ in parts]
    n = n or max(slots) + 1
    if len(set(slots)) != len(slots) or max(slots) >= n:
        raise MismatchError(f"expected experts 0 to {n - 1}, each once, found {max(slots)} and {len(slots)} in all")
    shapes = {pair.shape for _, pair in parts}
    if len(shapes) > 1:
        raise MismatchError(f"its experts differ in shape: {sorted(shapes)}")
    rank, (n_out, n_in) = max(pair.rank for _, pair in parts), parts[0][1].shape
    scale = common_scale(parts)
    a, b = np.zeros((n, rank, n_in), np.float32), np.zeros((n, n_out, rank), np.float32)
    for piece, pair in parts:
        a[piece.slot, : pair.rank] = pair.a
        b[piece.slot, :, : pair.rank] = under_scale(pair, scale)
    return LoraPair(name, a, b, scale, sources)


def fused(name: str, parts: list[Part], sources: tuple[str, ...], shape: tuple[int, ...]) -> LoraPair:
    """Pairs of some rows each as one of all rows: A one below the other, B block by block."""
    scale, rank = common_scale(parts), sum(pair.rank for _, pair in parts)
    a = np.concatenate([pair.a for _, pair in parts], axis=-2)
    b, column = np.zeros((*shape[:-1], rank), np.float32), 0
    for piece, pair in parts:
        rows = slice(piece.offset, piece.offset + pair.b.shape[-2])
        if rows.stop > shape[-2] or pair.b.shape[:-2] != shape[:-2]:
            raise MismatchError(f"expected parts of {shape}, found {pair.shape} at row {piece.offset}")
        b[..., rows, column : column + pair.rank] = under_scale(pair, scale)
        column += pair.rank
    return LoraPair(name, a, b, scale, sources)


def common_scale(parts: list[Part]) -> float:
    """The first scale that is not zero."""
    return next((pair.scale for _, pair in parts if pair.scale), 1.0)


def under_scale(pair: LoraPair, scale: float) -> np.ndarray:
    """The B of ``pair`` for another scale."""
    return pair.b if pair.scale == scale else (pair.b * np.float64(pair.scale / scale)).astype(np.float32)


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


def run_time_warnings(pairs: list[LoraPair], hparams: Hparams) -> list[str]:
    """A line for each kind of tensor on which llama.cpp does not apply adapters, though a merge would."""
    row = ARCHITECTURES.get(hparams.architecture)
    if row is None or row.ignored_at_run_time is None:
        return []
    ignored = [pair.name for pair in pairs if re.search(row.ignored_at_run_time, pair.name)]
    kinds = Counter(re.sub(r"^blk\.\d+\.", "", name) for name in ignored)
    return [f"{kind}: llama.cpp ignores adapters on it ({n} tensors, {hparams.architecture}): merge instead" for kind, n in kinds.items()]


def likely_cause(adapter: Adapter, hparams: Hparams, errors: list[str]) -> str:
    """A guess at what went wrong, and what to do."""
    trained_on = f" (the adapter says {adapter.base_model})" if adapter.base_model else ""
    if any("tied" in error for error in errors):
        return "train without lm_head and embed_tokens in target_modules, or untie the base"
    if len(errors) == len(adapter.pairs):
        return f"is {printable(hparams.label)} ({hparams.architecture}) the base it was trained on{trained_on}?"
    return f"{len(errors)} of {len(adapter.pairs)} modules do not fit: is the base of the same size and version{trained_on}?"
