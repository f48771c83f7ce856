"""``--layout-of``: a base of an architecture that came after this version, read with the layout of one that it knows."""

from __future__ import annotations

import numpy as np
import pytest

from lora_gguf import api
from lora_gguf.errors import MismatchError, UnsupportedError, UsageError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.likeness import likeliest
from tests import tiny
from tests.common import pack_gguf, pack_kv


def renamed(folder, name, architecture):
    """The GGUF of a model as one of another architecture, and its merge under the name that we know."""
    base = tiny.base_gguf(folder, name)
    with GgufReader(base) as reader:
        old = reader.architecture
        pairs = []
        for key, entry in reader.kv.items():
            value = base.read_bytes()[entry.value : entry.end]
            new = architecture + key.removeprefix(old) if key.startswith(f"{old}.") else key
            if key == "general.architecture":
                pairs.append(pack_kv(key, 8, len(architecture).to_bytes(8, "little") + architecture.encode()))
            else:
                pairs.append(pack_kv(new, entry.type, value))
        tensors = [
            (info.name, info.type.name, info.shape, bytes(reader.read(info).tobytes()))
            for info in reader.tensors.values()
        ]
    path = folder / "unknown.gguf"
    path.write_bytes(pack_gguf(pairs, tensors))
    return base, path


def weights(path):
    with GgufReader(path) as reader:
        return {name: reader.read(info).tobytes() for name, info in reader.tensors.items()}


ADAPTER = tiny.TINY / "llama" / "adapter"


@pytest.fixture
def bases(tmp_path):
    return renamed(tmp_path, "llama", "llamb")


def test_without_it_the_refusal_names_the_likeliest(bases, tmp_path):
    _, unknown = bases
    with pytest.raises(
        UnsupportedError, match=r"llamb.*that of llama, whose names fit 21 of its 21.*--layout-of llama"
    ):
        api.merge(unknown, ADAPTER, tmp_path / "out.gguf")


def test_merge_verify_and_doctor(bases, tmp_path):
    base, unknown = bases
    api.merge(base, ADAPTER, tmp_path / "known.gguf")
    report = api.merge(unknown, ADAPTER, tmp_path / "out.gguf", layout_of="llama")
    assert [line for line in report.plan.warnings if "llamb is read with the layout of llama" in line]
    assert weights(tmp_path / "out.gguf") == weights(tmp_path / "known.gguf")
    assert api.verify(tmp_path / "out.gguf", unknown, ADAPTER, layout_of="llama").ok
    assert api.doctor(unknown, ADAPTER, layout_of="llama").refusal is None
    refusal = api.doctor(unknown, ADAPTER).refusal
    assert refusal is not None and "--layout-of llama" in str(refusal)


def test_convert_writes_the_bases_own_architecture(bases, tmp_path):
    base, unknown = bases
    placement = api.convert(ADAPTER, tmp_path / "adapter.gguf", unknown, layout_of="llama")
    assert [line for line in placement.warnings if "--layout-of" in line]
    with GgufReader(tmp_path / "adapter.gguf") as reader:
        assert reader.architecture == "llamb"
    api.merge(unknown, tmp_path / "adapter.gguf", tmp_path / "out.gguf", layout_of="llama")
    api.merge(base, ADAPTER, tmp_path / "known.gguf")
    for name, found in weights(tmp_path / "out.gguf").items():
        expected = np.frombuffer(weights(tmp_path / "known.gguf")[name], "<f4")
        np.testing.assert_allclose(np.frombuffer(found, "<f4"), expected, atol=2e-6)


def test_every_shape_is_checked(bases, tmp_path):
    _, unknown = bases
    with pytest.raises(MismatchError):
        api.merge(unknown, tiny.TINY / "qwen3moe" / "adapter", tmp_path / "out.gguf", layout_of="qwen3moe")


def test_a_known_architecture_keeps_its_layout(bases, tmp_path):
    base, unknown = bases
    with pytest.raises(UsageError, match="the layout of llama is known"):
        api.merge(base, ADAPTER, tmp_path / "out.gguf", layout_of="qwen2")
    with pytest.raises(UsageError, match="such as .*llama"):
        api.merge(unknown, ADAPTER, tmp_path / "out.gguf", layout_of="lama")


@pytest.mark.parametrize(
    ("name", "called", "expected"),
    [
        ("qwen2", "qwen9", "qwen2"), ("qwen3moe", "qwen9moe", "qwen3moe"), ("gemma3", "gemma9", "gemma3"),
        ("gpt-oss", "gpt-next", "gpt-oss"), ("deepseek2", "deepseek9", "deepseek2"), ("bert", "x", "bert"),
        ("falcon-h1", "falcon-h9", "falcon-h1"),
    ],
)  # fmt: skip
def test_the_likeliest_by_the_names_of_tensors(name, called, expected, tmp_path):
    with GgufReader(tiny.base_gguf(tmp_path, name)) as reader:
        best, fitting = likeliest(called, reader.tensors)
    assert best == expected and fitting <= len(reader.tensors)


def test_nothing_is_like_nonsense():
    assert likeliest("llama", ["a", "b.c"]) is None and likeliest("x", []) is None


def test_the_command_line_has_it(case, tmp_path, bases):
    result = case.forge.run(
        "merge", "unknown.gguf", str(ADAPTER), "-o", "out.gguf", "--layout-of", "llama", cwd=tmp_path
    )
    assert result.code == 0 and "layout of llama" in result.err
