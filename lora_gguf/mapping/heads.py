"""Embeddings and heads: where the base has one tensor for both, and where the adapter has tokens that the base
lacks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lora_gguf.adapters.adapter import Adapter
from lora_gguf.adapters.lora import EMBEDDING, HEAD, LoraPair, Piece
from lora_gguf.adapters.updates import Replaced, Update, placed
from lora_gguf.errors import MalformedError, MismatchError
from lora_gguf.mapping.accounts import Placement, base_shape
from lora_gguf.mapping.architectures import ARCHITECTURES
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.names import has_head, layer_of, pieces, tensor_name
from lora_gguf.mapping.stacking import fused
from lora_gguf.mapping.vocabulary import first_rows, grown, last_token

# further tensors with an entry for each token, which no adapter trains
BESIDES = ("output.bias", "per_layer_token_embd.weight")
SAME_UPDATE = 1e-5  # relative: further apart than rounding takes two saved copies


def cut_to_vocabulary(
    update: LoraPair | Update, adapter: Adapter, hparams: Hparams, placement: Placement
) -> tuple[LoraPair | Update, list[str]]:
    """Return ``update`` without the rows of new tokens, which go to the placement; and what is wrong with it."""
    if layer_of(update.name) is not None or update.part == "bias":
        return update, []
    name = tensor_name(update.name, hparams)
    shape = base_shape(name, hparams) if name in (HEAD, EMBEDDING) else None
    if shape is None:
        return update, []
    n_rows = shape[0]
    if ARCHITECTURES[hparams.architecture].other_vocabulary:
        last = last_token(adapter.directory)
        if last < n_rows:
            return first_rows(update, n_rows), []
        update = first_rows(update, last + 1)
    try:
        update, rows = grown(update, n_rows, adapter.originals.get(update.name))
        if rows is not None and len(rows):
            (piece,) = pieces(update.name, rows.shape, hparams)
            placement.new_rows[str(name)] = placed(rows, piece)
    except (MalformedError, MismatchError) as error:
        return update, [str(error)]
    return update, []


def check_new_rows(placement: Placement, hparams: Hparams, new_tokens: bool) -> list[str]:
    """Return what is wrong with the rows of new tokens: none are wanted, or only one of embedding and head has them."""
    rows = placement.new_rows
    if hparams.tied and not placement.untied:
        rows.pop(HEAD, None)
    counts = {name: len(found) for name, found in rows.items()}
    besides = [name for name in BESIDES if not hparams.lacks(name, default=True)]
    if rows and besides:
        return [f"{besides[0]}: new tokens have no place in it: merge without them, or with PEFT"]
    if rows and not new_tokens:
        return [
            f"{name}: {n} new tokens: an adapter GGUF cannot hold them: merge instead" for name, n in counts.items()
        ]
    both = placement.untied or not (hparams.tied or ARCHITECTURES[hparams.architecture].headless)
    if rows and (len(set(counts.values())) > 1 or (both and len(counts) < 2) or EMBEDDING not in counts):
        return [
            f"{name}: {n} new tokens, others for embedding or head: save both with it" for name, n in counts.items()
        ]
    return []


def resolve_tied(placement: Placement, hparams: Hparams, tied: str) -> list[str]:
    """Settle what happens to the head and the embedding where the base has one tensor for both; return what is
    wrong."""
    if not hparams.tied:
        return []
    placement.tied = True
    share_updates(placement)
    touching = [update for update in placement.changes if is_telling_apart(update)]
    if not touching:
        return []
    if tied == "refuse":
        return [f"{update.name}: head and embedding of {hparams.label} are one tensor (tied)" for update in touching]
    if tied == "separate" and has_head(hparams.architecture):
        placement.untied, placement.tied = True, False
        return []
    if tied == "separate":
        return [f"{HEAD}: llama.cpp's {hparams.architecture} has no head of its own (tied): merge with --tied shared"]
    shared = [pair for pair in placement.pairs if pair.name in (HEAD, EMBEDDING)]
    if shared:
        shape = base_shape(EMBEDDING, hparams)
        sources = tuple(source for pair in shared for source in pair.sources)
        pair = fused(EMBEDDING, [(Piece(EMBEDDING), pair) for pair in shared], sources, shape or shared[0].shape)
        placement.pairs = [other for other in placement.pairs if other.name not in (HEAD, EMBEDDING)] + [pair]
    for update in placement.updates:
        update.name = EMBEDDING if update.name == HEAD else update.name
    return []


def share_updates(placement: Placement) -> None:
    """Make one of an embedding's and a head's updates that are equal: PEFT saves both where it keeps the two tied."""
    both: tuple[list[Any], ...] = (placement.pairs, placement.updates)
    for found in both:
        for head in [update for update in found if update.name == HEAD]:
            embedding = next((update for update in found if update.name == EMBEDDING and is_same(update, head)), None)
            if embedding is not None:
                found.remove(head)
                embedding.shared = True
                placement.accounts = [
                    replace(account, target=EMBEDDING) if account.tensor in head.sources else account
                    for account in placement.accounts
                ]


def is_same(embedding: LoraPair | Update, head: LoraPair | Update) -> bool:
    """Return whether the two change the one tensor in the same way."""
    if isinstance(embedding, LoraPair) and isinstance(head, LoraPair):
        return embedding.shape == head.shape and distance(embedding, head) < SAME_UPDATE
    if isinstance(embedding, Replaced) and isinstance(head, Replaced):
        return np.array_equal(head.values, embedding.values) and is_equal(head.only, embedding.only)
    return False


def distance(one: LoraPair, other: LoraPair) -> float:
    """Return the relative distance of two updates, from their factors alone: neither product is made."""
    signed = ((one, one.scale), (other, -other.scale))
    b = np.concatenate([np.float64(scale) * pair.b for pair, scale in signed], axis=1)
    a = np.concatenate([pair.a for pair, _ in signed]).astype(np.float64)
    products, r = (b.T @ b) * (a @ a.T), one.rank
    between, size = products.sum(), products[:r, :r].sum()
    return float(np.sqrt(max(between, 0.0) / size)) if size > 0 else float(between > 0)


def is_equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def is_telling_apart(update: LoraPair | Update) -> bool:
    """Return whether the update makes a tied head and embedding differ. PEFT keeps single trained rows tied."""
    if update.name not in (HEAD, EMBEDDING) or update.shared:
        return False
    return not (isinstance(update, Replaced) and update.only is not None and update.name == EMBEDDING)
