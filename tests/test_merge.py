"""The merge of small files of every type, judged by libgguf's decoding."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from libgguf import dequantize_rows, quantize_rows

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.errors import FileError, MismatchError, NumericError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.output import SUFFIX
from lora_gguf.kernels.low_rank import low_rank
from lora_gguf.merging import chunks, work
from lora_gguf.merging.options import Policy
from lora_gguf.quants.ggml import BY_NAME
from tests.calls import merge
from tests.common import FIXTURES, ROOT, pack_gguf, smollm2_path, text_kv, u32_kv, valid_rows

KEPT_GRID = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
NAME = "blk.0.ffn_up.weight"
OTHER = "blk.0.ffn_down.weight"


def stored(weights, type_name):
    if type_name == "F32":
        return weights
    if type_name == "F16":
        return weights.astype(np.float16)
    if type_name == "BF16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return np.frombuffer(bytes(quantize_rows(weights, BY_NAME[type_name].id)), np.uint8).reshape(len(weights), -1)


def loaded(raw, type_name, n_cols):
    if type_name == "F32":
        return raw.view(np.float32)
    if type_name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if type_name == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(dequantize_rows(raw, BY_NAME[type_name].id, n_per_row=n_cols)).reshape(len(raw), n_cols)


def base_and_adapter(folder, type_name, rows=64, cols=512, size=0.002, rank=4, seed=0):
    """A base with one tensor to merge into and one to leave alone, and an adapter GGUF; returns paths and the delta."""
    rng = np.random.default_rng(seed)
    weights = (rng.normal(size=(rows, cols)) * 0.02).astype(np.float32)
    raw = stored(weights, type_name).tobytes()
    key_values = [
        text_kv("general.architecture", "llama"),
        u32_kv("llama.block_count", 1),
        u32_kv("llama.attention.head_count", 2),
    ]
    (folder / "base.gguf").write_bytes(
        pack_gguf(key_values, [(NAME, type_name, (rows, cols), raw), (OTHER, type_name, (rows, cols), raw)])
    )
    a, b = rng.normal(size=(rank, cols)).astype(np.float32), (rng.normal(size=(rows, rank)) * size).astype(np.float32)
    pair = LoraPair(NAME, a, b, 0.5)
    write_adapter_gguf(folder / "adapter.gguf", [pair], "llama", "f32")
    delta = np.empty((rows, cols), np.float32)
    low_rank(pair.b * np.float32(pair.scale), pair.a, delta)
    return folder / "base.gguf", folder / "adapter.gguf", delta


def tensor(path, name):
    with GgufReader(path) as reader:
        return reader.read(reader.tensors[name])


@pytest.mark.parametrize("rounding", ["dither", "nearest"])
@pytest.mark.parametrize("type_name", KEPT_GRID)
def test_base_plus_update_within_a_step(tmp_path, type_name, rounding):
    base, adapter, delta = base_and_adapter(tmp_path, type_name)
    report = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy(rounding))
    before, after = (loaded(tensor(path, NAME), type_name, 512) for path in (base, tmp_path / "out.gguf"))
    moved = after.astype(np.float64) - before
    kept = (moved * delta).sum() / (delta.astype(np.float64) ** 2).sum()
    assert np.isclose(report.whole.kept, kept, atol=1e-3)
    step = np.abs(moved[moved != 0]).max() if type_name not in ("F32", "F16", "BF16") else 2e-3
    assert np.abs(moved - delta).max() < 1.01 * step + np.abs(delta).max()
    if rounding == "dither":
        assert 0.8 < kept < 1.1
    assert valid_rows(type_name, tensor(tmp_path / "out.gguf", NAME))
    assert (tensor(base, OTHER) == tensor(tmp_path / "out.gguf", OTHER)).all()


@pytest.mark.parametrize("rounding", ["dither", "nearest"])
@pytest.mark.parametrize("type_name", KEPT_GRID)
def test_scale_zero_changes_no_byte_of_data(tmp_path, type_name, rounding):
    base, adapter, _ = base_and_adapter(tmp_path, type_name)
    merge(base, [(adapter, 0.0)], tmp_path / "out.gguf", Policy(rounding))
    with GgufReader(base) as reader, GgufReader(tmp_path / "out.gguf") as merged:
        assert base.read_bytes()[reader.data_position :] == (tmp_path / "out.gguf").read_bytes()[merged.data_position :]


def test_the_bytes_depend_on_neither_threads_nor_chunks(tmp_path, monkeypatch):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    digests = set()
    ways = (1, 1 << 18, None), (2, 1 << 18, None), (2, 512, None), (3, 5000, None), (2, 1 << 18, 100_000), (1, 9, 1)
    for threads, chunk, memory in ways:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunks.ROUNDED * chunk)
        merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", threads=threads, memory=memory, force=True)
        digests.add(hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest())
    assert len(digests) == 1
    merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy(seed=1), force=True)
    assert hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest() not in digests


@pytest.mark.parametrize("type_name", ["Q4_K", "Q4_1", "IQ4_NL"])
def test_the_bytes_do_not_depend_on_the_processor(tmp_path, type_name):
    base, adapter, _ = base_and_adapter(tmp_path, type_name)
    merge(base, [(adapter, 1.0)], tmp_path / "here.gguf")
    oldest = {"NUMBA_CPU_NAME": "generic", "LORA_GGUF_CACHE": str(tmp_path / "kernels")}  # no AVX, no FMA
    command = [sys.executable, "-m", "lora_gguf", "merge", base, adapter, "-o", tmp_path / "oldest.gguf"]
    subprocess.run(command, env={**os.environ, **oldest, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert (tmp_path / "here.gguf").read_bytes() == (tmp_path / "oldest.gguf").read_bytes()


def test_metadata_is_the_bases_and_then_ours(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    merge(base, [(adapter, 0.75)], tmp_path / "one.gguf")
    merge(tmp_path / "one.gguf", [(adapter, -0.5)], tmp_path / "two.gguf", Policy(seed=7), again=True)
    with GgufReader(base) as before, GgufReader(tmp_path / "two.gguf") as after:
        keys = list(after.kv)
        assert keys[: len(before.kv)] == list(before.kv)
        own = ["version", "adapter.names", "adapter.scales", "adapter.sha256", "base.header_sha256", "base.size",
               "rounding", "seed", "metadata_sha256"]  # fmt: skip
        earlier = [f"earlier.0.{key}" for key in own]
        ours = [key.removeprefix("lora_gguf.") for key in keys[len(before.kv) :] if key.startswith("lora_gguf.")]
        assert ours == [*earlier, *own] and keys[-len(ours) :] == [f"lora_gguf.{key}" for key in ours]
        assert after.get("lora_gguf.earlier.0.adapter.scales") == [0.75]
        assert after.get("lora_gguf.adapter.scales") == [-0.5] and after.get("lora_gguf.seed") == 7


def test_several_adapters_are_summed_and_rounded_once(tmp_path):
    base, adapter, delta = base_and_adapter(tmp_path, "F32")
    merge(base, [(adapter, 0.5), (adapter, 0.25)], tmp_path / "out.gguf")
    moved = loaded(tensor(tmp_path / "out.gguf", NAME), "F32", 512) - loaded(tensor(base, NAME), "F32", 512)
    assert np.allclose(moved, 0.75 * delta, atol=1e-7)


def test_experts_are_merged_one_by_one(tmp_path):
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(3, 8, 64)).astype(np.float32)
    name = "blk.0.ffn_up_exps.weight"
    key_values = [text_kv("general.architecture", "llama"), u32_kv("llama.block_count", 1)]
    (tmp_path / "base.gguf").write_bytes(pack_gguf(key_values, [(name, "F32", (3, 8, 64), weights.tobytes())]))
    pair = LoraPair(
        name, rng.normal(size=(3, 2, 64)).astype(np.float32), rng.normal(size=(3, 8, 2)).astype(np.float32), 1.0
    )
    write_adapter_gguf(tmp_path / "adapter.gguf", [pair], "llama", "f32")
    merge(tmp_path / "base.gguf", [(tmp_path / "adapter.gguf", 1.0)], tmp_path / "out.gguf")
    assert np.allclose(
        tensor(tmp_path / "out.gguf", name).view(np.float32).reshape(3, 8, 64), weights + pair.delta(), atol=1e-5
    )


def test_dry_run_writes_nothing(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    report = merge(base, [(adapter, 1.0)], None)
    assert [plan.source.name for plan in report.plan.merged] == [NAME]
    assert sorted(os.listdir(tmp_path)) == ["adapter.gguf", "base.gguf"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q4_K", "Q6_K"])
def test_a_broken_base_tensor_is_refused(tmp_path, type_name, bad):
    base, adapter, _ = base_and_adapter(tmp_path, type_name)
    raw = bytearray(base.read_bytes())
    with GgufReader(base) as reader:
        at = reader.data_position + reader.tensors[NAME].offset + {"Q6_K": 208, "Q4_K": 2}.get(type_name, 0)
    raw[at : at + 4] = (
        np.float32(bad).tobytes() if type_name == "F32" else np.float16(bad).tobytes() + bytes(raw[at + 2 : at + 4])
    )
    base.write_bytes(raw)
    with pytest.raises(NumericError, match=NAME):
        merge(base, [(adapter, 1.0)], tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == ["adapter.gguf", "base.gguf"]


@pytest.mark.campaign("adapters that do not fit")
def test_an_adapter_that_does_not_fit(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    (tmp_path / "x").mkdir()
    other, _, _ = base_and_adapter(tmp_path / "x", "Q4_0", rows=32)
    with pytest.raises(MismatchError):
        merge(other, [(adapter, 1.0)], tmp_path / "out.gguf")


def test_an_error_on_the_way_leaves_the_output_as_it_was(tmp_path, monkeypatch):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    (tmp_path / "out.gguf").write_bytes(b"old")
    with pytest.raises(FileError):
        merge(base, [(adapter, 1.0)], tmp_path / "out.gguf")

    def fail(*_):
        raise FileError("disk")

    monkeypatch.setattr(work, "merge_rows", fail)
    with pytest.raises(FileError, match="disk"):
        merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", force=True)
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(SUFFIX)]


@pytest.mark.parametrize("target", ["Q8_0", "F16", "Q4_K", "Q5_0", "IQ4_NL"])
@pytest.mark.parametrize("source", ["Q4_0", "Q6_K", "BF16"])
def test_another_type(tmp_path, source, target):
    base, adapter, delta = base_and_adapter(tmp_path, source)
    report = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy("fresh", type=target))
    with GgufReader(tmp_path / "out.gguf") as reader:
        assert reader.tensors[NAME].type.name == target and reader.tensors[OTHER].type.name == source
        assert reader.get("general.quantization_version") == 2 and reader.get("general.file_type") is not None
        wanted = loaded(tensor(base, NAME), source, 512) + delta
        raw = reader.read(reader.tensors[NAME])
    assert raw.tobytes() == stored(wanted, target).tobytes()
    assert report.plan.merged[0].target.type.name == target


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_fresh_is_ggmls_quantizer(tmp_path, type_name):
    base, adapter, delta = base_and_adapter(tmp_path, type_name)
    merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy("fresh"))
    wanted = loaded(tensor(base, NAME), type_name, 512) + delta
    assert tensor(tmp_path / "out.gguf", NAME).tobytes() == stored(wanted, type_name).tobytes()


@pytest.mark.parametrize("type_name", ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ2_0", "Q1_0"])
def test_codebooks_keep_their_grid(tmp_path, type_name):
    base, adapter, delta = base_and_adapter(tmp_path, type_name)
    report = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf")
    before, after = (loaded(tensor(path, NAME), type_name, 512) for path in (base, tmp_path / "out.gguf"))
    moved = after.astype(np.float64) - before
    assert np.isclose(report.whole.kept, (moved * delta).sum() / (delta.astype(np.float64) ** 2).sum(), atol=1e-3)
    assert report.whole.kept > (0.25 if type_name in ("TQ2_0", "Q1_0") else 0.8)
    assert valid_rows(type_name, tensor(tmp_path / "out.gguf", NAME))


@pytest.mark.parametrize("type_name", ["IQ2_S", "IQ3_S", "IQ3_XXS"])
def test_grid_types_are_promoted_or_searched_anew(tmp_path, type_name):
    base, adapter, delta = base_and_adapter(tmp_path, type_name)
    report = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf")
    assert report.plan.merged[0].target.type.name == "Q6_K" and report.whole.kept > 0.8
    merge(base, [(adapter, 1.0)], tmp_path / "fresh.gguf", Policy("fresh"))
    wanted = loaded(tensor(base, NAME), type_name, 512) + delta
    assert tensor(tmp_path / "fresh.gguf", NAME).tobytes() == stored(wanted, type_name).tobytes()


@pytest.mark.parametrize("rounding", ["nearest", "fresh"])
def test_what_would_keep_more_is_said_with_a_figure_that_holds(tmp_path, rounding):
    report = merge(smollm2_path(), [(FIXTURES / "perl-adapter", 1.0)], tmp_path / "lost.gguf", Policy(rounding))
    assert report.whole.kept < 0.1
    said = re.search(r"--rounding auto would keep about (0\.\d+) of it at the same size", report.plan.warnings[-1])
    better = merge(smollm2_path(), [(FIXTURES / "perl-adapter", 1.0)], tmp_path / "kept.gguf", Policy("auto"))
    assert abs(better.whole.kept - float(said[1])) < 0.05 and not better.plan.warnings
