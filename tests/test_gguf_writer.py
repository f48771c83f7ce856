from __future__ import annotations

import struct

import numpy as np
import pytest

from lora_gguf.errors import UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, TensorSpec, key_value, raw_key_values
from lora_gguf.quants.ggml import BY_NAME
from tests.common import gemma3_path, pack_gguf, pack_kv, pack_string, smollm2_path, text_kv, u32_kv


def copy_of(source, target):
    with (
        GgufReader(source) as reader,
        GgufWriter(target, raw_key_values(reader), reader.tensors.values(), alignment=reader.alignment) as writer,
    ):
        for name, info in reader.tensors.items():
            writer.copy(writer.tensors[name], reader, info)
        writer.commit()


@pytest.mark.parametrize("path", [smollm2_path, gemma3_path])
def test_a_real_file_comes_out_byte_for_byte(path, tmp_path):
    copy_of(path(), tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == path().read_bytes()


ODD_VALUES = [
    text_kv("general.architecture", "llama"),
    pack_kv("a.nan", 12, struct.pack("<Q", 0x7FF8DEADBEEF0001)),
    pack_kv("b.bool2", 7, b"\x02"),
    pack_kv("c.text", 8, pack_string(b"\xff\xfe not utf-8")),
    pack_kv("d.empty", 9, struct.pack("<IQ", 8, 0)),
    pack_kv("e.strings", 9, struct.pack("<IQ", 8, 2) + pack_string("x") + pack_string("")),
    pack_kv(b"f.\xff", 0, b"\x07"),
    *(
        pack_kv(f"g.{i}", i, bytes(range(1, 1 + n)))
        for i, n in ((0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (10, 8), (11, 8))
    ),
]


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_metadata_is_kept_byte_for_byte(tmp_path, alignment, version):
    key_values = [*ODD_VALUES, u32_kv("general.alignment", alignment)]
    tensors = [("t", "F32", (2, 3), bytes(24)), ("u", "Q8_0", (1, 32), bytes(range(34))), ("v", "F16", (), b"\0\0")]
    (tmp_path / "a.gguf").write_bytes(pack_gguf(key_values, tensors, version=version, alignment=alignment))
    copy_of(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == pack_gguf(key_values, tensors, alignment=alignment)


def test_key_value_equals_struct():
    assert key_value("k", 7, "u32") == u32_kv("k", 7)
    assert key_value("k", "é", "str") == text_kv("k", "é")
    assert key_value("k", [1, 2], "u32") == pack_kv("k", 9, struct.pack("<IQII", 4, 2, 1, 2))
    assert key_value("k", ["a"], "str") == pack_kv("k", 9, struct.pack("<IQ", 8, 1) + pack_string("a"))


def test_rows_land_in_their_place_in_any_order(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    spec = [TensorSpec("a", BY_NAME["F32"], (3, 4)), TensorSpec("b", BY_NAME["F32"], (4,))]
    with GgufWriter(tmp_path / "a.gguf", [text_kv("general.architecture", "x")], spec) as writer:
        writer.write(writer.tensors["b"], 0, rows[0])
        for i in (2, 0, 1):
            writer.write(writer.tensors["a"], i * 16, rows[i])
        writer.commit()
    with GgufReader(tmp_path / "a.gguf") as reader:
        assert (reader.read(reader.tensors["a"]).view(np.float32) == rows).all()
        assert (reader.read(reader.tensors["b"]).view(np.float32) == rows[:1]).all()


def test_two_tensors_of_one_name(tmp_path):
    with pytest.raises(UsageError):
        GgufWriter(tmp_path / "a.gguf", [], [TensorSpec("a", BY_NAME["F32"], (1,))] * 2)
