"""The order of attention's rows in adapters of torchtune, which is Meta's: pairs that turn together lie side by side.

Hugging Face has the first of all pairs in a head, then the second. torchtune keeps that order for the families that it
took over from there; what it saves in PEFT's format it reorders for all alike, which is wrong for these.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from lora_gguf.adapters.adapter import Adapter
from lora_gguf.adapters.lora import LoraPair, Piece
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import MismatchError
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.names import layer_of
from lora_gguf.mapping.transforms import HEADS, KV_HEADS, Dims

AS_HUGGING_FACE = ("qwen2", "qwen3", "phi3")
TURNED = re.compile(r"\.(?P<part>[qk])_proj$")
# all that torchtune writes into adapter_config.json
FIELDS = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}


def in_halves(adapter: Adapter, hparams: Hparams) -> Adapter:
    """Return ``adapter`` with the rows of q and k in Hugging Face's order. Raises ``MismatchError`` where they are not
    those of the base's heads, ``MalformedError`` where it does not say how many it has."""
    if not adapter.torchtunes or hparams.is_tower or hparams.architecture in AS_HUGGING_FACE:
        return adapter
    return replace(adapter, updates=[halved(update, hparams) for update in adapter.updates])


def halved(update: LoraPair | Update, hparams: Hparams) -> LoraPair | Update:
    match = TURNED.search(update.name)
    if not match:
        return update
    dims: Dims = hparams.dims(layer_of(update.name))
    heads = dims(HEADS if match["part"] == "q" else KV_HEADS)
    if update.shape[0] % (2 * heads):
        raise MismatchError(
            f"{update.name}: {update.shape[0]} rows do not divide by the {heads} heads of {hparams.label}: is it the "
            "base it was trained on?"
        )
    rows = np.arange(update.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
    return update.take(Piece(update.name, rows=rows))


def doubts(adapter: Adapter, hparams: Hparams) -> list[str]:
    """Return a warning where the adapter seems to be torchtune's own conversion to PEFT of a family that it gets
    wrong."""
    if adapter.torchtunes or hparams.architecture not in AS_HUGGING_FACE:
        return []
    if not {"r", "lora_alpha", "target_modules"} <= adapter.config.keys() <= FIELDS:
        return []
    if not any(TURNED.search(update.name) for update in adapter.updates):
        return []
    return [
        "saved by torchtune, as it seems, which puts the rows of q_proj and k_proj of this family in a wrong order "
        "where it writes PEFT's format: name its adapter_model.pt instead"
    ]
