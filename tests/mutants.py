"""Seeded mutants of small valid files: bytes changed, numbers replaced, pieces cut, doubled and moved."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator

from tests.common import pack_kv, pack_string, pack_tensor_info, text_kv, u32_kv
from tests.gguf_corpus import ARRAY, SCALAR_VALUES, STRING, array, build
from tests.hostile_bin import name, pack_bin, storage, tensor, weights

NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    12,
    13,
    31,
    32,
    33,
    63,
    64,
    127,
    128,
    255,
    256,
    1 << 15,
    1 << 16,
    1 << 30,
    1 << 31,
    (1 << 32) - 1,
)
LARGE = (1 << 32, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1)


def mutant(content: bytes, rng: random.Random) -> bytes:
    """``content`` after one to four random changes."""
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        if result:
            rng.choice(CHANGES)(result, rng)
    return bytes(result)


def _flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _byte(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] = rng.randrange(256)


def _number(content: bytearray, rng: random.Random) -> None:
    layout, values = rng.choice((("<I", NUMBERS), ("<Q", NUMBERS + LARGE)))
    at = rng.randrange(max(1, len(content) - 8))
    raw = struct.pack(layout, rng.choice(values))
    content[at : at + len(raw)] = raw


def _add(content: bytearray, rng: random.Random) -> None:
    """A little more or less in a number of 8 bytes."""
    at = rng.randrange(max(1, len(content) - 8))
    raw = bytes(content[at : at + 8]).ljust(8, b"\0")
    content[at : at + 8] = struct.pack(
        "<Q", (struct.unpack("<Q", raw)[0] + rng.choice((-32, -8, -1, 1, 8, 32))) % (1 << 64)
    )


def _cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _delete(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.choice((1, 2, 4, 8, 32))]


def _insert(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content))
    content[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 32)))


def _copy(content: bytearray, rng: random.Random) -> None:
    n_bytes = rng.choice((4, 8, 16, 64))
    start, at = rng.randrange(len(content)), rng.randrange(len(content))
    content[at : at + n_bytes] = content[start : start + n_bytes]


CHANGES = (_flip, _flip, _byte, _byte, _number, _number, _add, _cut, _delete, _insert, _copy)


def _mutants(seeds: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        yield mutant(rng.choice(seeds), rng)


def gguf_mutants(count: int, seed: int) -> Iterator[bytes]:
    """``count`` mutants of an adapter's, a model's and a tiny GGUF."""
    scalars = [pack_kv(f"s{i}", i, value) for i, value in SCALAR_VALUES.items()]
    tokens = pack_kv(
        "tokenizer.ggml.tokens", ARRAY, array(STRING, 20, b"".join(pack_string(f"token{i}") for i in range(20)))
    )
    head = [text_kv("general.architecture", "llama"), u32_kv("general.alignment", 32), u32_kv("llama.block_count", 2)]
    pairs = [
        pack_tensor_info(f"blk.{i}.attn_q.weight.lora_{x}", (32, 4), 0, n * 512)
        for n, (i, x) in enumerate((i, x) for i in (0, 1) for x in "ab")
    ]
    mixed = [
        pack_tensor_info("token_embd.weight", (256, 2), 12, 0),
        pack_tensor_info("output_norm.weight", (8,), 0, 288),
    ]
    mixed += [pack_tensor_info("blk.0.ffn_up.weight", (32, 3), 8, 320)]
    seeds = [build(head, pairs, bytes(2048)), build([*head, *scalars, tokens], mixed, bytes(448)), build()]
    return _mutants(seeds, count, seed)


def safetensors_mutants(count: int, seed: int) -> Iterator[bytes]:
    """``count`` mutants of safetensors files of one, four and twenty tensors."""
    return _mutants([_safetensors(n) for n in (1, 4, 20)], count, seed)


def _safetensors(n_tensors: int) -> bytes:
    kinds = (("F32", 4), ("BF16", 2), ("F16", 2), ("I64", 8))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for i in range(n_tensors):
        dtype, n_bytes = kinds[i % 4]
        header[f"layers.{i}.lora_A.weight"] = {
            "dtype": dtype,
            "shape": [2, 3],
            "data_offsets": [end, end + 6 * n_bytes],
        }
        end += 6 * n_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + bytes(i % 251 for i in range(end))


def bin_mutants(count: int, seed: int) -> Iterator[bytes]:
    """``count`` mutants: half of whole PyTorch files, half of their pickles, so that the archive around them stays
    right.
    """
    rng = random.Random(seed)
    half = tensor((3, 2), (2, 1), where=storage("1", name("torch", "HalfStorage")))
    pickle = weights(x=tensor(), y=tensor((2, 2), (3, 1), 1), z=half)
    storages = {"0": bytes(range(24)), "1": bytes(range(12))}
    whole = pack_bin(pickle, storages)
    for i in range(count):
        yield mutant(whole, rng) if i % 2 else pack_bin(mutant(pickle, rng), storages)
