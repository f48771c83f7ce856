from __future__ import annotations

import gguf

from lora_gguf.quants.ggml import BY_NAME, FILE_TYPES, TYPES
from tests.common import ggml


def test_the_table_is_that_of_the_gguf_package():
    for member, sizes in gguf.GGML_QUANT_SIZES.items():
        if member.name == "Q8_1":  # 40 bytes there, 36 in ggml: see the next test
            continue
        entry = BY_NAME[member.name]
        assert (entry.id, entry.block_size, entry.block_bytes) == (member.value, *sizes)


def test_the_table_is_that_of_ggml():
    library = ggml()
    library.ggml_blck_size.restype = library.ggml_type_size.restype = __import__("ctypes").c_int64
    for entry in TYPES.values():
        assert (library.ggml_blck_size(entry.id), library.ggml_type_size(entry.id)) == (
            entry.block_size,
            entry.block_bytes,
        )


def test_file_types():
    for member in gguf.LlamaFileType:
        if member.name.startswith(("MOSTLY_", "ALL_")):
            assert FILE_TYPES[member.name.split("_", 1)[1]] == member.value


def test_row_bytes():
    assert BY_NAME["Q4_K"].row_bytes(512) == 288
