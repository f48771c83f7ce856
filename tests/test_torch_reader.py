from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from lora_gguf.errors import LoraGgufError, MalformedError, UnsupportedError
from lora_gguf.files.weights import read_weights
from tests.checks import check_bin_mutants
from tests.common import FIXTURES
from tests.hostile_bin import ZipEntry, name, number, pack_bin, pack_zip, sequence, storage, tensor, text, weights

BIN = FIXTURES / "bin"
DATA = np.arange(6, dtype=np.float32).tobytes()
CANARY = "canary"
TOUCH = f"open('{CANARY}','w')"


@pytest.mark.parametrize("path", sorted(BIN.glob("*.bin")), ids=lambda path: path.stem)
def test_what_torch_saved_is_read_as_torch_reads_it(path):
    if path.stem == "legacy":
        with pytest.raises(UnsupportedError, match="before version 1.6"):
            read_weights(path)
        return
    expected = {
        name.removeprefix(f"{path.stem}/"): array for name, array in read_weights(BIN / "expected.safetensors").items()
    }
    weights = read_weights(path)
    assert weights.keys() == {name for name in expected if "/" not in name}
    for key, array in weights.items():
        assert array.dtype == expected[key].dtype and array.shape == expected[key].shape, key
        assert array.tobytes() == expected[key].tobytes() and array.flags.c_contiguous and array.flags.writeable, key


def test_what_is_built_by_hand_is_read(tmp_path):
    """So that a hostile file of the same making is refused for what is wrong with it."""
    metadata = tensor((2, 2), (3, 1), 1, more=b"}")
    old = name("torch._utils", "_rebuild_tensor") + b"(" + storage() + number(4) + sequence([2]) + sequence([1]) + b"tR"
    path = tmp_path / "a.bin"
    path.write_bytes(pack_bin(weights(x=tensor(), y=metadata, z=old), {"0": DATA}))
    arrays = {key: array.tolist() for key, array in read_weights(path).items()}
    assert arrays == {"x": [[0, 1, 2], [3, 4, 5]], "y": [[1, 2], [4, 5]], "z": [4, 5]}


def call(function: bytes, *arguments: bytes) -> bytes:
    return weights(x=function + b"(" + b"".join(arguments) + b"tR")


