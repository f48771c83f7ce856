"""Where every tensor of an adapter goes in the base: the pairs in GGUF terms, and an account of each tensor.

Both paths, ``convert`` and ``merge``, start here. With a base GGUF its tensor table is the authority; all that does not
fit is reported at once.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from lora_gguf.adapters.adapter import Adapter, allowed
from lora_gguf.adapters.lora import EMBEDDING, HEAD, LoraPair, Piece, decode_rows, pairs_of
from lora_gguf.adapters.updates import Computed, DoraOfColumns, Replaced, Update
from lora_gguf.errors import MalformedError, MismatchError, UnsupportedError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.lazy_array import stack
from lora_gguf.mapping.accounts import Account, ElsewhereError, Placement, base_shape, misfit
from lora_gguf.mapping.architectures import ARCHITECTURES
from lora_gguf.mapping.completeness import missing, missing_blocks
from lora_gguf.mapping.convolutions import folded, is_spread, spread
from lora_gguf.mapping.heads import check_new_rows, cut_to_vocabulary, resolve_tied
from lora_gguf.mapping.hparams import Hparams, borrowed_layout, from_base
from lora_gguf.mapping.names import gguf_pieces, layer_of, pieces, shape_in_base, why_skipped, within
from lora_gguf.mapping.orientation import oriented
from lora_gguf.mapping.reading import Reading
from lora_gguf.mapping.refusals import likely_cause, no_place, other_part
from lora_gguf.mapping.stacking import Part, joined
from lora_gguf.mapping.vocabulary import added_tokens, extended, learned_tokens

UNUSED_LAYER = "of a layer that the model does not use: it changes nothing, and the mmproj leaves it out"


def gguf_pairs(
    adapter: Adapter,
    base: GgufReader | Base | Hparams,
    reading: Reading = Reading("refuse"),
    *,
    config: dict | None = None,
    updates: bool = False,
    new_tokens: bool = False,
) -> Placement:
    """Place all updates of ``adapter`` in ``base``: an open GGUF, or the dimensions in a ``config.json``.

    ``config`` (``config.json``) is asked for what a GGUF does not say. Without ``updates`` an adapter that isn't low
    rank (``Placement.updates``) is refused, without ``new_tokens`` one with a larger vocabulary
    (``Placement.new_rows``). Raises ``MismatchError`` that lists every update which does not fit, with the likely
    cause.
    """
    hparams = base if isinstance(base, Hparams) else from_base(base, config, reading.layout_of)
    placement = Placement(
        invocation_tokens=adapter.invocation_tokens, warnings=[*adapter.warnings, *borrowed_layout(hparams)]
    )
    placement.accounts += [Account(name, "ignored", "", why) for name, why in adapter.ignored.items()]
    parts: dict[str, list[Part]] = {}
    errors: list[str] = []
    adapted, doubts = oriented(adapter, hparams, reading.expert_a_axis)
    placement.warnings += doubts
    for update in adapted:
        update, found = cut_to_vocabulary(update, adapter, hparams, placement)
        found = found or place(update, hparams, parts, placement)
        if found and allowed(update.sources, reading.allow_unused):
            placement.accounts += [
                Account(name, "ignored", "", f"--allow-unused: {found[0]}") for name in update.sources
            ]
        else:
            errors += found
    for name, claims in parts.items():
        errors += combine(name, claims, hparams, placement)
    errors += resolve_tied(placement, hparams, reading.tied)
    errors += check_new_rows(placement, hparams, new_tokens)
    if errors:
        details = errors if placement.pairs or placement.updates else ()  # nothing fits: one line says it all
        raise MismatchError(f"{adapter.label}: {errors[0]}: {likely_cause(adapter, hparams, errors)}", details)
    if not placement.pairs and not placement.updates:
        line = f"{adapter.label}: nothing in it belongs to {hparams.label}: {other_part(hparams)}"
        raise ElsewhereError(line, placement.accounts)
    if placement.updates and not updates:
        others = [f"{update.name}: {update.kind}" for update in placement.updates]
        raise UnsupportedError(f"{adapter.label}: {others[0]}: not supported yet: merge it with PEFT", others)
    if not isinstance(base, Hparams):
        measure_columns(placement, base)
    changed = {update.name for update in placement.changes}
    placement.warnings += missing(adapter, hparams, changed)
    placement.warnings += run_time_warnings(placement.pairs, hparams)
    placement.warnings += filter(None, [ARCHITECTURES[hparams.architecture].caution])
    if not isinstance(base, Hparams) and EMBEDDING in base.tensors:
        settle_vocabulary(placement, adapter, base)
    return placement


def measure_columns(placement: Placement, base: GgufReader | Base) -> None:
    """Let the updates that go by the lengths of whole columns measure them in the base."""
    for update in placement.updates:
        if isinstance(update, DoraOfColumns):
            info = base.tensors[update.name]
            reader = base.reader_of(update.name) if isinstance(base, Base) else base
            update.measure(partial(decode_rows, reader, info))


def settle_vocabulary(placement: Placement, adapter: Adapter, base: GgufReader | Base) -> None:
    """Add what the adapter's tokenizer changes in the base's metadata to ``placement``, or a warning that it does not
    fit.
    """
    tokens = added_tokens(adapter.directory)
    merges: list[str] = []
    n_old = base.tensors[EMBEDDING].shape[0]
    n_rows = n_old + len(placement.new_rows.get(EMBEDDING, ()))
    if any(i not in tokens for i in range(n_old, n_rows)):
        learned, merges = learned_tokens(adapter.directory, n_old)
        tokens = learned | tokens
    if n_rows == n_old and (not tokens or "tokenizer.ggml.tokens" not in base.kv):
        return
    placement.tokens = tokens
    try:
        placement.key_values = extended(base, tokens, n_rows, merges)
    except MismatchError as error:
        if placement.changes_vocabulary:
            raise
        placement.warnings.append(str(error))
    if beyond := [token.text for i, token in sorted(tokens.items()) if i >= n_rows]:
        placement.warnings.append(
            f"{len(beyond)} tokens of the adapter's tokenizer, such as {printable(beyond[0], 40)!r}, have no "
            "weights in it: left out"
        )


def adapter_gguf_pairs(path: str | os.PathLike, base: GgufReader | Base, reading: Reading = Reading()) -> Placement:
    """Return the pairs of the adapter GGUF at ``path`` as they fit the open ``base``. Errors as of
    ``gguf_pairs``.
    """
    with GgufReader(path) as reader:
        pairs, placement, architecture = pairs_of(reader), unplaced(reader), reader.architecture
    hparams = from_base(base, layout_of=reading.layout_of)
    label = printable(Path(path).name)
    if architecture != hparams.stated:
        raise MismatchError(
            f"{label}: expected an adapter for {hparams.stated} ({base.label}), found one for "
            f"{printable(architecture, 40)}: is it for another base model?"
        )
    placement.warnings += borrowed_layout(hparams)
    parts: dict[str, list[Part]] = {}
    errors: list[str] = []
    for pair in pairs:
        found = gguf_pieces(pair.name, pair.shape[-2], hparams)
        wrong = place_pair(pair, found, hparams, parts)
        if wrong and allowed(pair.sources, reading.allow_unused):
            placement.accounts += [Account(name, "ignored", "", f"--allow-unused: {wrong[0]}") for name in pair.sources]
            continue
        errors += wrong
        placement.accounts += [Account(name, "applied", ", ".join(p.name for p in found)) for name in pair.sources]
    for name, claims in parts.items():
        errors += combine(name, claims, hparams, placement)
    errors += resolve_tied(placement, hparams, reading.tied)
    if errors:
        details = errors if placement.pairs else ()
        raise MismatchError(f"{label}: {errors[0]}: is {base.label} the base it was trained on?", details)
    placement.warnings += missing_blocks(placement.pairs, hparams)
    return placement


def unplaced(reader: GgufReader) -> Placement:
    """Return a placement of an adapter GGUF without its pairs: the tokens that activate it, and what llama.cpp
    ignores.
    """
    reason = "llama.cpp ignores norms in adapters"
    ignored = [name for name in reader.tensors if not name.endswith((".lora_a", ".lora_b"))]
    tokens = reader.get("adapter.alora.invocation_tokens") or []
    return Placement(accounts=[Account(name, "ignored", "", reason) for name in ignored], invocation_tokens=tokens)


def place(update: LoraPair | Update, hparams: Hparams, parts: dict[str, list[Part]], placement: Placement) -> list[str]:
    """Add what ``update`` (named by module path) becomes to ``parts`` or the placement; return what is wrong with
    it."""
    path = within(update.name, hparams)
    if path is not None and path != update.name:
        update = replace(update, name=path)
    skipped = f"part of another model than {hparams.architecture}" if path is None else why_skipped(path, hparams)
    if skipped:
        placement.accounts += [Account(name, "ignored", "", skipped) for name in update.sources]
        return []
    if hparams.is_tower and is_of_unused_layer(update, hparams):
        placement.accounts += [Account(name, "ignored", "", UNUSED_LAYER) for name in update.sources]
        return []
    layer, n_layers = layer_of(update.name), hparams.get("block_count")
    if layer is not None and isinstance(n_layers, int) and layer >= n_layers:
        return [f"{update.name}: expected a layer below {n_layers}, as {hparams.label} has"]
    if normalised := ARCHITECTURES[hparams.architecture].normalised:
        path, field = normalised
        if update.name.rpartition(".")[2] == path and hparams.get(f"config.{field}") is not False:
            return [
                f"{update.name}: {hparams.label} may hold it normalised: give a --base-config in which {field} is false"
            ]
    try:
        shape = shape_of(update, hparams)
        found = pieces(update.name, shape, hparams)
        if 0 in update.shape:
            update = replace(update, shape=shape)  # type: ignore[arg-type]  # a pair's shape is its factors'
        if isinstance(update, Computed) and any(piece.transpose for piece in found):
            update = update.as_pair()
        if isinstance(update, LoraPair) and found:
            errors = place_pair(update, found, hparams, parts)
        else:
            errors = place_update(cast(Update, update), found, hparams, placement)
    except ValueError:
        return [f"{update.name}: shape {update.shape} does not divide as the heads of {hparams.label} do"]
    except (MalformedError, UnsupportedError) as error:
        return [str(error) if update.name in str(error) else f"{update.name}: {error}"]
    if not found:
        return [f"{update.name}: {no_place(update.name, hparams)}"]
    if not errors:
        targets = dict.fromkeys(part_name(piece, update) for piece in found)
        if not getattr(update, "optional", False):
            placement.accounts += [Account(name, "applied", ", ".join(targets)) for name in update.sources]
    return errors


def is_of_unused_layer(update: LoraPair | Update, hparams: Hparams) -> bool:
    """Return whether it changes nothing, and the mmproj lacks its tensors: files leave out a tower's last layers where
    the model takes the output of an earlier one, and PEFT saves them untrained.
    """
    if not isinstance(update, LoraPair) or update.b.any():
        return False
    return all(
        base_shape(piece.name, hparams) is None for piece in pieces(update.name, shape_of(update, hparams), hparams)
    )


def place_pair(pair: LoraPair, found: list[Piece], hparams: Hparams, parts: dict[str, list[Part]]) -> list[str]:
    """Add the parts of ``pair`` to ``parts``; return the tensors that the base lacks."""
    lacking = [piece.name for piece in found if hparams.tensors is not None and base_shape(piece.name, hparams) is None]
    if not lacking:
        for piece in found:
            parts.setdefault(piece.name, []).append((piece, trimmed(pair, piece, hparams).take(piece)))
    return [f"{name}: expected in {hparams.label}, not found" for name in dict.fromkeys(lacking)]


def trimmed(pair: LoraPair, piece: Piece, hparams: Hparams) -> LoraPair:
    """Return ``pair`` with as many columns as the module has (VeRA), and as many rows as the vocabulary has (Gemma
    3).
    """
    if pair.wide:
        pair = replace(pair, a=pair.a[:, : shape_of(pair, hparams)[1]], wide=False)
    shape = base_shape(piece.name, hparams)
    if piece.name in (HEAD, EMBEDDING) and shape and ARCHITECTURES[hparams.architecture].other_vocabulary:
        pair = replace(pair, b=stack([pair.b[: shape[0]]], (1, shape[0], pair.rank))[0])
    return pair


def combine(name: str, parts: list[Part], hparams: Hparams, placement: Placement) -> list[str]:
    """Make one pair of all ``parts`` of a tensor and add it to the placement; return what is wrong with it."""
    try:
        n_experts = hparams.get("expert_count")
        if n_experts and "_chexps" in name:  # GroveMoE: one for two experts
            n_experts //= 2
        pair = joined(name, parts, base_shape(name, hparams), n_experts)
    except MismatchError as error:
        return [f"{name}: {error}"]
    shape = base_shape(name, hparams)
    if shape and is_spread(pair.shape, shape):
        placement.updates.append(spread(pair, shape))
        return []
    wrong = misfit(name, pair.shape, hparams)
    if not wrong:
        placement.pairs.append(pair)
    return [wrong] if wrong else []


def place_update(update: Update, found: list[Piece], hparams: Hparams, placement: Placement) -> list[str]:
    """Add the parts of an update that isn't low rank to the placement; return what is wrong with it."""
    if hparams.tensors is None:
        return [f"{update.name}: {update.kind} needs the base's tensors: give --base BASE.gguf"]
    if len({(piece.name, piece.slot, piece.offset) for piece in found}) < len(found) and update.part == "weight":
        return [f"{update.name}: {update.kind} on {found[0].name}, which adds parts of it up: merge it with PEFT"]
    taken, errors = [], []
    for piece in found:
        if update.part == "bias":
            if piece.name.endswith(".weight.1"):  # a convolution's second frame: the bias is that of the first
                continue
            if update.optional and part_name(piece, update) not in hparams.tensors:
                continue
            piece = bias_piece(update, piece)
        shape = base_shape(piece.name, hparams) or ()
        part = folded(shifted_norm(update, piece, hparams).take(piece), shape)
        n_rows = math.prod(shape[:-1]) if shape else 0
        if (
            shape
            and part.shape[1] == shape[-1]
            and part.offset + part.shape[0] <= n_rows
            and (piece.slot is None or part.shape[0] == shape[-2])
        ):
            taken.append(part)
        else:
            errors.append(
                misfit(piece.name, part.shape, hparams) or f"{piece.name}: {part.shape} does not fit into {shape}"
            )
    if not errors:
        placement.updates += taken
    return errors


