"""``npz_reader``: what numpy saved is read as numpy reads it; what is no array of numbers is refused."""

from __future__ import annotations

import contextlib
import io
import zipfile

import numpy as np
import pytest

from lora_gguf.errors import LoraGgufError, MalformedError, UnsupportedError
from lora_gguf.files.lazy_array import LazyArray
from lora_gguf.files.npz_reader import find_npz


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_what_numpy_saved(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"{kind}.x": rng.standard_normal((3, 5)).astype(kind) for kind in ("f2", "f4", "f8")}
    arrays |= {"t": np.asfortranarray(rng.standard_normal((4, 2))), "i": np.arange(5), "empty": np.zeros((0, 4))}
    found = find_npz(saved(tmp_path / "a.npz", **arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_large_file_is_read_when_it_is_asked_for(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {"a": rng.standard_normal((300, 1000)).astype(np.float32), "t": np.asfortranarray(rng.random((500, 300)))}
    for name, found in find_npz(saved(tmp_path / "a.npz", **arrays)).items():
        assert isinstance(found, LazyArray) and found.shape == arrays[name].shape
        np.testing.assert_array_equal(found, arrays[name])
        np.testing.assert_array_equal(np.asarray(found[7:9]), arrays[name][7:9])
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[900_000] ^= 1
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(MalformedError):
        find_npz(tmp_path / "a.npz")


def test_bf16_is_stored_as_void(tmp_path):
    values = np.array([1.5, -2.0, 3.25], np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).view("V2")
    np.testing.assert_array_equal(find_npz(saved(tmp_path / "a.npz", x=raw))["x"], values)


@pytest.mark.campaign("malformed adapters")
@pytest.mark.parametrize("n", range(0, 400, 7))
def test_a_file_cut_short_or_with_a_byte_changed(tmp_path, n):
    whole = saved(tmp_path / "a.npz", x=np.ones((3, 4), np.float32)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: n % len(whole)])
    with pytest.raises(LoraGgufError):
        find_npz(tmp_path / "cut.npz")
    changed = bytearray(whole)
    changed[n % len(whole)] ^= 0x41
    (tmp_path / "changed.npz").write_bytes(changed)
    with contextlib.suppress(LoraGgufError):
        find_npz(tmp_path / "changed.npz")


@pytest.mark.campaign("malformed adapters")
def test_compressed_and_object_arrays_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.ones(1000))
    with pytest.raises(UnsupportedError, match="compressed"):
        find_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.array([{}], dtype=object))
    with pytest.raises(LoraGgufError):
        find_npz(tmp_path / "b.npz")


@pytest.mark.campaign("malformed adapters")
@pytest.mark.parametrize("shape", ["(1000000000, 1000000000)", "(-1, 4)", "('a',)", "(2**80,)"])
def test_shapes_that_do_not_fit(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    entry = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", entry)
    (tmp_path / "a.npz").write_bytes(stream.getvalue())
    with pytest.raises(MalformedError):
        find_npz(tmp_path / "a.npz")
