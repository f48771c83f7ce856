"""The long part of the fuzz: 10,000 GGUF, 5,000 safetensors and 5,000 PyTorch files, and a large real header."""

from __future__ import annotations

import pytest

from lora_gguf.files.gguf_reader import GgufReader
from tests.checks import check_bin_mutants, check_gguf_mutants, check_safetensors_mutants
from tests.common import gemma3_path
from tests.ggml_judge import Judge


@pytest.mark.campaign("GGUF mutants")
@pytest.mark.parametrize("seed", range(100, 110))
def test_1000_gguf_mutants(tmp_path, record_property, seed):
    record_property("runs", 1000)
    with Judge() as judge:
        assert 100 < check_gguf_mutants(tmp_path / "a.gguf", judge, 1000, seed) < 900


@pytest.mark.campaign("safetensors mutants")
@pytest.mark.parametrize("seed", range(200, 205))
def test_1000_safetensors_mutants(tmp_path, record_property, seed):
    record_property("runs", 1000)
    assert 100 < check_safetensors_mutants(tmp_path / "a.safetensors", 1000, seed) < 900


@pytest.mark.campaign(".bin mutants")
@pytest.mark.parametrize("seed", range(300, 305))
def test_1000_bin_mutants(tmp_path, record_property, seed):
    record_property("runs", 1000)
    assert 5 < check_bin_mutants(tmp_path / "a.bin", 1000, seed) < 900


def test_gemma_is_read_as_the_gguf_package_reads_it():
    from gguf import GGUFReader

    theirs = GGUFReader(gemma3_path())
    with GgufReader(gemma3_path()) as reader:
        assert list(reader.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info = reader.tensors[tensor.name]
            assert (info.type.id, reader.data_position + info.offset) == (tensor.tensor_type, tensor.data_offset)
            assert reader.read(info).tobytes() == tensor.data.tobytes()
        for key in reader.kv:
            assert reader.get(key) == theirs.fields[key].contents(), key
