from __future__ import annotations

import os
import struct
import time
import tracemalloc

import numpy as np
import pytest

from lora_gguf.errors import FileError, IntegrityError, LoraGgufError, MalformedError, UnsupportedError
from lora_gguf.files.gguf_reader import GgufReader
from tests.checks import agreed, check_gguf_mutants, read_gguf
from tests.common import gemma3_path, pack_kv, pack_string, pack_tensor_info, smollm2_path
from tests.ggml_judge import Judge
from tests.gguf_corpus import ACCEPTED, ARRAY, BASE_KVS, REFUSED, STRICTER, STRING, VALID, array, build, kv, vector


@pytest.fixture(scope="module")
def judge():
    with Judge() as judge:
        yield judge


@pytest.mark.campaign("GGUF cases")
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_libggml_accepts_is_read_the_same(tmp_path, judge, name):
    theirs = judge.describe(ACCEPTED[name])
    assert theirs is not None and agreed(read_gguf(tmp_path / "a.gguf", ACCEPTED[name]), theirs)


@pytest.mark.campaign("GGUF cases")
@pytest.mark.parametrize("name", [*REFUSED, *STRICTER])
def test_what_is_malformed_is_refused_in_one_line(tmp_path, judge, name):
    content = {**REFUSED, **STRICTER}[name]
    assert (judge.describe(content) is not None) is (name in STRICTER)
    path = tmp_path / "bad\x1b[2J.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises((MalformedError, UnsupportedError)) as caught:
        GgufReader(path)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith("bad\\x1b[2J.gguf: ") and message.isprintable() and len(message) < 500
    assert seconds < 2 and peak < 20e6 and path.read_bytes() == content


def test_the_corpus_is_large_enough():
    cases = [*ACCEPTED.values(), *STRICTER.values(), *REFUSED.values()]
    assert len(cases) >= 110 and len(set(cases)) == len(cases)


def test_every_truncation_is_refused(tmp_path):
    content = build((*BASE_KVS, pack_kv("a", ARRAY, array(STRING, 2, pack_string("one") + pack_string("two")))))
    for length in range(len(content)):
        with pytest.raises(LoraGgufError):
            read_gguf(tmp_path / "a.gguf", content[:length])


def test_no_mutant_is_accepted_that_libggml_refuses(tmp_path, judge):
    assert 50 < check_gguf_mutants(tmp_path / "a.gguf", judge, 500, seed=1) < 450


@pytest.mark.parametrize("path", [smollm2_path, gemma3_path])
def test_a_real_model_is_read_as_libggml_reads_it(judge, path):
    assert read_gguf(path()) == judge.describe(path().read_bytes())


def test_a_real_model_is_read_as_the_gguf_package_reads_it():
    from gguf import GGUFReader

    theirs = GGUFReader(smollm2_path())
    with GgufReader(smollm2_path()) as reader:
        assert list(reader.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info = reader.tensors[tensor.name]
            assert (info.type.id, list(reversed(info.shape))) == (tensor.tensor_type, tensor.shape.tolist())
            assert reader.data_position + info.offset == tensor.data_offset and info.n_bytes == tensor.n_bytes
            assert reader.read(info).tobytes() == tensor.data.tobytes()
        fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert list(reader.kv) == list(fields)
        for key, field in fields.items():
            assert reader.get(key) == field.contents(), key


def test_a_header_of_262k_tokens_is_read_in_a_third_of_a_second():
    best = min(timed(lambda: GgufReader(gemma3_path()).close()) for _ in range(3))
    assert best < 0.3
    with GgufReader(gemma3_path()) as reader:
        assert timed(lambda: reader.get("tokenizer.ggml.tokens")) < 2
        assert len(reader.get("tokenizer.ggml.tokens")) == 262144


def timed(call) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def test_strings_longer_than_the_window_and_across_it(tmp_path):
    strings = ["x" * n for n in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5, 3 << 20, 2)]
    value = array(STRING, len(strings), b"".join(map(pack_string, strings)))
    path = tmp_path / "a.gguf"
    path.write_bytes(
        build((pack_kv("before", STRING, pack_string("y" * 700_000)), pack_kv("s", ARRAY, value), *BASE_KVS))
    )
    with GgufReader(path) as reader:
        assert (
            reader.get("s") == strings
            and reader.get("general.name") == "corpus"
            and len(reader.get("before")) == 700_000
        )


