"""GGUF files, well made and malformed, packed with ``struct``; what libggml says of each is asked live in the tests."""

from __future__ import annotations

import struct

from tests.common import pack_kv, pack_string, pack_tensor_info, text_kv, u32_kv

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
BASE_KVS = (
    text_kv("general.architecture", "llama"),
    text_kv("general.name", "corpus"),
    u32_kv("llama.block_count", 1),
    text_kv("x", "y"),
)
VECTOR = pack_tensor_info("t", (32,), 0, 0)
MAX_U64, MAX_U32 = (1 << 64) - 1, (1 << 32) - 1


def build(
    key_values=BASE_KVS,
    infos=(VECTOR,),
    data: bytes = bytes(128),
    *,
    magic=b"GGUF",
    version=3,
    n_tensors=None,
    n_kv=None,
    alignment=32,
) -> bytes:
    """A GGUF of raw parts; the counts are right unless given."""
    counts = struct.pack(
        "<QQ", len(infos) if n_tensors is None else n_tensors, len(key_values) if n_kv is None else n_kv
    )
    head = magic + struct.pack("<I", version) + counts + b"".join(key_values) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


def kv(key: str | bytes, type_id: int, value: bytes) -> bytes:
    """A file whose one key/value pair is this one, without tensors."""
    return build((pack_kv(key, type_id, value),), (), b"")


