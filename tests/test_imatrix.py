"""Importance matrices in both formats, against libgguf's reader; damaged ones give one line."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from libgguf import load_imatrix

from lora_gguf.errors import FileError, LoraGgufError, MalformedError, MismatchError, NumericError
from lora_gguf.files.gguf_reader import TensorInfo
from lora_gguf.files.imatrix import read_imatrix
from lora_gguf.quants.ggml import BY_NAME
from tests.common import pack_gguf, pack_kv, pack_string, text_kv, u32_kv

RNG = np.random.default_rng(0)
DOWN, EXPERTS, HEAD = "blk.0.ffn_down.weight", "blk.1.ffn_up_exps.weight", "output.weight"
SUMS = {DOWN: RNG.uniform(0, 9, (1, 96)), EXPERTS: RNG.uniform(0, 9, (4, 64)), HEAD: np.zeros((1, 32))}
SUMS = {name: values.astype(np.float32) for name, values in SUMS.items()}
COUNTS = {DOWN: np.array([[7]]), EXPERTS: np.array([[3], [0], [5], [1]]), HEAD: np.array([[2]])}


def gguf(sums=SUMS, counts=COUNTS, general_type="imatrix") -> bytes:
    tensors = []
    for name, values in sums.items():
        tensors.append((f"{name}.in_sum2", "F32", values.shape, values.tobytes()))
        if name in counts:
            tensors.append((f"{name}.counts", "F32", counts[name].shape, counts[name].astype(np.float32).tobytes()))
    datasets = pack_kv("imatrix.datasets", 9, struct.pack("<IQ", 8, 1) + pack_string("wiki.txt"))
    return pack_gguf([text_kv("general.type", general_type), datasets, u32_kv("imatrix.chunk_count", 12)], tensors)


def legacy(n_calls=5, tail=True, n_entries=None, n_values=None) -> bytes:
    raw = struct.pack("<i", len(SUMS) if n_entries is None else n_entries)
    for name, values in SUMS.items():
        raw += (
            struct.pack("<i", len(name))
            + name.encode()
            + struct.pack("<ii", n_calls, n_values or values.size)
            + values.tobytes()
        )
    return raw + (struct.pack("<ii", 12, 8) + b"wiki.txt" if tail else b"")


def written(folder, raw: bytes):
    path = folder / "some.imatrix"
    path.write_bytes(raw)
    return path


def tensor(name, shape) -> TensorInfo:
    return TensorInfo(name, BY_NAME["F16"], shape, 0)


@pytest.mark.parametrize(
    "raw", [gguf(), legacy(), legacy(0), legacy(1, tail=False)], ids=["gguf", "legacy", "no calls", "no tail"]
)
def test_the_values_are_libggufs(tmp_path, raw):
    path = written(tmp_path, raw)
    found, expected = read_imatrix(path), load_imatrix(path)
    assert list(found.importance) == list(expected)
    for name, values in found.importance.items():
        assert values.dtype == np.float32 and (values.ravel() == expected[name].ravel()).all()


def test_means_and_what_no_input_reached(tmp_path):
    found = read_imatrix(written(tmp_path, gguf()))
    assert np.allclose(found.importance[DOWN], SUMS[DOWN] / 7, rtol=1e-6)
    experts = found.of(tensor(EXPERTS, (4, 128, 64)))
    assert (
        experts.shape == (4, 64)
        and (experts[1] == 1).all()
        and np.allclose(experts[2], SUMS[EXPERTS][2] / 5, rtol=1e-6)
    )
    assert (found.importance[HEAD] == 0).all()
    assert found.datasets == ("wiki.txt",) and found.n_chunks == 12


def test_the_legacy_format_says_no_shape(tmp_path):
    found = read_imatrix(written(tmp_path, legacy()))
    assert found.of(tensor(EXPERTS, (4, 128, 64))).shape == (4, 64)
    assert (found.of(tensor(EXPERTS, (4, 128, 64))).ravel() == (SUMS[EXPERTS] / np.float32(5)).ravel()).all()
    assert found.datasets == ("wiki.txt",) and found.n_chunks == 12


@pytest.mark.parametrize("raw", [gguf(), legacy()], ids=["gguf", "legacy"])
def test_another_models_matrix_is_refused(tmp_path, raw):
    found = read_imatrix(written(tmp_path, raw))
    assert found.of(tensor("blk.9.ffn_down.weight", (64, 96))) is None
    assert found.of(tensor(DOWN, (64, 96))).shape == (1, 96)
    for name, shape in ((DOWN, (64, 97)), (DOWN, (2, 64, 96)), (EXPERTS, (3, 128, 64)), (EXPERTS, (128, 64))):
        with pytest.raises(MismatchError, match=f"some.imatrix: {name}: expected .* found .*another model"):
            found.of(tensor(name, shape))


def with_counts(**counts):
    return gguf(counts=COUNTS | {DOWN: counts["down"]})


@pytest.mark.parametrize(
    ("raw", "error", "says"),
    [
        (gguf(general_type="model"), MalformedError, "general.type: expected imatrix, found model"),
        (gguf({}), MalformedError, "found no entry"),
        (gguf(counts={}), MalformedError, "ffn_down.weight.counts: expected F32 values, found nothing"),
        (with_counts(down=np.ones((2, 1))), MalformedError, r"counts: expected \(1, 1\), found \(2, 1\)"),
        (with_counts(down=np.ones((1, 2))), MalformedError, r"counts: expected \(1, 1\), found \(1, 2\)"),
        (with_counts(down=np.array([[-1]])), NumericError, "counts: expected importances of zero or more"),
        (gguf({DOWN: np.full((1, 96), np.nan, np.float32)}), NumericError, f"{DOWN}: expected importances"),
        (gguf({DOWN: np.full((1, 96), -1, np.float32)}), NumericError, f"{DOWN}: expected importances"),
        (gguf()[:-40], MalformedError, "truncated"),
        (b"", MalformedError, "number of entries: expected 4 bytes, 0 are left"),
        (b"just some text, and more of it", MalformedError, "not an importance matrix"),
        (legacy(n_entries=0), MalformedError, "number of entries: expected at least 1, found 0"),
        (legacy(n_entries=-3), MalformedError, "number of entries"),
        (legacy(n_entries=2**31 - 1), MalformedError, "not an importance matrix"),
        (legacy(n_values=2**31 - 1), MalformedError, "expected 8589934588 bytes"),
        (legacy(n_values=-1), MalformedError, "number of values: expected at least 1"),
        (legacy()[:300], MalformedError, "are left"),
        (legacy()[:6], MalformedError, "length of name of entry 0"),
        (
            legacy().replace(struct.pack("<ii", 5, 96), struct.pack("<iiI", 5, 96, 0x7FC00000)),
            NumericError,
            "expected importances",
        ),
    ],
)
def test_damaged_files(tmp_path, raw, error, says):
    with pytest.raises(error, match=says) as caught:
        read_imatrix(written(tmp_path, raw))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("some.imatrix: ")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileError, match="cannot open: No such file"):
        read_imatrix(tmp_path / "none.dat")


def test_no_byte_of_damage_does_more_than_an_error_line(tmp_path):
    rng, path = np.random.default_rng(1), tmp_path / "some.imatrix"
    tracemalloc.start()
    for whole in (gguf(), legacy()):
        for _ in range(400):
            raw = bytearray(whole)
            for at in rng.integers(0, min(len(raw), 400), 3):
                raw[at] = rng.integers(256)
            path.write_bytes(raw)
            try:
                assert all(np.isfinite(values).all() for values in read_imatrix(path).importance.values())
            except LoraGgufError as error:
                assert "\n" not in str(error)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