def bias_piece(update: Update, piece: Piece) -> Piece:
    """Return the place of a module's bias: the rows of its weight are the entries of its bias."""
    if piece.offset is not None or piece.slot is not None or piece.scale is not None or piece.transpose:
        raise UnsupportedError(
            f"{update.name}: a bias that GGUF stores fused or scaled ({piece.name}): merge it with PEFT"
        )
    return Piece(part_name(piece, update), cols=piece.rows)


def part_name(piece: Piece, update: LoraPair | Update) -> str:
    return piece.name.removesuffix("weight") + update.part if update.part == "bias" else piece.name


def shifted_norm(update: Update, piece: Piece, hparams: Hparams) -> Update:
    """Return a whole norm as the GGUF has it: some architectures add one to it."""
    if not isinstance(update, Replaced) or "norm" not in piece.name or update.part == "bias":
        return update
    if piece.shift:
        return replace(update, values=update.values + np.float32(piece.shift))
    row = ARCHITECTURES[hparams.architecture]
    if row.norm_shift is None:
        raise UnsupportedError(f"{update.name}: whole norms of {hparams.architecture}: merge it with PEFT")
    shift = 0.0 if piece.name.endswith("ssm_norm.weight") else row.norm_shift
    return replace(update, values=update.values + np.float32(shift)) if shift else update


