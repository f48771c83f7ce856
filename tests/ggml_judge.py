"""libggml's own reader as a judge of GGUF files, in a process of its own because some files abort it.

``python -m tests.ggml_judge`` reads files (a length as u64, then the bytes) from stdin and answers each with a line of
JSON: what it read, or null where it refuses.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys

from tests.common import ROOT, ggml


class InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


def _library() -> ctypes.CDLL:
    library = ggml()
    library.gguf_init_from_buffer.argtypes = [ctypes.c_char_p, ctypes.c_size_t, InitParams]
    for name in ("gguf_init_from_buffer", "gguf_get_tensor_ne"):
        getattr(library, name).restype = ctypes.c_void_p
    for name in ("gguf_get_key", "gguf_get_tensor_name"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("gguf_get_n_kv", "gguf_get_n_tensors"):
        getattr(library, name).restype = ctypes.c_int64
    for name in ("gguf_get_alignment", "gguf_get_data_offset", "gguf_get_tensor_offset", "gguf_get_tensor_size"):
        getattr(library, name).restype = ctypes.c_size_t
    return library


def describe(library: ctypes.CDLL, content: bytes, with_data: bool = False) -> dict | None:
    """What libggml reads from ``content``; None where it, or llama.cpp's check that the data lies in the file, refuses
    it.
    """
    data = ctypes.c_void_p()
    params = InitParams(not with_data, ctypes.pointer(data) if with_data else None)
    gguf = library.gguf_init_from_buffer(content, len(content), params)
    if not gguf:
        return None
    gguf = ctypes.c_void_p(gguf)
    found = {
        "version": library.gguf_get_version(gguf),
        "alignment": library.gguf_get_alignment(gguf),
        "data": library.gguf_get_data_offset(gguf),
        "keys": [_key(library, gguf, ctypes.c_int64(i)) for i in range(library.gguf_get_n_kv(gguf))],
        "tensors": [_tensor(library, gguf, ctypes.c_int64(i)) for i in range(library.gguf_get_n_tensors(gguf))],
    }
    library.gguf_free(gguf)
    if with_data:
        library.ggml_free(data)
    ends = [found["data"] + offset + size for *_, offset, size in found["tensors"]]
    return found if max(ends, default=0) <= len(content) else None


def _key(library, gguf, i) -> list:
    return [library.gguf_get_key(gguf, i).hex(), library.gguf_get_kv_type(gguf, i)]


def _tensor(library, gguf, i) -> list:
    """Name, type, the four dimensions in GGUF's order, offset, bytes."""
    shape = ctypes.cast(library.gguf_get_tensor_ne(gguf, i), ctypes.POINTER(ctypes.c_int64 * 4)).contents
    name, kind = library.gguf_get_tensor_name(gguf, i).hex(), library.gguf_get_tensor_type(gguf, i)
    return [name, kind, *shape, library.gguf_get_tensor_offset(gguf, i), library.gguf_get_tensor_size(gguf, i)]


class Judge:
    """The judge's process, started again after each file that kills it. A context manager."""

    def __init__(self, with_data: bool = False):
        self.arguments = [sys.executable, "-m", "tests.ggml_judge", *(["data"] if with_data else [])]
        self.process = None
        self.n_aborts = 0

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_exc) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait(10)
            self.process.stdout.close()

    def describe(self, content: bytes) -> dict | None:
        """As the function ``describe``; a file that makes libggml abort counts as refused."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.arguments,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )
        try:
            self.process.stdin.write(struct.pack("<Q", len(content)) + content)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line)
        self.process.wait()
        self.process, self.n_aborts = None, self.n_aborts + 1
        return None


def main() -> None:
    library = _library()
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.ggml_log_set(quiet, None)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while head := sys.stdin.buffer.read(8):
        content = sys.stdin.buffer.read(struct.unpack("<Q", head)[0])
        print(json.dumps(describe(library, content, with_data="data" in sys.argv)), file=out, flush=True)


if __name__ == "__main__":
    main()
