"""The importance matrix beside a base on the Hub is used, unless declined or of another model."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from lora_gguf import api
from lora_gguf.errors import MismatchError
from lora_gguf.files.gguf_reader import GgufReader
from tests import tiny
from tests.common import pack_gguf, text_kv

REPO, ADAPTER = "maker/tiny-GGUF", tiny.TINY / "llama" / "adapter"


def legacy(values: dict[str, np.ndarray]) -> bytes:
    entries = [
        struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(row)) + row.tobytes()
        for name, row in values.items()
    ]
    return struct.pack("<i", len(values)) + b"".join(entries)


def gguf(values: dict[str, np.ndarray]) -> bytes:
    tensors = []
    for name, row in values.items():
        tensors.append((f"{name}.in_sum2", "F32", (1, len(row)), row.tobytes()))
        tensors.append((f"{name}.counts", "F32", (1, 1), np.ones(1, np.float32).tobytes()))
    return pack_gguf([text_kv("general.type", "imatrix")], tensors)


@pytest.fixture
def repo(local_hub, tmp_path):
    """A repository with a base; what its layers' columns could be measured as."""
    base = tiny.base_gguf(tmp_path, "llama")
    local_hub.repos[REPO] = {"tiny-Q8_0.gguf": base.read_bytes()}
    with GgufReader(base) as reader:
        layers = [info for info in reader.tensors.values() if info.name.startswith("blk.") and len(info.shape) == 2]
    rng = np.random.default_rng(0)
    return local_hub.repos[REPO], {i.name: rng.uniform(1, 9, i.n_cols).astype(np.float32) for i in layers}


def merged(out, **options):
    report = api.merge(f"{REPO}:Q8_0", ADAPTER, out, force=True, **options)
    with GgufReader(out) as reader:
        return report, reader.get("lora_gguf.imatrix")


@pytest.mark.parametrize(
    ("name", "pack"), [("tiny.imatrix", legacy), ("imatrix.dat", legacy), ("tiny-imatrix.gguf", gguf)]
)
def test_it_is_used_and_said(repo, tmp_path, name, pack):
    files, values = repo
    files[name] = pack(values)
    report, recorded = merged(tmp_path / "out.gguf")
    assert recorded == name and any(name in line and "--imatrix none" in line for line in report.warnings)
    assert any(name in remark.text for remark in api.doctor(f"{REPO}:Q8_0", ADAPTER).remarks)
    report, recorded = merged(tmp_path / "out.gguf", imatrix="none")
    assert not recorded and not any(name in line for line in report.warnings)


def test_verify_finds_it_as_the_merge_did(repo, tmp_path):
    files, values = repo
    files["imatrix.dat"] = legacy(values)
    merged(tmp_path / "out.gguf", rounding="fresh", type="Q4_0")
    assert api.verify(tmp_path / "out.gguf", f"{REPO}:Q8_0", ADAPTER).remade
    assert not api.verify(tmp_path / "out.gguf", f"{REPO}:Q8_0", ADAPTER, imatrix="none").remade
    files["im.imatrix"] = files.pop("imatrix.dat")
    report = api.verify(tmp_path / "out.gguf", f"{REPO}:Q8_0", ADAPTER)
    assert not report.remade and report.verdict != "wrong"


def test_without_one_nothing_is_said(repo, tmp_path):
    report, recorded = merged(tmp_path / "out.gguf")
    assert not recorded and not any("imatrix" in line for line in report.warnings)


@pytest.mark.parametrize("change", [lambda name, row: (f"other.{name}", row), lambda name, row: (name, row[:-1])])
def test_one_of_another_model_is_refused(repo, tmp_path, change):
    files, values = repo
    files["imatrix.dat"] = legacy(dict(change(name, row) for name, row in values.items()))
    with pytest.raises(MismatchError, match="another model"):
        merged(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    merged(tmp_path / "out.gguf", imatrix="none")