def test_values_of_every_type(tmp_path):
    values = {
        "B": 255,
        "b": -128,
        "H": 65535,
        "h": -2,
        "I": 1 << 31,
        "i": -3,
        "f": 0.5,
        "?": True,
        "Q": 1 << 63,
        "q": -4,
        "d": 1e300,
    }
    ids = dict(zip(values, (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), strict=True))
    pairs = [pack_kv(f"one.{c}", ids[c], struct.pack("<" + c, v)) for c, v in values.items()]
    pairs += [pack_kv(f"many.{c}", ARRAY, array(ids[c], 2, struct.pack("<2" + c, v, v))) for c, v in values.items()]
    path = tmp_path / "a.gguf"
    path.write_bytes(build((*pairs, pack_kv("text", STRING, pack_string(b"\xff\xfe!")))))
    with GgufReader(path) as reader:
        for layout, value in values.items():
            assert reader.get(f"one.{layout}") == value and reader.get(f"many.{layout}") == [value, value]
        assert reader.get("text").encode("utf-8", "surrogateescape") == b"\xff\xfe!"
        assert reader.get("none", 5) == 5 and reader.architecture == "" and reader.hparam("block_count") is None


def test_an_architecture_that_is_no_text(tmp_path):
    (tmp_path / "a.gguf").write_bytes(kv("general.architecture", 4, b"\0" * 4))
    with GgufReader(tmp_path / "a.gguf") as reader:
        assert reader.architecture == ""


def test_rows(tmp_path):
    content = np.arange(8 * 36, dtype=np.uint8).reshape(8, 36)
    path = tmp_path / "a.gguf"
    path.write_bytes(build(infos=(pack_tensor_info("t", (32, 4, 2), 9, 0),), data=content.tobytes()))
    with GgufReader(path) as reader:
        info = reader.tensors["t"]
        assert (info.shape, info.n_rows, info.n_cols, info.row_bytes, info.n_bytes) == ((2, 4, 32), 8, 32, 36, 288)
        assert (reader.read(info) == content).all() and (reader.read(info, 3, 2) == content[3:5]).all()
        buffer = bytearray(10)
        reader.read_into(info, 30, buffer)
        assert bytes(buffer) == content.tobytes()[30:40]


def test_a_file_that_changes_under_the_reader(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build(infos=(pack_tensor_info("t", (4096,), 0, 0),), data=bytes(16384)))
    with GgufReader(path) as reader:
        reader.check_unchanged()
        os.truncate(path, reader.data_position + 100)
        for call in (reader.check_unchanged, lambda: reader.read(reader.tensors["t"])):
            with pytest.raises(IntegrityError):
                call()
        os.truncate(path, 40)
        with pytest.raises(IntegrityError, match="became shorter"):
            reader.get("general.name")


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    os.symlink("nowhere", tmp_path / "dangling.gguf")
    for name in (".", "fifo.gguf", "dangling.gguf", "none.gguf", "a\0.gguf", "\x1b[2J", "x" * 300, "/dev/null"):
        with pytest.raises(FileError) as caught:
            GgufReader(tmp_path / name)
        assert str(caught.value).isprintable()


def test_many_keys_and_many_tensors_stay_fast(tmp_path):
    pairs = [pack_kv(f"k{i}", 0, b"\0") for i in range(20_000)]
    infos = [pack_tensor_info(f"t{i}", (0,), 0, 0) for i in range(15_000)]
    (tmp_path / "a.gguf").write_bytes(build(pairs, infos, b""))
    assert timed(lambda: GgufReader(tmp_path / "a.gguf").close()) < 2


def test_a_failed_open_leaks_no_descriptor(tmp_path):
    (tmp_path / "a.gguf").write_bytes(VALID[:-1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(MalformedError):
            GgufReader(tmp_path / "a.gguf")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_type_that_the_header_promises_but_the_table_lacks_is_named(tmp_path):
    (tmp_path / "a.gguf").write_bytes(vector(type_id=99))
    with pytest.raises(MalformedError, match="t: unknown tensor type 99"):
        GgufReader(tmp_path / "a.gguf")
