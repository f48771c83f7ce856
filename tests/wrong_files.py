"""Merged files that are wrong in a known way, of any type: pieces of another file, other grids, other metadata.

Each damage takes a ``Merge`` and returns the bytes of a file that must not be called right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_gguf.adapters.lora import write_adapter_gguf
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import key_value, raw_key_values
from lora_gguf.merging.options import Policy
from lora_gguf.quants.table import CODECS
from tests.calls import merge
from tests.common import pack_gguf
from tests.test_verify import N_HEADS, N_LAYERS, some_pairs, write_base

TENSOR = "blk.1.ffn_up.weight"


@dataclass
class Merge:
    """A base of one type, an adapter of a ``size``, and their right merge by ``rounding``, in a folder."""

    folder: Path
    type_name: str
    size: float
    rounding: str

    def __post_init__(self):
        self.base, self.adapter, self.merged = (self.folder / f"{name}.gguf" for name in ("base", "adapter", "merged"))
        write_base(self.base, "F16" if self.rounding == "fresh" else self.type_name)
        self.pairs = some_pairs(self.size)
        write_adapter_gguf(self.adapter, self.pairs, "llama", "f32", force=True)
        self.merge([(self.adapter, 1.0)], self.merged)

    def merge(self, adapters, out, seed=0):
        policy = Policy(self.rounding, seed, type=self.type_name)
        merge(self.base, adapters, out, policy, force=True)
        return out

    def other(self, pairs, scale=1.0):
        path = self.folder / "other.gguf"
        write_adapter_gguf(path, pairs, "llama", "f32", force=True)
        return self.merge([(path, scale)], self.folder / "other-merged.gguf")

    def alone(self):
        """The merge of no update: what a merge writes that leaves the adapter out."""
        return self.other(self.pairs, 0.0)


def unpacked(path):
    """(key/value pairs by key, tensors: name -> [type, shape, uint8 (rows, row_bytes)]) of a file."""
    with GgufReader(path) as reader:
        pairs = dict(zip(reader.kv, raw_key_values(reader)))
        tensors = {name: [info.type.name, info.shape, reader.read(info)] for name, info in reader.tensors.items()}
    return pairs, tensors


def packed(pairs, tensors, *, ours: bool) -> bytes:
    kept = [raw for key, raw in pairs.items() if ours or not key.startswith("lora_gguf.")]
    return pack_gguf(kept, [(name, kind, shape, rows.tobytes()) for name, (kind, shape, rows) in tensors.items()])


def adapted(tensors):
    return [name for name in tensors if name.startswith("blk.") and "norm" not in name]


def grafted(names, rows=slice(None), columns=slice(None)):
    """Pieces of the merge that lacks the update."""

    def damage(case, pairs, tensors):
        donor = unpacked(case.alone())[1]
        for name in names(tensors):
            tensors[name][2][rows, columns] = donor[name][2][rows, columns]

    return damage


def _block(tensors, first, count=1):
    size = CODECS[tensors[TENSOR][0]].type.block_bytes
    return slice(first * size, (first + count) * size)


def one_block(case, pairs, tensors):
    donor, at = unpacked(case.alone())[1], _block(tensors, 0)
    differs = (donor[TENSOR][2][:, at] != tensors[TENSOR][2][:, at]).any(1)
    row = int(differs.argmax())
    assert differs.any()
    tensors[TENSOR][2][row, at] = donor[TENSOR][2][row, at]


def one_code(case, pairs, tensors):
    """A low bit of a byte in the middle of a block, in one tensor."""
    size = CODECS[tensors[TENSOR][0]].type.block_bytes
    tensors[TENSOR][2][7, size // 2 if size > 4 else 0] ^= 1


def requantized(change, names=lambda tensors: [TENSOR]):
    """Weights of a right file changed, and stored in their type again."""

    def damage(case, pairs, tensors):
        for name in names(tensors):
            codec, rows = CODECS[tensors[name][0]], tensors[name][2]
            importance = np.ones(codec.decoded(rows).shape[1] if codec.needs_importance else 0, np.float32)
            tensors[name][2] = codec.encoded(np.ascontiguousarray(change(codec.decoded(rows))), importance)

    return damage


def coarse(levels):
    def change(weights):
        groups = weights.reshape(-1, 32)
        low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
        step = np.maximum(high - low, 1e-9) / (levels - 1)
        return (low + np.rint((groups - low) / step) * step).reshape(weights.shape).astype(np.float32)

    return change


def one_row_zero(weights):
    weights[7] = 0
    return weights


def rolled(weights):
    return np.roll(weights, 1, axis=0)


def swapped(case, pairs, tensors):
    one, other = "blk.0.ffn_up.weight", "blk.2.ffn_up.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]


def heads_swapped(case, pairs, tensors):
    rows, size = tensors["blk.1.attn_q.weight"][2], 128 // N_HEADS
    rows[:size], rows[size : 2 * size] = rows[size : 2 * size].copy(), rows[:size].copy()


def with_key(key, value, kind):
    def damage(case, pairs, tensors):
        before = list(pairs.items())
        pairs.clear()
        ours = [entry for entry in before if entry[0].startswith("lora_gguf.")]
        pairs.update([entry for entry in before if entry not in ours])
        pairs[key] = key_value(key, value, kind)
        pairs.update(ours)

    return damage


def without_key(key):
    return lambda case, pairs, tensors: pairs.pop(key)


def replaced_by(make):
    def damage(case, pairs, tensors):
        tensors.update(unpacked(make(case))[1])

    return damage


def untouched_changed(case, pairs, tensors):
    tensors["token_embd.weight"][2][3, -1] ^= 1


def norm_changed(case, pairs, tensors):
    tensors["blk.1.ffn_norm.weight"][2][0, 7] ^= 1


def half_left_out(case, pairs, tensors):
    grafted(lambda tensors: [n for n in adapted(tensors) if not n.startswith("blk.0.")])(case, pairs, tensors)


DAMAGES = {
    "a layer left out": grafted(lambda tensors: [n for n in adapted(tensors) if n.startswith("blk.1.")]),
    "two layers of three left out": half_left_out,
    "a tensor left out": grafted(lambda tensors: [TENSOR]),
    "all left out": grafted(adapted),
    "a head left out": grafted(lambda tensors: ["blk.1.attn_q.weight"], slice(0, 128 // N_HEADS)),
    "a row left out": grafted(lambda tensors: [TENSOR], slice(5, 6)),
    "a block left out": one_block,
    "a code changed": one_code,
    "a grid inflated": requantized(lambda weights: weights * np.float32(1.5)),
    "a grid shrunk": requantized(lambda weights: weights * np.float32(0.8)),
    "a grid shifted": requantized(lambda weights: weights + np.float32(0.004)),
    "3 levels a block": requantized(coarse(3), adapted),
    "a tensor on 2 levels a block": requantized(coarse(2)),
    "a tensor zeroed": requantized(np.zeros_like),
    "a row zeroed": requantized(one_row_zero),
    "rows rolled": requantized(rolled),
    "tensors swapped between layers": swapped,
    "heads swapped": heads_swapped,
    "an untouched tensor changed": untouched_changed,
    "a norm changed": norm_changed,
    "scale 0.9": replaced_by(lambda case: case.other(case.pairs, 0.9)),
    "scale 1.1": replaced_by(lambda case: case.other(case.pairs, 1.1)),
    "another seed's adapter": replaced_by(lambda case: case.other(some_pairs(case.size, seed=9))),
    "the adapter twice": replaced_by(
        lambda case: case.merge([(case.adapter, 1.0), (case.adapter, 1.0)], case.folder / "twice.gguf")
    ),
    "the adapter subtracted": replaced_by(lambda case: case.other(case.pairs, -1.0)),
    "a rope scaling added": with_key("llama.rope.scaling.type", "linear", "str"),
    "a logit scale added": with_key("llama.logit_scale", 0.5, "f32"),
    "a token option added": with_key("tokenizer.ggml.add_eos_token", True, "bool"),
    "a key lost": without_key("llama.attention.key_length"),
    "a key retyped": with_key("llama.block_count", float(N_LAYERS), "f32"),
    "a key changed": with_key("llama.attention.head_count", 8, "u32"),
}  # fmt: skip


def trailing(raw: bytes) -> bytes:
    return raw + bytes(64)


WHOLE = {"trailing data": trailing, "trailing text": lambda raw: raw + b"end"}


def spoiled(case, label, *, ours: bool) -> bytes:
    """The right file of ``case`` with the damage ``label``."""
    pairs, tensors = unpacked(case.merged)
    right = packed(pairs, tensors, ours=ours)
    if label in WHOLE:
        return WHOLE[label](right)
    DAMAGES[label](case, pairs, tensors)
    wrong = packed(pairs, tensors, ours=ours)
    assert wrong != right, label
    return wrong
