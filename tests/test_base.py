"""Split bases: in, out, shard by shard, and the ways in which shards do not belong together."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.errors import LoraGgufError, UsageError
from lora_gguf.files.base import Base, shard_path, split_name
from lora_gguf.files.gguf_reader import GgufReader
from tests.calls import merge
from tests.common import ggml, pack_gguf, pack_kv, text_kv, u32_kv

NAMES = [f"blk.{i}.ffn_up.weight" for i in range(6)]
ARCHITECTURE = text_kv("general.architecture", "llama")


def u16_kv(key, value):
    return pack_kv(key, 2, struct.pack("<H", value))


def split_kv(number, count, total=6):
    return [
        u16_kv("split.no", number),
        u16_kv("split.count", count),
        pack_kv("split.tensors.count", 5, struct.pack("<i", total)),
    ]


def tensors(names, seed=0):
    rngs = [np.random.default_rng(seed + int(name[4])) for name in names]
    return [(name, "F32", (8, 32), rng.normal(size=(8, 32)).astype("f4").tobytes()) for name, rng in zip(names, rngs)]


def write_split(folder, groups=(NAMES[:2], NAMES[2:5], NAMES[5:]), prefix="model"):
    for i, names in enumerate(groups):
        head = [ARCHITECTURE, u32_kv("llama.block_count", 6)] if i == 0 else []
        shard_path(folder / prefix, i, len(groups)).write_bytes(
            pack_gguf([*head, *split_kv(i, len(groups))], tensors(names))
        )
    return shard_path(folder / prefix, 0, len(groups))


def write_adapter(folder, names=NAMES):
    rng = np.random.default_rng(9)
    pairs = [
        LoraPair(n, rng.normal(size=(2, 32)).astype("f4"), rng.normal(size=(8, 2)).astype("f4"), 1.0) for n in names
    ]
    write_adapter_gguf(folder / "adapter.gguf", pairs, "llama", force=True)
    return [(folder / "adapter.gguf", 1.0)], {pair.name: pair.delta() for pair in pairs}


def test_names():
    assert shard_path("a/m", 2, 5).name == "m-00003-of-00005.gguf"
    assert split_name("a/m-00003-of-00005.gguf") == ("a/m", 2, 5) and split_name("m.gguf") is None


@pytest.mark.parametrize("groups", [(NAMES[:2], NAMES[2:5], NAMES[5:]), ([], NAMES), (NAMES,)])
def test_any_shard_opens_the_whole(tmp_path, groups):
    write_split(tmp_path, groups)
    for i in range(len(groups)):
        with Base(shard_path(tmp_path / "model", i, len(groups))) as base:
            assert list(base.tensors) == NAMES and base.architecture == "llama" and base.hparam("block_count") == 6


def test_shards_merge_into_one_file(tmp_path):
    first = write_split(tmp_path)
    adapters, deltas = write_adapter(tmp_path)
    merge(first, adapters, tmp_path / "one.gguf")
    with GgufReader(tmp_path / "one.gguf") as reader:
        assert list(reader.tensors) == NAMES and not [key for key in reader.kv if key.startswith("split.")]
        for name, _, _, raw in tensors(NAMES):
            got = reader.read(reader.tensors[name]).view("f4").reshape(8, 32)
            assert np.allclose(got, np.frombuffer(raw, "f4").reshape(8, 32) + deltas[name], atol=1e-5)


def test_shards_stay_shards_and_each_can_be_merged_alone(tmp_path):
    first = write_split(tmp_path)
    adapters, _ = write_adapter(tmp_path)
    report = merge(first, adapters, tmp_path / "whole.gguf", shards=True)
    assert [path.name for path in report.written] == [f"whole-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i in (1, 2, 3):
        merge(first, adapters, tmp_path / "part.gguf", shard=f"{i}/3")
        name = f"-0000{i}-of-00003.gguf"
        assert (tmp_path / f"part{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    with Base(tmp_path / "whole-00001-of-00003.gguf") as base:
        assert list(base.tensors) == NAMES and base.get("lora_gguf.rounding")
    for path in report.written:
        ggml().gguf_init_from_file.restype = __import__("ctypes").c_void_p
        assert ggml().gguf_init_from_file(str(path).encode(), _no_alloc()) is not None


def _no_alloc():
    import ctypes

    class Params(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]

    return Params(True, None)


def test_the_report_of_a_shard_is_of_its_tensors(tmp_path):
    first, (adapters, _) = write_split(tmp_path), write_adapter(tmp_path)
    whole = merge(first, adapters, tmp_path / "whole.gguf", shards=True)
    parts = [merge(first, adapters, tmp_path / "part.gguf", shard=f"{i}/3") for i in (1, 2, 3)]
    of_parts = [tensor["name"] for part in parts for tensor in part.as_dict()["merged"]]
    assert of_parts == [tensor["name"] for tensor in whole.as_dict()["merged"]]
    for part in parts:
        found = part.as_dict()
        assert found["all"]["weights"] == sum(tensor["weights"] for tensor in found["merged"])
        assert sum(kind["count"] for kind in found["kinds"]) == len(found["merged"]) == len(part.retention)


def test_one_file_becomes_shards_of_a_size(tmp_path):
    first = write_split(tmp_path, (NAMES,))
    adapters, _ = write_adapter(tmp_path)
    report = merge(first, adapters, tmp_path / "out.gguf", max_bytes=2 * 8 * 32 * 4)
    assert len(report.written) == 3
    with Base(report.written[2]) as base:
        assert list(base.tensors) == NAMES


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1/2", "x", "1", "1/0"])
def test_shards_that_are_none(tmp_path, shard):
    with pytest.raises(UsageError, match="--shard"):
        merge(write_split(tmp_path), write_adapter(tmp_path)[0], tmp_path / "o.gguf", shard=shard)


def _replace(number, count=3, key_values=None, names=None):
    def change(folder):
        path = shard_path(folder / "model", number, count)
        changed = split_kv(number, count) if key_values is None else key_values
        path.write_bytes(pack_gguf(changed, tensors(NAMES[2:5] if names is None else names)))

    return change


def _swap(folder):
    one, two = (shard_path(folder / "model", i, 3) for i in (1, 2))
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def _link(folder):
    path = shard_path(folder / "model", 2, 3)
    path.unlink()
    path.symlink_to(shard_path(folder / "model", 1, 3))


def _truncate(folder):
    path = shard_path(folder / "model", 1, 3)
    path.write_bytes(path.read_bytes()[:-200])


BROKEN = {
    "count 0 in a later shard": _replace(1, key_values=split_kv(1, 0)),
    "count 65535": _replace(1, key_values=split_kv(1, 65535)),
    "count missing": _replace(1, key_values=[u16_kv("split.no", 1)]),
    "count of a wrong type": _replace(1, key_values=[u16_kv("split.no", 1), text_kv("split.count", "3")]),
    "number wrong": _replace(1, key_values=split_kv(2, 3)),
    "number past the end": _replace(1, key_values=split_kv(7, 3)),
    "number missing": _replace(1, key_values=[u16_kv("split.count", 3)]),
    "shard missing": lambda folder: shard_path(folder / "model", 2, 3).unlink(),
    "shards swapped": _swap,
    "of another architecture": _replace(1, key_values=[text_kv("general.architecture", "gemma3"), *split_kv(1, 3)]),
    "tensor in two shards": _replace(1, names=NAMES[1:5]),
    "tensor missing": _replace(1, names=NAMES[2:4]),
    "a link to another shard": _link,
    "an empty file": lambda folder: shard_path(folder / "model", 1, 3).write_bytes(b""),
    "truncated": _truncate,
    "not a GGUF": lambda folder: shard_path(folder / "model", 1, 3).write_bytes(b"<html>"),
    "a directory": lambda folder: (
        shard_path(folder / "model", 1, 3).unlink(),
        shard_path(folder / "model", 1, 3).mkdir(),
    ),
    "big-endian": lambda folder: shard_path(folder / "model", 1, 3).write_bytes(b"GGUF\0\0\0\3" + bytes(64)),
    "total count wrong": _replace(0, key_values=[ARCHITECTURE, *split_kv(0, 3, total=7)], names=NAMES[:2]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_shards_that_do_not_belong_together(tmp_path, case):
    first = write_split(tmp_path)
    adapters, _ = write_adapter(tmp_path)
    BROKEN[case](tmp_path)
    with pytest.raises(LoraGgufError):
        merge(first, adapters, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "name", ["renamed.gguf", "model-00002-of-00003.gguf", "model-00001-of-00004.gguf", "model-1-of-3.gguf"]
)
def test_a_shard_under_another_name(tmp_path, name):
    first = write_split(tmp_path)
    raw = first.read_bytes()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes(raw)
    with pytest.raises(UsageError, match="give it its name back"):
        Base(tmp_path / "x" / name)
