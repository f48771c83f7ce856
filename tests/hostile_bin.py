"""PyTorch files made by hand, honest and hostile: pickles by opcode, zip archives by field."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass


@dataclass
class ZipEntry:
    """An entry of a zip archive; what is None is right, all else is a lie."""

    name: str | bytes
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    raw_size: int | None = None
    local_name: bytes | None = None
    header_offset: int | None = None
    attributes: int = 0


def pack_zip(entries: list[ZipEntry], prefix: bytes = b"", comment: bytes = b"") -> bytes:
    """A zip archive with a local header, data and a directory row an entry."""
    body, directory = prefix, b""
    for entry in entries:
        name = entry.name.encode() if isinstance(entry.name, str) else entry.name
        local_name = name if entry.local_name is None else entry.local_name
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        stored = len(entry.data) if entry.raw_size is None else entry.raw_size
        size = stored if entry.size is None else entry.size
        offset = len(body) - len(prefix) if entry.header_offset is None else entry.header_offset
        fields = (20, entry.flags, entry.method, 0, 0, crc, stored & 0xFFFFFFFF, size & 0xFFFFFFFF)
        extra = struct.pack("<HHQQ", 1, 16, size, stored) if max(size, stored) >= 0xFFFFFFFF else b""
        if extra:
            fields = (*fields[:6], 0xFFFFFFFF, 0xFFFFFFFF)
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", 20, *fields, len(name), len(extra), 0, 0, 0, entry.attributes, offset
        )
        directory += name + extra
        body += struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields, len(local_name), 0) + local_name + entry.data
    end = struct.pack(
        "<4s4H2IH",
        b"PK\x05\x06",
        0,
        0,
        len(entries),
        len(entries),
        len(directory),
        len(body) - len(prefix),
        len(comment),
    )
    return body + directory + end + comment


def pack_bin(
    pickle: bytes, storages: dict[str, bytes] | None = None, more: tuple[ZipEntry, ...] = (), **options
) -> bytes:
    """A PyTorch file of one pickle and its storages."""
    entries = [ZipEntry("a/data.pkl", pickle), ZipEntry("a/byteorder", b"little"), ZipEntry("a/version", b"3\n")]
    entries += [ZipEntry(f"a/data/{key}", data) for key, data in (storages or {}).items()]
    return pack_zip([*entries, *more], **options)


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int | float | bool | None) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(values) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def storage(key: str = "0", kind: bytes = name("torch", "FloatStorage"), numel=6) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(
    shape=(2, 3), stride=(3, 1), offset=0, where: bytes | None = None, more: bytes = b"", function="_rebuild_tensor_v2"
) -> bytes:
    arguments = (storage() if where is None else where) + number(offset) + sequence(shape) + sequence(stride)
    hooks = b"\x89" + name("collections", "OrderedDict") + b")R"
    return name("torch._utils", function) + b"(" + arguments + hooks + more + b"tR"


def weights(**items: bytes) -> bytes:
    """The pickle of a dict of ``items``, each the opcodes of its value."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."
