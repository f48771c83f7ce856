"""Arrays that stay in their file: numpy's numbers by every way, a merge's bytes by both, and little memory."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys

import numpy as np
import pytest

from lora_gguf import api
from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.adapters.updates import Update
from lora_gguf.errors import IntegrityError, LoraGgufError, NumericError
from lora_gguf.files import lazy_array
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, key_value
from lora_gguf.files.input_file import InputFile
from lora_gguf.files.lazy_array import LazyArray, Stored, at_hand, blocks_of, contiguous, gathered, made, stack
from lora_gguf.quants.ggml import BY_NAME
from tests import tiny
from tests.bench.shapes import Shape, write_base
from tests.common import FIXTURES, ROOT
from tests.test_merge import base_and_adapter
from tests.test_reference import NAMES as REFERENCES
from tests.test_reference import REFERENCE
from tests.test_reference import base_gguf as reference_base


@pytest.fixture
def lazy(monkeypatch):
    """Even small files and vectors stay where they are."""
    monkeypatch.setattr(lazy_array, "AT_ONCE", -1)
    monkeypatch.setattr(lazy_array, "VECTOR_BYTES", -1)


def stored(path, array, kind="F32"):
    path.write_bytes(b"head" + array.tobytes())
    with InputFile(path) as file:
        return Stored.at(file, 4, kind, array.shape)


# what may be done, on (rows, cols) and on (matrices, rows, cols)
ORDER = np.random.default_rng(3).permutation(12)
WAYS_2 = {
    "itself": lambda x: x,
    "turned": lambda x: x.T,
    "rows": lambda x: x[3:7],
    "chosen rows": lambda x: x[np.array([5, 1, 2, 11])],
    "far rows": lambda x: x[np.array([0, 11])],
    "no rows": lambda x: x[np.array([], int)],
    "a mask": lambda x: x[np.arange(12) % 3 == 0],
    "columns": lambda x: x[..., np.array([4, 0])],
    "first columns": lambda x: x[:, :3],
    "rows, with dots": lambda x: x[..., ORDER, :],
    "a row": lambda x: x[2],
    "the last row": lambda x: x[-1],
    "a factor a row": lambda x: x * np.arange(12.0)[:, None],
    "in f32": lambda x: (x * np.arange(12.0)[:, None]).astype(np.float32),
    "a number": lambda x: x * np.float32(0.3),
    "a number before": lambda x: np.float64(0.3) * x,
    "a sum": lambda x: x + np.float32(1),
    "another shape": lambda x: x.reshape(4, -1),
    "stacked": lambda x: x.reshape(3, 4, 5)[1],
    "turned in a stack": lambda x: contiguous(x.reshape(3, 4, 5).swapaxes(1, 2))[2],
    "swapped and turned": lambda x: contiguous(x.reshape(4, 3, 5).swapaxes(0, 1)).swapaxes(1, 2)[2],
    "flat": lambda x: x.ravel(),
    "gathered": lambda x: gathered(gathered(x, ORDER), np.array([4, 1]), 1),
    "rows of rows": lambda x: gathered(x, ORDER)[2:9][np.array([6, 0])],
    "made": lambda x: made(np.add, (x, np.ones((12, 1), np.float32)), (12, 5), row_wise=True)[4:6],
    "beside zeros": lambda x: stack([x, None, x[:2]], (3, 12, 7)),
    "one of a stack": lambda x: stack([x, None, x[:2]], (3, 12, 7))[2],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("way", WAYS_2)
def test_it_is_what_numpy_makes(tmp_path, lazy, way, kind):
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(12, 5)).astype(np.float16 if kind == "F16" else np.float32)
    raw = (raw.view(np.uint32) >> 16).astype(np.uint16) if kind == "BF16" else raw
    here = stored(tmp_path / "a", raw, kind)
    there = np.asarray(here)
    expected, found = WAYS_2[way](there), WAYS_2[way](here)
    again = pickle.loads(pickle.dumps(found)) if isinstance(found, LazyArray) else found
    for array in (found, again):
        assert tuple(array.shape) == expected.shape and array.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(array), expected)
    for index in (slice(1, 3), np.array([1, 0])) if expected.ndim > 1 and len(expected) > 3 else ():
        np.testing.assert_array_equal(np.asarray(found[index]), expected[index])
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks_of(found)]), expected)


@pytest.mark.parametrize("block_bytes", [8 << 20, 1 << 19])
def test_large_halves_widen_alike(tmp_path, lazy, monkeypatch, block_bytes):
    monkeypatch.setattr(lazy_array, "BLOCK_BYTES", block_bytes)
    bits = np.resize(np.arange(1 << 16, dtype=np.uint16), (4, 1 << 17))
    finite = bits[(bits & 0x7C00) != 0x7C00][: 1 << 18].reshape(4, -1)
    found = stored(tmp_path / "a", finite, "F16").astype(np.float32)
    assert found.nbytes >= lazy_array.LARGE
    np.testing.assert_array_equal(
        np.asarray(found).view(np.uint32), finite.view(np.float16).astype(np.float32).view(np.uint32)
    )


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, lazy, monkeypatch):
    array = stored(tmp_path / "a", np.arange(4000, dtype=np.float32).reshape(1000, 4))
    n_read = []
    monkeypatch.setattr(
        lazy_array.Stored,
        "read_from",
        lambda self, file, real=Stored.read_from: n_read.append(self.size) or real(self, file),
    )
    turned = gathered(contiguous(array * np.float32(2)), np.arange(1000)[::-1])
    assert turned.by_row and np.asarray(turned[10:12]).tolist() == [[7912, 7914, 7916, 7918], [7904, 7906, 7908, 7910]]
    assert sum(n_read) == 8 and at_hand(turned) is turned
    list(blocks_of(stack([array] * 3, (3, 1000, 4))[1]))
    assert sum(n_read) == 8 + 4000


@pytest.mark.parametrize("change", ["written to", "replaced", "gone"])
def test_a_file_that_changed_is_refused(tmp_path, lazy, change):
    array = stored(tmp_path / "a", np.ones((20, 3), np.float32))
    if change == "written to":
        np.asarray(array)
        (tmp_path / "a").write_bytes(b"x" * 500)
    elif change == "replaced":
        (tmp_path / "b").write_bytes(b"y" * 300)
        os.replace(tmp_path / "b", tmp_path / "a")
    else:
        (tmp_path / "a").unlink()
    with pytest.raises(LoraGgufError, match="a: .*(changed|cannot open)") as caught:
        np.asarray(array)
    assert "\n" not in str(caught.value) and (change == "gone" or type(caught.value) is IntegrityError)


def assert_lazy(monkeypatch, folder, *call, **options):
    """A merge that reads late writes the bytes of one that reads at once."""
    api.merge(*call, folder / "late.gguf", **options)
    monkeypatch.setattr(lazy_array, "AT_ONCE", 1 << 40)
    api.merge(*call, folder / "at-once.gguf", **options)
    assert (folder / "late.gguf").read_bytes() == (folder / "at-once.gguf").read_bytes()


@pytest.mark.parametrize("name", tiny.KINDS)
def test_every_kind_of_adapter(tmp_path, lazy, monkeypatch, name):
    base, folder = tiny.base_of_kind(tmp_path, name)
    assert_lazy(monkeypatch, tmp_path, base, folder)


@pytest.mark.parametrize("name", REFERENCES[::5])
def test_architectures(tmp_path, lazy, monkeypatch, name):
    base = reference_base(name, tmp_path / "base.gguf")
    assert_lazy(monkeypatch, tmp_path, base, REFERENCE / name / "adapter", base_config=REFERENCE / name)


def held(value) -> int:
    """The bytes of arrays in an update."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(map(held, value))
    return sum(map(held, vars(value).values())) if isinstance(value, Update) or hasattr(value, "rank") else 0