# what a pickle may ask Python to call, and its arguments
CALLS = {
    "os.system": ("os", "system", [text(f"touch {CANARY}")]),
    "posix.system": ("posix", "system", [text(f"touch {CANARY}")]),
    "nt.system": ("nt", "system", [text(f"touch {CANARY}")]),
    "sys.setrecursionlimit": ("sys", "setrecursionlimit", [number(5)]),
    "builtins.eval": ("builtins", "eval", [text(TOUCH)]),
    "builtins.exec": ("builtins", "exec", [text(TOUCH)]),
    "builtins.open": ("builtins", "open", [text(CANARY), text("w")]),
    "builtins.getattr": ("builtins", "getattr", [name("collections", "OrderedDict"), text("fromkeys")]),
    "builtins.__import__": ("builtins", "__import__", [text("antigravity")]),
    "__builtin__.eval": ("__builtin__", "eval", [text(TOUCH)]),
    "subprocess.Popen": ("subprocess", "Popen", [text(f"touch {CANARY}")]),
    "pip.main": ("pip", "main", [b"]"]),
    "runpy.run_path": ("runpy", "run_path", [text(CANARY)]),
    "asyncio.run": ("asyncio", "run", [b"N"]),
    "torch.hub.load": ("torch.hub", "load", [text("a/b"), text("c")]),
    "torch.load": ("torch", "load", [text(CANARY)]),
    "torch.jit.load": ("torch.jit", "load", [text(CANARY)]),
    "torch.serialization.load": ("torch.serialization", "load", [text(CANARY)]),
    "numpy.load": ("numpy", "load", [text(CANARY)]),
    "numpy.core.multiarray._reconstruct": ("numpy.core.multiarray", "_reconstruct", [b"N", sequence([0]), b"N"]),
    "functools.partial": ("functools", "partial", [name("os", "system"), text(f"touch {CANARY}")]),
    "operator.attrgetter": ("operator", "attrgetter", [text("system")]),
    "logging.FileHandler": ("logging", "FileHandler", [text(CANARY)]),
    "pickle.loads": ("pickle", "loads", [text("x")]),
    "importlib.import_module": ("importlib", "import_module", [text("this")]),
    "collections.defaultdict": ("collections", "defaultdict", [name("builtins", "eval")]),
    "a dotted attribute": ("collections", "OrderedDict.fromkeys", [b"]"]),
    "a method of a storage": ("torch", "FloatStorage.from_file", [text(CANARY)]),
    "a rebuilder that is not in the list": ("torch._utils", "_rebuild_qtensor", []),
    "a subclass": ("torch._tensor", "_rebuild_from_type_v2", []),
    "a name with an escape sequence": ("os\x1b[2J", "system", []),
    "a name without an end": ("o" * 2000, "system", []),
}
ALLOWED = name("collections", "OrderedDict")
# opcodes of Python's pickles that torch.save never writes, each in a program that would matter
OPCODES = {
    "INST": b"(" + text(f"touch {CANARY}") + b"ios\nsystem\n.",
    "OBJ": b"(" + ALLOWED + b"o.",
    "NEWOBJ": ALLOWED + b")\x81.",
    "NEWOBJ_EX": ALLOWED + b")}\x92.",
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\x00.",
    "EXT4": b"\x84\x01\x00\x00\x00.",
    "PERSID": b"P0\n.",
    "DUP": b")2.",
    "POP": b"N0.",
    "POP_MARK": b"(1.",
    "INT": b"I5\n.",
    "LONG": b"L5L\n.",
    "LONG4": b"\x8b\xff\xff\xff\x7f.",
    "FLOAT": b"F1.0\n.",
    "STRING": b"S'a'\n.",
    "BINSTRING": b"T\xff\xff\xff\x7f.",
    "SHORT_BINSTRING": b"U\x01a.",
    "BINBYTES": b"B\xff\xff\xff\x7f.",
    "SHORT_BINBYTES": b"C\x01a.",
    "BINBYTES8": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "BYTEARRAY8": b"\x96" + b"\xff" * 7 + b"\x7f.",
    "NEXT_BUFFER": b"\x97.",
    "READONLY_BUFFER": b"N\x98.",
    "GET": b"g0\n.",
    "PUT": b"Np5\n.",
    "LIST": b"(l.",
    "DICT": b"(d.",
    "EMPTY_SET": b"\x8f.",
    "ADDITEMS": b"\x8f(N\x90.",
    "FROZENSET": b"(N\x91.",
    "UNICODE": b"Vabc\n.",
    "an opcode that is none": b"\xff.",
    "STACK_GLOBAL of os.system": text("os") + text("system") + b"\x93" + text(f"touch {CANARY}") + b"\x85R.",
    "STACK_GLOBAL of numbers": b"K\x01K\x02\x93.",
}
TOP_HEAVY = b"()q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"t"
# programs that are damaged, or that cost more than they weigh
PROGRAMS = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "protocol 0": b"}.",
    "protocol 1": b"\x80\x01}.",
    "protocol 99": b"\x80\x63}.",
    "stop at once": b"\x80\x02.",
    "nothing to pop": b"\x80\x02\x86.",
    "a mark too few": b"\x80\x02Nt.",
    "two results": b"\x80\x02NN.",
    "marks only": b"\x80\x02" + b"(" * 500_000 + b".",
    "a mark as a value": b"\x80\x02((\x85.",
    "a mark in the memo": b"\x80\x02(q\x00h\x00t.",
    "a memo that is missing": b"\x80\x02h\x05.",
    "memo 2^27-1": b"\x80\x02Nr\xff\xff\xff\x07.",
    "memo 2^32-1": b"\x80\x02Nr\xff\xff\xff\xff.",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "text of 2^63 bytes": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "text that is no UTF-8": b"\x80\x02X\x01\0\0\0\xff.",
    "frame of 2^63 bytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",
    "500,000 dicts": b"\x80\x02" + b"}" * 500_000 + b".",
    "500,000 nested lists": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "100,000 nested tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "2^60 leaves": b"\x80\x02" + TOP_HEAVY + b".",
    "2^60 leaves as a key": b"\x80\x02}" + TOP_HEAVY + b"Ns.",
    "2^60 leaves as an argument": b"\x80\x02" + name("collections", "OrderedDict") + TOP_HEAVY + b"R.",
    "2^60 leaves as a name": b"\x80\x02" + TOP_HEAVY + text("x") + b"\x93.",
    "a dict in itself": b"\x80\x02}q\x00" + text("x") + b"h\x00s.",
    "a dict as a key": b"\x80\x02}}Ns.",
    "a key without a value": b"\x80\x02}(" + text("x") + b"u.",
    "a key twice": b"\x80\x02}(" + (text("x") + tensor()) * 2 + b"u.",
    "an item of no dict": b"\x80\x02]" + text("x") + b"Ns.",
    "an append to no list": b"\x80\x02}Na.",
    "a call of a string": b"\x80\x02" + text("os") + b")R.",
    "a call of a dtype": b"\x80\x02" + name("torch", "float32") + b")R.",
    "a call of a storage": b"\x80\x02" + storage() + b")R.",
    "a call without a tuple": b"\x80\x02" + name("collections", "OrderedDict") + b"]R.",
    "an OrderedDict of numbers": call(name("collections", "OrderedDict"), b"](K\x01K\x02e"),
    "an OrderedDict of a dict": call(name("collections", "OrderedDict"), b"}"),
    "attributes of a tensor": weights(x=tensor() + b"}b"),
    "attributes of a number": b"\x80\x02K\x01}b.",
    "a persistent id of text": b"\x80\x02" + text("x") + b"Q.",
    "a persistent id of another kind": b"\x80\x02(" + text("module") + b"NNNNtQ.",
    "a list": b"\x80\x02].",
    "a tensor alone": b"\x80\x02" + tensor() + b".",
    "a name alone": b"\x80\x02" + name("collections", "OrderedDict") + b".",
    "a number as a tensor": weights(x=number(5)),
    "a dict as a tensor": weights(x=b"}"),
    "a storage as a tensor": weights(x=storage()),
    "a number as a name": b"\x80\x02}K\x05" + tensor() + b"s.",
    "an empty name": weights(**{"": tensor()}),
    "an escape sequence as a name": weights(**{"\x1b[2J": tensor()}),
    "a surrogate as a name": weights(**{"\ud800": tensor()}),
    "a name of 100,000 characters": weights(**{"x" * 100_000: tensor()}),
}
BYTES = name("torch.storage", "UntypedStorage")
V3 = {"function": "_rebuild_tensor_v3"}
TENSORS = {
    "offset beyond the storage": tensor(offset=1),
    "offset negative": tensor(offset=-1),
    "offset 2^70": tensor(offset=1 << 70),
    "offset a float": tensor(offset=0.0),
    "offset true": tensor(offset=True),
    "stride beyond the storage": tensor(stride=(4, 1)),
    "stride negative": tensor(stride=(-3, 1), offset=3),
    "stride 2^61": tensor(stride=(1 << 61, 1)),
    "size negative": tensor((-2, -3)),
    "size beyond the storage": tensor((3, 3)),
    "size that overflows": tensor((1 << 31, 1 << 31, 4), (0, 0, 0)),
    "size of no elements that overflows": tensor((0, 1 << 61), (1, 1)),
    "size a float": tensor((2.0, 3)),
    "size a number": name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage() + number(0) * 3 + b"\x89NtR",
    "fewer strides than sizes": tensor((2, 3), (3,)),
    "40 dimensions": tensor((1,) * 40, (1,) * 40),
    "a terabyte by stride 0": tensor((1 << 38,), (0,)),
    "three arguments": name("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + storage()
    + number(0)
    + sequence([2])
    + b"tR",
    "no arguments": name("torch._utils", "_rebuild_tensor_v2") + b")R",
    "no storage": tensor(where=b"N"),
    "conjugated": tensor(more=b"}" + text("neg") + b"\x88s"),
    "a storage that is missing": tensor(where=storage("1")),
    "a storage by a path": tensor(where=storage("../data.pkl")),
    "a storage by a number": tensor(
        where=b"(" + text("storage") + name("torch", "FloatStorage") + number(0) + text("cpu") + number(6) + b"tQ"
    ),
    "a storage larger than its entry": tensor(where=storage(numel=7)),
    "a storage smaller than its entry": tensor((5,), (1,), where=storage(numel=5)),
    "a storage of another type than its entry": tensor(where=storage(kind=name("torch", "DoubleStorage"))),
    "a storage of -1 items": tensor(where=storage(numel=-1)),
    "a storage of 2^70 items": tensor(where=storage(numel=1 << 70)),
    "a storage of half an item": tensor(where=storage(numel=0.5)),
    "a storage of no type": tensor(where=storage(kind=b"N")),
    "a storage of bytes without a type": tensor(where=storage(kind=BYTES, numel=24)),
    "a type that is no type": tensor(where=storage(kind=BYTES, numel=24), more=text("float32"), **V3),
    "a type for a storage with a type": tensor(more=name("torch", "float32"), **V3),
    "a typed view beyond its bytes": tensor(
        (2, 4), (4, 1), where=storage(kind=BYTES, numel=24), more=name("torch", "float32"), **V3
    ),
    "a parameter of nothing": name("torch._utils", "_rebuild_parameter") + b")R",
    "a parameter of a storage": name("torch._utils", "_rebuild_parameter") + b"(" + storage() + b"\x88NtR",
}
GOOD = weights(x=tensor())
STORED = {"0": DATA}
DEFLATED = zlib.compress(b"\0" * 50_000_000, 9)[2:-4]
ENTRY = ZipEntry("a/data/0", DATA)
PICKLE = ZipEntry("a/data.pkl", GOOD)
ARCHIVES = {
    "empty file": b"",
    "half": pack_bin(GOOD, STORED)[:200],
    "no directory": pack_bin(GOOD, STORED)[:-22],
    "not a zip": b"hello" * 100,
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "HTML": b"<!DOCTYPE html><html></html>",
    "garbage before": pack_bin(GOOD, STORED, prefix=b"garbage"),
    "another zip before": pack_bin(GOOD, STORED, prefix=pack_bin(GOOD, STORED)),
    "no pickle": pack_zip([ENTRY]),
    "two pickles": pack_zip([PICKLE, ZipEntry("b/data.pkl", GOOD), ENTRY]),
    "one name twice": pack_zip([PICKLE, PICKLE, ENTRY]),
    "a pickle in the root": pack_zip([ZipEntry("data.pkl", GOOD), ZipEntry("data/0", DATA)]),
    "an entry outside the folder": pack_bin(GOOD, STORED, (ZipEntry("b/x", b""),)),
    "an entry with ..": pack_bin(GOOD, STORED, (ZipEntry("a/../../x", b""),)),
    "an absolute entry": pack_bin(GOOD, STORED, (ZipEntry("/etc/x", b""),)),
    "an entry with a backslash": pack_bin(GOOD, STORED, (ZipEntry("a/..\\x", b""),)),
    "an entry with an escape sequence": pack_bin(GOOD, STORED, (ZipEntry("a/\x1b[2J", b""),)),
    "a link": pack_bin(GOOD, STORED, (ZipEntry("a/x", b"/etc/passwd", attributes=0xA1FF << 16),)),
    "a device": pack_bin(GOOD, STORED, (ZipEntry("a/x", b"", attributes=0x2000 << 16),)),
    "a deflated pickle": pack_zip(
        [ZipEntry("a/data.pkl", zlib.compress(GOOD)[2:-4], method=8, size=len(GOOD), crc=zlib.crc32(GOOD)), ENTRY]
    ),
    "a deflated bomb": pack_bin(GOOD, {}, (ZipEntry("a/data/0", DEFLATED, method=8, size=50_000_000),)),
    "an unknown method": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, method=99)]),
    "encrypted": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, flags=1)]),
    "patched": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, flags=0x20)]),
    "wrong CRC of the pickle": pack_zip([ZipEntry("a/data.pkl", GOOD, crc=5), ENTRY]),
    "wrong CRC of a storage": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, crc=5)]),
    "sizes of 2^60": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, raw_size=1 << 60)]),
    "a size beyond the file": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, raw_size=100_000)]),
    "stored, with two sizes": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, size=48)]),
    "two entries of the same bytes": pack_zip(
        [PICKLE, ENTRY, ZipEntry("a/data/1", b"", raw_size=24, header_offset=len(GOOD) + 40)]
    ),
    "an entry within the pickle": pack_zip([PICKLE, ENTRY, ZipEntry("a/data/1", DATA, header_offset=20)]),
    "a header beyond the file": pack_zip([PICKLE, ENTRY, ZipEntry("a/data/1", DATA, header_offset=1 << 20)]),
    "another name in its own header": pack_zip([PICKLE, ZipEntry("a/data/0", DATA, local_name=b"a/data/1")]),
    "a name that is no UTF-8": pack_zip([PICKLE, ENTRY, ZipEntry(b"a/\xff\xfe", b"", flags=0x800)]),
    "big-endian": pack_zip([PICKLE, ENTRY, ZipEntry("a/byteorder", b"big")]),
    "TorchScript": pack_bin(GOOD, STORED, (ZipEntry("a/constants.pkl", b""),)),
    "a tar": b"storages".ljust(257, b"\0") + b"ustar\0".ljust(255, b"\0"),
    "7z": b"7z\xbc\xaf\x27\x1c" + b"\0" * 100,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 100,
    "a bare pickle": pickle.dumps({"x": [1.0]}, protocol=2),
    "GGUF": b"GGUF" + b"\0" * 100,
    "1000 tensors of one storage": pack_bin(
        weights(**{f"t{i}": tensor((50_000,), (1,), where=storage(numel=50_000)) for i in range(1000)}),
        {"0": bytes(200_000)},
    ),
}
HOSTILE = {
    **{f"call: {key}": pack_bin(call(name(*value[:2]), *value[2]), STORED) for key, value in CALLS.items()},
    **{f"opcode: {key}": pack_bin(b"\x80\x04" + program, STORED) for key, program in OPCODES.items()},
    **{f"program: {key}": pack_bin(program, STORED) for key, program in PROGRAMS.items()},
    **{f"tensor: {key}": pack_bin(weights(x=value), STORED) for key, value in TENSORS.items()},
    **{f"archive: {key}": content for key, content in ARCHIVES.items()},
}