def shape_of(update: LoraPair | Update, hparams: Hparams) -> tuple[int, int]:
    """Return (out, in) of the module's weight in Hugging Face's layout; what the update does not know, the base
    does.
    """
    shape = update.shape[-2:]
    if update.part == "bias":
        shape = (shape[1], 0)
    if getattr(update, "wide", False):
        shape = (shape[0], 0)
    if 0 not in shape:
        return shape[0], shape[1]
    base = shape_in_base(update.name, hparams)
    if base is None:
        raise MalformedError(
            f"{update.name}: its shape depends on the base: give --base BASE.gguf, with a tensor for it"
        )
    return (shape[0] or base[0], shape[1] or base[1])


def run_time_warnings(pairs: list[LoraPair], hparams: Hparams) -> list[str]:
    """Return a line for each kind of tensor on which llama.cpp does not apply adapters, though a merge would."""
    row = ARCHITECTURES.get(hparams.architecture)
    if row is None or row.ignored_at_run_time is None:
        return []
    ignored = [pair.name for pair in pairs if re.search(row.ignored_at_run_time, pair.name)]
    kinds = Counter(re.sub(r"^blk\.\d+\.", "", name) for name in ignored)
    return [
        f"{kind}: llama.cpp ignores adapters on it ({n} tensors, {hparams.architecture}): merge instead"
        for kind, n in kinds.items()
    ]
