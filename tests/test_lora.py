"""``lora``: adapter GGUFs out and in, and the one alpha that stands for many scales."""

from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.adapters.lora import LoraPair, read_adapter_gguf, write_adapter_gguf
from lora_gguf.errors import MalformedError, NumericError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, key_value
from lora_gguf.quants.ggml import BY_NAME


def pair(name="blk.0.attn_q.weight", r=32, n_in=64, n_out=96, scale=2.0, experts=()):
    rng = np.random.default_rng(r + n_out)
    a = rng.standard_normal((*experts, r, n_in), np.float32)
    return LoraPair(name, a, rng.standard_normal((*experts, n_out, r), np.float32), scale)


@pytest.mark.parametrize(("outtype", "bits"), [("f32", 23), ("f16", 10), ("bf16", 7), ("q8_0", 6)])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_round_trip(tmp_path, outtype, bits, experts):
    written = [pair(experts=experts), pair("token_embd.weight", n_out=200)]
    write_adapter_gguf(tmp_path / "a.gguf", written, "llama", outtype)
    read, architecture = read_adapter_gguf(tmp_path / "a.gguf")
    assert architecture == "llama" and [p.name for p in read] == [p.name for p in written]
    for before, after in zip(written, read, strict=True):
        assert after.scale == before.scale
        for x, y in ((before.a, after.a), (before.b, after.b)):
            np.testing.assert_allclose(y, x, rtol=2.0**-bits, atol=0 if outtype != "q8_0" else np.abs(x).max() / 127)


def test_the_loaders_contract(tmp_path):
    write_adapter_gguf(tmp_path / "a.gguf", [pair(), pair("token_embd.weight", n_out=200)], "llama", "q8_0")
    with GgufReader(tmp_path / "a.gguf") as file:
        assert file.kv["adapter.lora.alpha"].type == 6 and file.get("adapter.lora.alpha") == 64.0
        assert (file.get("general.type"), file.get("adapter.type"), file.architecture) == ("adapter", "lora", "llama")
        shapes = {name: info.shape for name, info in file.tensors.items()}
    assert shapes == {
        "blk.0.attn_q.weight.lora_a": (32, 64), "blk.0.attn_q.weight.lora_b": (96, 32),
        "token_embd.weight.lora_a": (200, 32), "token_embd.weight.lora_b": (64, 32),
    }  # fmt: skip


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path):
    write_adapter_gguf(tmp_path / "a.gguf", [pair(r=8)], "llama", "q8_0")
    with GgufReader(tmp_path / "a.gguf") as file:
        assert [info.type.name for info in file.tensors.values()] == ["Q8_0", "F16"]


def test_one_alpha_leaves_b_as_it_is_and_other_scales_go_into_b(tmp_path):
    written = [pair(f"blk.{i}.attn_q.weight", r=32) for i in range(3)] + [pair("blk.3.attn_q.weight", r=16, scale=4.0)]
    written += [
        pair("blk.4.attn_q.weight", scale=0.5),
        pair("blk.5.attn_q.weight", scale=0.0),
        pair("blk.6.attn_q.weight", scale=-1),
    ]
    write_adapter_gguf(tmp_path / "a.gguf", written, "llama")
    read, _ = read_adapter_gguf(tmp_path / "a.gguf")
    for before, after in zip(written, read, strict=True):
        np.testing.assert_allclose(after.delta(), before.delta(), rtol=1e-5, atol=1e-5)
    for before, after in zip(written[:4], read, strict=False):
        np.testing.assert_array_equal(after.b, before.b)


def test_an_adapter_whose_scales_are_all_zero_changes_nothing(tmp_path):
    write_adapter_gguf(tmp_path / "a.gguf", [pair(scale=0.0)], "llama")
    with GgufReader(tmp_path / "a.gguf") as file:
        assert file.get("adapter.lora.alpha") != 0
    assert not read_adapter_gguf(tmp_path / "a.gguf")[0][0].delta().any()


