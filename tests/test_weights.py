from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lora_gguf.errors import FileError, IntegrityError, LoraGgufError, MalformedError, UnsupportedError
from lora_gguf.files.input_file import InputFile
from lora_gguf.files.tensor_file import bf16_to_f32, f8_e4m3_to_f32, f8_e5m2_to_f32
from lora_gguf.files.weights import MAX_HEADER, read_header, read_weights
from tests.checks import check_safetensors_mutants
from tests.common import FIXTURES


def tensor(dtype="F32", shape=(2,), start=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def pack(header, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def library_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


T = json.dumps(tensor()).encode()
# what the library accepts and we read
ACCEPTED = {
    "plain": pack({"t": tensor()}),
    "no tensors": pack({}, b""),
    "metadata": pack({"__metadata__": {"format": "pt"}, "t": tensor()}),
    "null metadata": pack(b'{"__metadata__": null, "t": ' + T + b"}"),
    "padded header": pack(b'{"t": ' + T + b"}     "),
    "unaligned header": pack(b'{"t": ' + T + b"} "),
    "scalar": pack({"t": tensor(shape=(), end=4)}, b"\0" * 4),
    "no elements": pack({"t": tensor(shape=(0, 3), end=0)}, b""),
    "empty beside another at one offset": pack(
        {"a": tensor(shape=(0,), end=0), "b": tensor(), "c": tensor(shape=(0,), start=8)}
    ),
    "tensors not in the order of their data": pack({"a": tensor(shape=(1,), start=4), "b": tensor(shape=(1,), end=4)}),
    "NaN data": pack({"t": tensor()}, b"\xff" * 8),
    "escaped name": pack(b'{"\\u0074\\u00e4": ' + T + b"}"),
    "a name that is a path": pack({"../../etc/passwd": tensor()}),
    "unknown fields": pack({"t": {**tensor(), "more": 1}}),
    "2000 tensors": pack({f"t{i}": tensor(start=8 * i, end=8 * i + 8) for i in range(2000)}, b"\0" * 16000),
}
# what the library refuses, and so do we
REFUSED = {
    "empty file": b"",
    "seven bytes": b"\x08\0\0\0\0\0\0",
    "header of 0": pack(b"", b""),
    "header of 1": pack(b"{", b""),
    "header beyond the file": pack({"t": tensor()}, length=4000),
    "header of 2^63": pack({"t": tensor()}, length=1 << 63),
    "header of 2^64-1": pack({"t": tensor()}, length=(1 << 64) - 1),
    "header of 101 MB": pack({"t": tensor()}, length=101_000_000),
    "not JSON": pack(b"hello, I am no JSON"),
    "array": pack(b"[1, 2, 3]"),
    "byte order mark": pack(b'\xef\xbb\xbf{"t": ' + T + b"}"),
    "UTF-16": pack(('{"t": ' + T.decode() + "}").encode("utf-16-le")),
    "invalid UTF-8": pack(b'{"\xff": ' + T + b"}"),
    "lone surrogate": pack(b'{"\\ud800": ' + T + b"}"),
    "lone surrogate in metadata": pack(b'{"__metadata__": {"a": "\\ud800"}, "t": ' + T + b"}"),
    "control character": pack(b'{"\x01": ' + T + b"}"),
    "trailing comma": pack(b'{"t": ' + T + b",}"),
    "text after the JSON": pack(b'{"t": ' + T + b"} x"),
    "NaN": pack(b'{"t": ' + T + b', "__metadata__": NaN}'),
    "nested 100,000 deep": pack(b'{"t": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "objects 100,000 deep": pack(b'{"t":' * 100_000 + b"1" + b"}" * 100_000),
    "metadata of numbers": pack({"__metadata__": {"a": 1}, "t": tensor()}),
    "metadata a list": pack({"__metadata__": [], "t": tensor()}),
    "tensor a number": pack({"t": 1}),
    "tensor without shape": pack({"t": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "tensor without offsets": pack({"t": {"dtype": "F32", "shape": [2]}}),
    "one offset": pack({"t": {**tensor(), "data_offsets": [8]}}),
    "three offsets": pack({"t": {**tensor(), "data_offsets": [0, 8, 8]}}),
    "unknown type": pack({"t": tensor("F33")}),
    "type a number": pack({"t": tensor(5)}),
    "float shape": pack({"t": tensor(shape=(2.0,))}),
    "negative shape": pack({"t": tensor(shape=(-2,))}),
    "negative shapes": pack({"t": tensor(shape=(-2, -1))}),
    "boolean shape": pack({"t": tensor(shape=(True, 2))}),
    "text shape": pack({"t": {**tensor(), "shape": "2"}}),
    "shape 2^64": pack({"t": tensor(shape=(1 << 64,))}),
    "shape whose product wraps to 4": pack(
        {"t": tensor("U8", shape=(4194305, 4194305, 211106198978564), end=4)}, b"\0" * 4
    ),
    "shape of 5000 digits": pack(b'{"t": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
    "shape larger than the data": pack({"t": tensor(shape=(3,))}),
    "shape smaller than the data": pack({"t": tensor(shape=(1,))}),
    "end before start": pack({"t": tensor(start=8, end=0)}),
    "negative offset": pack({"t": tensor(start=-8, end=0)}),
    "offset 2^64": pack({"t": tensor(start=1 << 64, end=(1 << 64) + 8)}),
    "offset beyond the file": pack({"t": tensor(start=0, end=1 << 40, shape=(1 << 38,))}),
    "overlap": pack({"a": tensor(), "b": tensor(start=4, end=12)}, b"\0" * 12),
    "the same data twice": pack({"a": tensor(), "b": tensor()}),
    "hole": pack({"a": tensor(), "b": tensor(start=12, end=20)}, b"\0" * 20),
    "hole at the start": pack({"a": tensor(start=4, end=12)}, b"\0" * 12),
    "bytes after the data": pack({"t": tensor()}, b"\0" * 9),
    "truncated": pack({"t": tensor()}, b"\0" * 7),
    "no data": pack({"t": tensor()}, b""),
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "HTML": b"<!DOCTYPE html><html></html>",
    "GGUF": b"GGUF" + b"\0" * 40,
    "zip": b"PK\x03\x04" + b"\0" * 40,
}
# what the library accepts, and we do not
STRICTER = {
    "starts with a space": pack(b' {"t": ' + T + b"}"),
    "a name twice": pack(b'{"t": ' + T + b', "t": ' + T + b"}"),
    "empty name": pack({"": tensor()}),
    "escape sequence in a name": pack({"\x1b[2J": tensor()}),
    "newline in a name": pack({"a\nb": tensor()}),
    "bidirectional override in a name": pack({"a\u202eb": tensor()}),
    "name of 10,000 characters": pack({"a" * 10_000: tensor()}),
    "40 dimensions": pack({"t": tensor(shape=(1,) * 39 + (2,))}),
    "no elements, others 2^62": pack({"t": tensor(shape=(0, 1 << 62), end=0)}, b""),
}
UNSUPPORTED = {
    "complex": pack({"t": tensor("C64", shape=(1,))}),
    "F8_E8M0": pack({"t": tensor("F8_E8M0", shape=(8,))}),
    "F4": pack({"t": tensor("F4", shape=(16,))}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_library_accepts_is_read(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(ACCEPTED[name])
    ours, theirs = read_weights(path), safetensors.numpy.load_file(path)
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        assert (
            array.dtype == theirs[key].dtype
            and array.shape == theirs[key].shape
            and array.tobytes() == theirs[key].tobytes()
        )


@pytest.mark.parametrize("name", [*REFUSED, *STRICTER, *UNSUPPORTED])
def test_what_is_malformed_is_refused_in_one_line(tmp_path, name):
    content = {**REFUSED, **STRICTER, **UNSUPPORTED}[name]
    assert library_accepts(content) is (name not in REFUSED)
    path = tmp_path / "bad\x1b[2J.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(UnsupportedError if name in UNSUPPORTED else MalformedError) as caught:
        read_weights(path)
    peak, seconds = tracemalloc.get_traced_memory()[1], time.process_time() - started
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith("bad\\x1b[2J.safetensors: ") and message.isprintable() and len(message) < 500
    assert seconds < 2 and peak < 100e6 and path.read_bytes() == content


def test_a_header_is_refused_by_its_size_before_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{}")
        file.truncate(MAX_HEADER + 1000)
    tracemalloc.start()
    with pytest.raises(MalformedError, match="a header of 100000001 bytes"):
        read_weights(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_types_are_widened_exactly_as_torch_widens_them():
    """fixtures/bin: torch wrote the same values as float8, bfloat16 and as integers of every kind."""
    weights = read_weights(FIXTURES / "bin" / "expected.safetensors")
    with safetensors.safe_open(FIXTURES / "bin" / "expected.safetensors", "np") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    for name, array in weights.items():
        assert (array.dtype == np.float32) is (stored[name] in ("F32", "BF16", "F8_E4M3", "F8_E5M2")), name
    exact = weights["floats/float64"].astype(np.float32)
    for kind, mantissa_bits in (("bfloat16", 8), ("float8_e4m3fn", 4), ("float8_e5m2", 3)):
        assert np.allclose(weights[f"floats/{kind}"], exact, rtol=2.0**-mantissa_bits, atol=2.0**-10)


def test_every_bf16_and_f8_code():
    codes = np.arange(65536, dtype=np.uint16)
    assert (bf16_to_f32(codes).view(np.uint32) == codes.astype(np.uint32) << 16).all()
    codes = np.arange(256, dtype=np.uint8)
    e5m2, e4m3 = f8_e5m2_to_f32(codes), f8_e4m3_to_f32(codes)
    for code in range(256):
        sign, e, m = -1.0 if code & 128 else 1.0, code >> 2 & 31, code & 3
        expected = sign * (m * 2.0**-16 if e == 0 else (4 + m) * 2.0 ** (e - 17))
        assert e5m2[code] == expected or (e == 31 and (np.isinf(e5m2[code]) if m == 0 else np.isnan(e5m2[code])))
        e, m = code >> 3 & 15, code & 7
        expected = sign * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        assert e4m3[code] == expected or (code & 127 == 127 and np.isnan(e4m3[code]))
        assert np.signbit(e5m2[code]) == np.signbit(e4m3[code]) == (code > 127)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (7, 5, 3)])
def test_every_type_of_numpy_round_trips(tmp_path, shape):
    kinds = (
        np.float64,
        np.float32,
        np.float16,
        np.int64,
        np.int32,
        np.int16,
        np.int8,
        np.uint64,
        np.uint32,
        np.uint16,
        np.uint8,
        bool,
    )
    rng = np.random.default_rng(0)
    arrays = {np.dtype(kind).name: np.asarray(rng.integers(0, 2, shape)).astype(kind) for kind in kinds}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    for name, array in read_weights(tmp_path / "a.safetensors").items():
        assert (
            array.dtype == arrays[name].dtype
            and array.shape == shape
            and (array == arrays[name]).all()
            and array.flags.writeable
        )


def shards(tmp_path, index, **files) -> os.PathLike:
    for name, arrays in files.items():
        safetensors.numpy.save_file(arrays, tmp_path / f"{name}.safetensors")
    path = tmp_path / "adapter_model.safetensors.index.json"
    path.write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return path


def test_shards_are_joined(tmp_path):
    x, y = np.ones(2, np.float32), np.zeros(3, np.float16)
    path = shards(
        tmp_path, {"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}, one={"x": x}, two={"y": y}
    )
    assert {name: array.dtype for name, array in read_weights(path).items()} == {"x": np.float32, "y": np.float16}


@pytest.mark.parametrize(
    "index",
    [
        b"", b"[]", b"{", b"{}", b'{"weight_map": []}', b'{"weight_map": {"x": 1}}', b'{"weight_map": {"x": "../one.safetensors"}}',
        b'{"weight_map": {"x": "/one.safetensors"}}', b'{"weight_map": {"x": "one.index.json"}}', b"\xff{}",
        b'{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}', b'{"weight_map": {"x": ".safetensors"}}',
        b'{"weight_map": {"x": "a\\u0000.bin"}}', b'{"weight_map": {"x": "a\\\\b.bin"}}', b'{"weight_map": ' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_bad_index_is_refused(tmp_path, index):
    path = shards(tmp_path, index, one={"x": np.ones(2)}, two={"x": np.ones(2)})
    with pytest.raises(MalformedError) as caught:
        read_weights(path)
    assert str(caught.value).isprintable()


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    for name in (
        "fifo.safetensors",
        "folder.safetensors",
        "none.safetensors",
        "secret.safetensors/x.bin",
        "a\0.safetensors",
        "a" * 300,
    ):
        with pytest.raises(FileError) as caught:
            read_weights(tmp_path / name)
        assert str(caught.value).isprintable()


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"t": tensor(shape=(100_000,), end=400_000)}, b"\0" * 400_000))
    with InputFile(path) as file:
        entries, position = read_header(file)
        os.truncate(path, 1000)
        with pytest.raises(IntegrityError, match="became shorter"):
            file.read_array(position, np.dtype("<f4"), entries[0].shape)


def test_a_tensor_that_no_memory_could_hold_is_refused_by_the_size_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"t": tensor(shape=(1 << 50,), end=1 << 52)}, b""))
    with pytest.raises(LoraGgufError, match="expected 4503599627370496 bytes of data, found 0"):
        read_weights(path)


def test_no_mutant_is_accepted_that_the_library_refuses(tmp_path):
    assert 50 < check_safetensors_mutants(tmp_path / "a.safetensors", 500, seed=1) < 450