def array(item: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + body


def vector(name: str | bytes = "t", dims=(32,), type_id: int = 0, offset: int = 0, data: int = 128) -> bytes:
    """A file whose one tensor is this one, with ``data`` bytes of data."""
    return build(infos=(pack_tensor_info(name, dims, type_id, offset),), data=bytes(data))


def two(first: int = 0, second: int = 128, names=("a", "b"), data: int = 256) -> bytes:
    return build(
        infos=[pack_tensor_info(name, (32,), 0, offset) for name, offset in zip(names, (first, second), strict=True)],
        data=bytes(data),
    )


def aligned(alignment: int, type_id: int = U32, pad: int | None = None) -> bytes:
    value = struct.pack({U32: "<I", I32: "<i", U64: "<Q"}[type_id], alignment)
    return build((*BASE_KVS, pack_kv("general.alignment", type_id, value)), alignment=pad or alignment)


def nested(depth: int) -> bytes:
    return kv("n", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + array(U8, 1, b"\0"))


VALID = build()
INFO_END = 24 + sum(map(len, BASE_KVS)) + len(VECTOR)
SCALAR_VALUES = {
    U8: b"\xff", I8: b"\x80", U16: b"\xff\xff", I16: b"\0\x80", U32: b"\xff" * 4, I32: b"\0\0\0\x80", F32: b"\0\0\xc0\x7f", BOOL: b"\x01",
    U64: b"\xff" * 8, I64: b"\0" * 7 + b"\x80", F64: b"\x01" + b"\0" * 5 + b"\xf8\x7f",
}  # fmt: skip

# libggml accepts these, and we do
ACCEPTED = {
    "valid": VALID,
    "version 2": build(version=2),
    "no tensors": build(infos=(), data=b""),
    "nothing at all": build((), (), b""),
    "alignment 1": aligned(1, pad=1),
    "alignment 2": aligned(2),
    "alignment 64": aligned(64),
    "alignment 4096": aligned(4096),
    "zero dimension": vector(dims=(32, 0), data=0),
    "zero first dimension": vector(dims=(0, 32), data=0),
    "no dimensions": vector(dims=(), data=4),
    "four dimensions": vector(dims=(2, 4, 2, 2)),
    "trailing bytes": VALID + b"tail" * 10,
    "data without its last padding": vector(dims=(31,), data=124),
    "bool 2": kv("b", BOOL, b"\x02"),
    "invalid UTF-8 in a key": build((*BASE_KVS, pack_kv(b"\xff\xfe", U8, b"\0"))),
    "invalid UTF-8 in a value": build((*BASE_KVS, pack_kv("v", STRING, pack_string(b"\xff\xfe")))),
    "control characters in a key": kv("a\x1b[2J\n", U8, b"\0"),
    "NUL in a value": kv("v", STRING, pack_string(b"a\0b")),
    "empty value": kv("v", STRING, pack_string(b"")),
    "empty arrays": build([pack_kv(f"a{i}", ARRAY, array(i, 0)) for i in (*SCALAR_VALUES, STRING)], (), b""),
    "every scalar": build([pack_kv(f"s{i}", i, value) for i, value in SCALAR_VALUES.items()], (), b""),
    "every array": build(
        [pack_kv(f"a{i}", ARRAY, array(i, 3, value * 3)) for i, value in SCALAR_VALUES.items()], (), b""
    ),
    "array of strings": kv("s", ARRAY, array(STRING, 3, pack_string("a") + pack_string(b"\xff") + pack_string(""))),
    "name of 63 bytes": vector("x" * 63),
    "name that is a path": vector("../../etc/passwd"),
    "name in UTF-8": vector("å日本"),
    "two tensors": two(),
    "type NVFP4": vector(dims=(64,), type_id=40, data=36),
    "type Q1_0": vector(dims=(128,), type_id=41, data=18),
    "type Q2_0": vector(dims=(64,), type_id=42, data=18),
    "type MXFP4": vector(dims=(32,), type_id=39, data=17),
    "type Q4_K": vector(dims=(256, 2), type_id=12, data=288),
    "type I64": vector(dims=(4,), type_id=27, data=32),
    "type Q8_1": vector(dims=(32,), type_id=9, data=36),
    "key of 60,000 bytes": kv("k" * 60_000, U8, b"\0"),
}
# libggml accepts these, and we do not: NUL or nothing in a name, or what a terminal should not see
STRICTER = {
    "NUL in a key": kv(b"a\0b", U8, b"\0"),
    "empty tensor name": vector(""),
    "control characters in a tensor name": vector("../../x\x1b[2J\n"),
    "invalid UTF-8 in a tensor name": vector(b"\xff\xfe"),
    "right-to-left override in a tensor name": vector("a\u202eb"),
    "n_kv one more, so that a tensor is read as a pair": build(n_kv=5),
    "key of 70,000 bytes": kv("k" * 70_000, U8, b"\0"),
    "no elements, others 2^40": vector(dims=(0, 1 << 40, 1 << 40), data=0),
}
# libggml and llama.cpp's loader refuse these, and so do we
REFUSED = {
    "empty": b"",
    "one byte": b"G",
    "magic only": b"GGUF",
    "bad magic": build(magic=b"GGUX"),
    "old magic": build(magic=b"ggjt"),
    "version 0": build(version=0),
    "version 1": build(version=1),
    "version 4": build(version=4),
    "version 2^31": build(version=1 << 31),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 3) + bytes(200),
    "header of 12 bytes": VALID[:12],
    "ends in the key/value pairs": VALID[:60],
    "ends in the tensor table": VALID[: INFO_END - 4],
    "data one byte short": VALID[:-1],
    "no data": VALID[: INFO_END + -INFO_END % 32],
    "n_tensors -1": build(n_tensors=MAX_U64),
    "n_tensors -2^63": build(n_tensors=1 << 63),
    "n_tensors 2^31": build(n_tensors=1 << 31),
    "n_tensors one more": build(n_tensors=2),
    "n_kv -1": build(n_kv=MAX_U64),
    "n_kv 2^31": build(n_kv=1 << 31),
    "n_kv one less": build(n_kv=3),
    "key of length -1": build((struct.pack("<Q", MAX_U64) + b"k" + bytes(64),), (), b""),
    "key of 1 TiB": build((struct.pack("<Q", 1 << 40) + b"k" + bytes(64),), (), b""),
    "key of 2^30+1": build((struct.pack("<Q", (1 << 30) + 1) + b"k" + bytes(64),), (), b""),
    "value of 1 TiB": kv("v", STRING, struct.pack("<Q", 1 << 40) + bytes(64)),
    "value of length -1": kv("v", STRING, struct.pack("<Q", MAX_U64) + bytes(64)),
    "empty key": kv("", U8, b"\0"),
    "key twice": build((*BASE_KVS, BASE_KVS[0])),
    "key twice with two values": build((*BASE_KVS, text_kv("general.architecture", "gemma"))),
    "value type 13": kv("v", 13, bytes(8)),
    "value type 99": kv("v", 99, bytes(8)),
    "value type 2^31": kv("v", 1 << 31, bytes(8)),
    "array of 2^40 bytes": kv("a", ARRAY, array(U8, 1 << 40, bytes(64))),
    "array of 2^63 bytes": kv("a", ARRAY, array(U8, 1 << 63, bytes(64))),
    "array of 10^9 bytes": kv("a", ARRAY, array(U8, 10**9, bytes(9))),
    "array of 2^61 doubles": kv("a", ARRAY, array(F64, 1 << 61, bytes(64))),
    "array of 2^33 strings": kv("a", ARRAY, array(STRING, 1 << 33, bytes(64))),
    "array of strings, one of them 1 TiB": kv(
        "a", ARRAY, array(STRING, 2, pack_string("a") + struct.pack("<Q", 1 << 40))
    ),
    "array of strings, one of length -1": kv("a", ARRAY, array(STRING, 2, struct.pack("<Q", MAX_U64) + bytes(64))),
    "array of strings that jumps back": kv(
        "a", ARRAY, array(STRING, 9, struct.pack("<Q", MAX_U64 - 7) * 2 + bytes(64))
    ),
    "array of type 99": kv("a", ARRAY, array(99, 1, bytes(8))),
    "array of arrays": nested(1),
    "array of arrays 5000 deep": nested(5000),
    "array of no arrays": kv("a", ARRAY, array(ARRAY, 0)),
    "alignment 0": aligned(0, pad=32),
    "alignment 3": aligned(3, pad=32),
    "alignment 13": aligned(13, pad=32),
    "alignment as i32": aligned(32, I32),
    "alignment as u64": aligned(32, U64),
    "alignment as text": build((*BASE_KVS, text_kv("general.alignment", "32"))),
    "alignment 2^31": aligned(1 << 31, pad=32),
    "alignment 64 with data at 32": aligned(64, pad=32)[: INFO_END + 32 + 128],
    "5 dimensions": vector(dims=(32, 1, 1, 1, 1)),
    "10^6 dimensions": build(infos=(pack_string("t") + struct.pack("<I", 10**6) + bytes(100),)),
    "2^32-1 dimensions": build(infos=(pack_string("t") + struct.pack("<I", MAX_U32) + bytes(100),)),
    "dimension -1": vector(dims=(MAX_U64,)),
    "dimension -2^63": vector(dims=(1 << 63,)),
    "dimensions -1 and -32": vector(dims=(MAX_U64, (1 << 64) - 32)),
    "shape whose product wraps to 4": vector(dims=(4194305, 4194305, 211106198978564)),
    "shape whose product wraps to 0": vector(dims=(1 << 32, 1 << 32)),
    "bytes that overflow": vector(dims=(1 << 31, 1 << 31)),
    "bytes that wrap when padded": vector(dims=(4, 1073741823, 1073741825)),
    "tensor of 400 GB": vector(dims=(10**11,)),
    "two tensors of 2^61 bytes": build(infos=[pack_tensor_info(n, (1 << 59,), 0, i << 61) for i, n in enumerate("ab")]),
    "type 99": vector(type_id=99),
    "type -1": vector(type_id=MAX_U32),
    "type Q4_2, removed": vector(type_id=4),
    "type Q4_3, removed": vector(type_id=5),
    "type Q4_0_4_4, removed": vector(type_id=31),
    "type IQ4_NL_8_8, removed": vector(type_id=38),
    "row of 100 in Q4_K": vector(dims=(100,), type_id=12),
    "rows of 100 in Q4_K": vector(dims=(100, 256), type_id=12, data=14400),
    "row of 33 in Q8_0": vector(dims=(33,), type_id=8),
    "no dimensions in Q4_0": vector(dims=(), type_id=2),
    "offset -1": vector(offset=MAX_U64),
    "offset beyond the file": vector(offset=1 << 20),
    "offset 4": vector(offset=4, data=160),
    "offset 32, a gap": vector(offset=32, data=160),
    "offset back into the header": vector(offset=(1 << 64) - 96),
    "two tensors at one offset": two(0, 0),
    "two tensors that overlap": two(0, 96),
    "two tensors with a gap": two(0, 160, data=320),
    "two tensors in another order": two(128, 0),
    "tensor twice": two(names=("t", "t")),
    "name of 64 bytes": vector("x" * 64),
    "name of 64 bytes in UTF-8": vector("å" * 32),
    "name of 200 bytes": vector("x" * 200),
    "name of 1 TiB": build(infos=(struct.pack("<Q", 1 << 40) + bytes(100),)),
    "name of length -1": build(infos=(struct.pack("<Q", MAX_U64) + bytes(100),)),
    "HTML": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>" * 10,
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
    "safetensors": struct.pack("<Q", 64)
    + b'{"t":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}}'.ljust(64)
    + bytes(128),
    "zip": b"PK\x03\x04" + bytes(200),
}