@pytest.mark.parametrize(("outtype", "value"), [("f16", 70000.0), ("f32", np.inf), ("bf16", np.nan)])
def test_refuses_what_the_type_cannot_hold(tmp_path, outtype, value):
    broken = pair()
    broken.a[0, 0] = value
    with pytest.raises(NumericError, match="blk.0.attn_q.weight.lora_a"):
        write_adapter_gguf(tmp_path / "a.gguf", [broken], "llama", outtype)
    assert not list(tmp_path.iterdir())


def write(path, tensors, alpha=("adapter.lora.alpha", 8.0, "f32"), kind="adapter"):
    header = [
        ("general.architecture", "llama", "str"),
        ("general.type", kind, "str"),
        ("adapter.type", "lora", "str"),
        alpha,
    ]
    specs = [TensorSpec(name, BY_NAME["F32"], array.shape) for name, array in tensors.items()]
    with GgufWriter(path, [key_value(*entry) for entry in header if entry], specs) as writer:
        for name, array in tensors.items():
            writer.write(writer.tensors[name], 0, array)
        writer.commit()
    return path


A, B = np.ones((4, 6), np.float32), np.ones((10, 4), np.float32)
Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(("adapter.lora.alpha", 8.0, "f32"), 2.0), (("adapter.lora.alpha", 0.0, "f32"), 1.0), (None, 1.0)],
)
def test_scale_is_alpha_by_rank_and_one_without_alpha(tmp_path, alpha, scale):
    tensors = {f"{Q}.lora_a": A, f"{Q}.lora_b": B, "blk.0.attn_norm.weight": np.ones(3, np.float32)}
    (read,), _ = read_adapter_gguf(write(tmp_path / "a.gguf", tensors, alpha))
    assert read.scale == scale and read.shape == (10, 6)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{Q}.lora_a": A},
        {f"{Q}.lora_a": A, f"{Q}.lora_b": B.T.copy()},
        {f"{Q}.lora_a": A, f"{Q}.lora_b": B, "blk.0.other": A},
        {f"{Q}.lora_a": A, f"{Q}.lora_b": np.ones((2, 10, 4), np.float32)},
        {f"{Q}.lora_a": np.ones((2, 4, 6), np.float32), f"{Q}.lora_b": np.ones((3, 10, 4), np.float32)},
        {"blk.0.attn_norm.weight": np.ones(3, np.float32)},
    ],
)
def test_refuses_what_the_loader_would(tmp_path, tensors):
    with pytest.raises(MalformedError):
        read_adapter_gguf(write(tmp_path / "a.gguf", tensors))


@pytest.mark.parametrize("alpha", [("adapter.lora.alpha", np.nan, "f32"), ("adapter.lora.alpha", np.inf, "f32")])
def test_refuses_an_alpha_that_is_no_number(tmp_path, alpha):
    with pytest.raises(NumericError):
        read_adapter_gguf(write(tmp_path / "a.gguf", {f"{Q}.lora_a": A, f"{Q}.lora_b": B}, alpha))


def test_refuses_an_alpha_of_another_type_and_a_model(tmp_path):
    tensors = {f"{Q}.lora_a": A, f"{Q}.lora_b": B}
    with pytest.raises(MalformedError):
        read_adapter_gguf(write(tmp_path / "a.gguf", tensors, ("adapter.lora.alpha", 8, "u32")))
    with pytest.raises(MalformedError, match="expected an adapter"):
        read_adapter_gguf(write(tmp_path / "b.gguf", tensors, kind="model"))


def test_refuses_nan_in_a_tensor(tmp_path):
    broken = A.copy()
    broken[2, 3] = np.nan
    with pytest.raises(NumericError, match=r"lora_a\[2, 3\]"):
        read_adapter_gguf(write(tmp_path / "a.gguf", {f"{Q}.lora_a": broken, f"{Q}.lora_b": B}))