@pytest.mark.parametrize(
    "name", ["dora", "oft", "boft", "vera", "adalora", "experts-0.19.1", "whole", "new-tokens-whole", "rslora-patterns"]
)
def test_nothing_is_held_of_what_stays_in_the_file(lazy, name):
    assert sum(map(held, read_adapter(FIXTURES / "kinds" / name).updates)) == 0


def test_nan_is_refused_before_the_first_byte(tmp_path, lazy):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_K")
    raw = bytearray(adapter.read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    adapter.write_bytes(raw)
    with pytest.raises(NumericError, match=r"lora_b\[\d+, \d+\] is nan"):
        api.merge(base, adapter, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_what_overflows_on_its_way_is_refused(tmp_path, lazy):
    source = FIXTURES / "kinds" / "vera"
    folder = tmp_path / "adapter"
    folder.mkdir()
    from safetensors.numpy import load_file, save_file

    tensors = {
        name: np.full_like(array, 3e38) if "lambda_d" in name or name.endswith("vera_A") else array
        for name, array in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    base = tiny.base_gguf(tmp_path, "llama")
    with (
        np.errstate(over="ignore"),
        pytest.raises(NumericError, match="blk.0.*: NaN, infinity or overflow in the adapter"),
    ):
        api.merge(base, folder, tmp_path / "out.gguf")


WIDE = Shape(4, 2048, 5632, 32, 4, 1000)


def large_adapter(path, shape, rank):
    """Factors of some 250 MB as f32, most of them holes in the file."""
    dims = {f"blk.{i}.{kind}.weight": pair for i in range(shape.n_layer) for kind, pair in shape.linears().items()}
    specs = [
        TensorSpec(f"{name}.lora_{half}", BY_NAME["F16"], (rank, n_in) if half == "a" else (n_out, rank))
        for name, (n_out, n_in) in dims.items()
        for half in "ab"
    ]
    head = [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")]
    with GgufWriter(path, [key_value(*pair, "str") for pair in head], specs) as writer:
        for tensor in writer.tensors.values():
            writer.write(tensor, 0, np.full((2, tensor.n_cols), 0.01, np.float16))
        writer.commit()


def peak(*arguments) -> float:
    """The most memory of a Python in MB; a small process starts it, for a child counts what its parent had."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, sys.executable, *map(str, arguments)]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1]
    )


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_CHILDREN"), reason="nothing tells what was taken")
def test_memory_does_not_grow_with_the_adapter(tmp_path):
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    write_base(base, WIDE, sparse=True)
    found = {}
    for rank in (16, 384):
        large_adapter(tmp_path / f"{rank}.gguf", WIDE, rank)
        command = ("merge", base, tmp_path / f"{rank}.gguf", "-o", out, "-t", 1, "--force", "-q", "--memory", "30M")
        found[rank] = peak("-m", "lora_gguf", *command)
    interpreter = peak("-c", "import numba, numpy")
    assert (tmp_path / "384.gguf").stat().st_size > 100e6
    assert found[384] - interpreter < 130 and found[384] < 1.4 * found[16]
