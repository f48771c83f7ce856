"""A part of the corpora through the command line; the whole is in ``tests/chaos``."""

from __future__ import annotations

import math

import pytest

from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import raw_key_values
from tests.common import pack_gguf, pack_kv, pack_string, text_kv, u32_kv
from tests.contract import check_refusal
from tests.gguf_corpus import array
from tests.refusals import CORPORA, holes

EVERY = 12


@pytest.mark.campaign("refusals by the command line")
@pytest.mark.parametrize("corpus", CORPORA)
def test_the_contract_of_a_refusal(case, record_property, corpus):
    record_property("runs", -(-len(CORPORA[corpus][1]) // EVERY))
    assert list(holes(case, corpus, EVERY)) == []


HEAD = (
    text_kv("general.architecture", "llama"),
    u32_kv("llama.block_count", 1),
    u32_kv("llama.attention.head_count", 2),
)
ADAPTER = (HEAD[0], text_kv("general.type", "adapter"), text_kv("adapter.type", "lora"))
UP, DOWN = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"


def _zeros(name: str, shape: tuple) -> tuple:
    return name, "F32", shape, bytes(4 * math.prod(shape))


@pytest.mark.campaign("refusals by the command line")
@pytest.mark.parametrize("options", [(), ("--quantize", "Q4_0"), ("--type", "Q8_0"), ("--rounding", "fresh")])
@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (2, 0, 32), (), (1,), (2, 3, 4, 32), (1, 1, 1, 1)])
def test_tensors_of_odd_shapes(case, record_property, shape, options):
    """Beside one that is adapted, and adapted themselves."""
    factors = [_zeros(f"{DOWN}.lora_a", (1, 32)), _zeros(f"{DOWN}.lora_b", (4, 1))]
    odd = [[], *([_zeros(f"{UP}.lora_a", (1, 32)), _zeros(f"{UP}.lora_b", (n, 1))] for n in (0, 4, 32))]
    record_property("runs", len(odd))
    for more in odd:
        case.reset()
        (case.folder / "odd.gguf").write_bytes(pack_gguf(HEAD, [_zeros(UP, shape), _zeros(DOWN, (4, 32))]))
        (case.folder / "bad.gguf").write_bytes(pack_gguf(ADAPTER, more + factors))
        result = case.forge.run("merge", "odd.gguf", "bad.gguf", "-o", "out.gguf", "--force", *options, cwd=case.folder)
        if result.code:
            check_refusal(result)
        else:
            assert not more and "Traceback" not in result.err


HEADS = (
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.block_count",
    "general.architecture",
    "llama.embedding_length",
)
ODD = {
    "text": (8, pack_string("\x1b[2Jx")), "u64": (10, b"\xff" * 8), "negative": (5, b"\xff" * 4), "zero": (4, bytes(4)), "NaN": (6, b"\0\0\xc0\x7f"),
    "array": (9, array(4, 3, b"\1\0\0\0" * 3)), "large": (4, b"\xff\xff\xff\x7f"), "empty": (9, array(8, 0)), "bool": (7, b"\1"),
}  # fmt: skip


@pytest.mark.campaign("refusals by the command line")
@pytest.mark.parametrize("key", HEADS)
def test_hyperparameters_of_odd_types_and_values(case, record_property, key):
    record_property("runs", len(ODD))
    with GgufReader(case.folder / "llama.gguf") as reader:
        pairs = dict(zip(reader.kv, raw_key_values(reader)))
        tensors = [
            (info.name, info.type.name, info.shape, reader.read(info).tobytes()) for info in reader.tensors.values()
        ]
    for type_id, value in ODD.values():
        case.reset()
        (case.folder / "odd.gguf").write_bytes(
            pack_gguf(list({**pairs, key: pack_kv(key, type_id, value)}.values()), tensors)
        )
        result = case.forge.run("merge", "odd.gguf", "peft", "-o", "out.gguf", "--force", cwd=case.folder)
        if result.code:
            check_refusal(result)