def test_the_calls_would_be_made_by_pickle_itself(tmp_path):
    """The canary sings where Python's own unpickler reads the same bytes."""
    for i, program in enumerate((call(name("os", "system"), *CALLS["os.system"][2]), b"\x80\x02" + OPCODES["INST"])):
        folder = tmp_path / str(i)
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"],
            input=program,
            cwd=folder,
        )
        assert (folder / CANARY).exists()


@pytest.mark.campaign("hostile .bin")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_runs(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(HOSTILE[case])
    modules = set(sys.modules)
    started = time.process_time()
    with pytest.raises((MalformedError, UnsupportedError)) as caught:
        read_weights(path)
    assert time.process_time() - started < 2
    message = str(caught.value)
    assert message.startswith("adapter_model.bin: ") and message.isprintable() and len(message) < 500
    assert os.listdir(tmp_path) == ["adapter_model.bin"] and path.read_bytes() == HOSTILE[case]
    assert not (set(sys.modules) - modules) & {"antigravity", "this", "torch", "pip", "runpy"}


@pytest.mark.parametrize("case", [case for case in HOSTILE if case.startswith(("program", "opcode", "archive"))])
def test_a_hostile_file_takes_little_memory(tmp_path, case):
    path = tmp_path / "a.bin"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    with pytest.raises((MalformedError, UnsupportedError)):
        read_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_there_are_enough_hostile_files():
    assert len(HOSTILE) > 150 and len(set(HOSTILE.values())) == len(HOSTILE)


def test_every_truncation_is_refused(tmp_path):
    content, path = pack_bin(GOOD, STORED), tmp_path / "a.bin"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(LoraGgufError):
            read_weights(path)


def test_a_pickle_of_64_megabytes_is_refused_by_its_size(tmp_path):
    path = tmp_path / "a.bin"
    with open(path, "wb") as file:
        content = pack_zip([ZipEntry("a/data.pkl", b"", raw_size=0)])
        head = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 65 << 20, 65 << 20, 10, 0) + b"a/data.pkl"
        file.write(head)
        file.seek(65 << 20, 1)
        entry = bytearray(content[content.index(b"PK\x01\x02") :])
        struct.pack_into("<II", entry, 20, 65 << 20, 65 << 20)
        struct.pack_into("<I", entry, len(entry) - 22 + 16, len(head) + (65 << 20))
        file.write(entry)
    with pytest.raises(MalformedError, match="a pickle of 68157440 bytes"):
        read_weights(path)


def test_mutants_are_refused_or_harmless(tmp_path):
    assert 5 < check_bin_mutants(tmp_path / "a.bin", 500, seed=1) < 450
