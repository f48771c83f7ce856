"""What verify says is wrong: rows without their update, another model's weights, adapters that cancel."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from lora_gguf.api import verify
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import raw_key_values
from tests.common import pack_gguf
from tests.test_merge import stored
from tests.test_verify import N_HEADS, SIZE, Case, only, some_pairs, stripped, write_adapter, write_base
from tests.wrong_files import CODECS, packed, unpacked


class Strong(Case):
    """A merge with an update of several steps, so that few rows tell whether it is there."""

    def __init__(self, folder, type_name):
        super().__init__(folder, type_name)
        self.pairs = some_pairs(40 * SIZE[type_name])
        self.merge(write_adapter(self.folder / "adapter.gguf", self.pairs))

    def without(self, names, rows):
        """The right merge, as another tool's, in which ``rows`` of the tensors ``names`` are the base's."""
        out = stripped(self.merged)
        with GgufReader(self.base) as donor, GgufReader(out) as reader, open(out, "r+b") as file:
            for name in names:
                found = reader.read(reader.tensors[name]).copy()
                chosen = rows(len(found))
                found[chosen] = donor.read(donor.tensors[name])[chosen]
                file.seek(reader.data_position + reader.tensors[name].offset)
                file.write(found.tobytes())
        return out


@pytest.fixture(scope="module", params=["Q4_0", "Q4_K", "Q8_0", "F16"])
def case(request, tmp_path_factory):
    return Strong(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(
    ("rows", "share"),
    [(lambda n: slice(0, n // 2), 2), (lambda n: slice(1, None, 2), 2), (lambda n: slice(n // 4 * 3, n), 4)],
    ids=["the first half", "each second", "the last quarter"],
)
def test_rows_without_the_update_are_counted(case, rows, share):
    names = [pair.name for pair in case.pairs]
    finding = only(case.verify(case.without(names, rows)), "rows left out")
    assert set(finding.tensors) == set(names)
    n_rows = len(case.pairs[0].b)
    n_bare, n_found = map(int, re.fullmatch(r"about (\d+) of (\d+) rows without it", finding.found).groups())
    assert n_found == n_rows and abs(n_bare - n_rows // share) <= n_rows // 40


def test_a_head_without_the_update(case):
    out = case.without(["blk.1.attn_q.weight"], lambda n: slice(0, n // N_HEADS))
    assert "about 32 of 128 rows" in only(case.verify(out), "rows left out").found


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.9, 1.3])
def test_another_scale_is_no_matter_of_rows(case, scale):
    out = stripped(case.merge(case.adapter, scale, case.folder / "scaled.gguf"))
    assert abs(float(only(case.verify(out), "scale").found.split()[0]) - scale) < 0.1


@pytest.mark.parametrize("made", ["F16", "BF16"])
@pytest.mark.parametrize("of", ["Q8_0", "Q4_0", "Q4_K"])
def test_a_merge_of_the_model_before_it_was_quantized(tmp_path, of, made):
    write_base(tmp_path / "original.gguf", made)
    quantized(tmp_path / "original.gguf", tmp_path / "base.gguf", of)
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(SIZE["Q4_0"]))
    Case.merge(None, adapter, out=tmp_path / "merged.gguf", base=tmp_path / "original.gguf")
    report = verify(stripped(tmp_path / "merged.gguf"), tmp_path / "base.gguf", [(adapter, 1.0)])
    finding = report.findings[0]
    assert finding.cause == "unquantized" and "give that one as --base" in str(finding) and len(report.findings) == 1


def quantized(source, target, type_name):
    """A copy of a model with its matrices in another type."""
    with GgufReader(source) as reader:
        tensors = []
        for name, info in reader.tensors.items():
            rows = reader.read(info)
            if len(info.shape) == 2 and not name.startswith("token_embd"):
                rows = stored(CODECS[info.type.name].decoded(rows), type_name)
                tensors.append((name, type_name, info.shape, rows.tobytes()))
            else:
                tensors.append((name, info.type.name, info.shape, rows))
        target.write_bytes(pack_gguf(raw_key_values(reader), tensors))


def test_damaged_floats_are_not_taken_for_another_models(tmp_path):
    write_base(tmp_path / "original.gguf", "F16")
    quantized(tmp_path / "original.gguf", tmp_path / "base.gguf", "Q8_0")
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(SIZE["Q4_0"]))
    Case.merge(None, adapter, out=tmp_path / "merged.gguf", base=tmp_path / "original.gguf")
    out = stripped(tmp_path / "merged.gguf")
    with GgufReader(out) as reader, open(out, "r+b") as file:
        info = reader.tensors["blk.0.ffn_up.weight"]
        rows = reader.read(info).copy().view(np.float16)
        file.seek(reader.data_position + info.offset)
        file.write((rows[::-1]).tobytes())
    report = verify(out, tmp_path / "base.gguf", [(adapter, 1.0)])
    assert report.verdict == "wrong" and "unquantized" not in [finding.cause for finding in report.findings]


@pytest.mark.parametrize("type_name", ["Q4_0", "F16", "F32"])
def test_adapters_that_cancel_leave_the_base(tmp_path, type_name):
    write_base(tmp_path / "base.gguf", type_name)
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(2e-3))
    shutil.copy(tmp_path / "base.gguf", tmp_path / "merged.gguf")
    report = verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(adapter, 1.0), (adapter, -1.0)])
    assert not report.findings and report.notes == ["the adapters change nothing: the update is zero"]
    report = verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(adapter, 1.0), (adapter, -0.5)])
    assert [finding.cause for finding in report.findings] == ["not merged"]


MODULES = {"attn_v": "self_attn.v_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def dora_in_bf16(folder, change, spoil=lambda name, rows: rows):
    """A base in BF16, a DoRA adapter that changes a share ``change`` of it, and PEFT's merge in bf16: each sum, length,
    factor and product held in it.
    """
    write_base(folder / "base.gguf", "BF16")
    rng = np.random.default_rng(3)
    keys, tensors = unpacked(folder / "base.gguf")
    weights = {}
    for name, (kind, shape, rows) in tensors.items():
        module = MODULES.get(name.split(".")[2] if name.startswith("blk") else "")
        if not module:
            continue
        w = CODECS[kind].decoded(rows)
        a = rng.normal(size=(4, shape[1])).astype(np.float32)
        b = (rng.normal(size=(shape[0], 4)) * change * 0.01 / 2).astype(np.float32)
        delta = in_bf16(in_bf16(b) @ in_bf16(a))
        length = np.linalg.norm(w, axis=1)
        magnitude = in_bf16(length * (1 + change * rng.normal(size=len(w)))).astype(np.float32)
        factor = in_bf16(magnitude / in_bf16(np.linalg.norm(in_bf16(w + delta), axis=1)))
        merged = in_bf16(factor[:, None] * in_bf16(w + delta))
        tensors[name][2] = np.frombuffer(stored(spoil(name, merged), kind).tobytes(), np.uint8).reshape(len(w), -1)
        path = f"base_model.model.model.layers.{name.split('.')[1]}.{module}"
        weights |= {f"{path}.lora_A.weight": in_bf16(a), f"{path}.lora_B.weight": in_bf16(b)}
        weights[f"{path}.lora_magnitude_vector"] = magnitude
    (folder / "merged.gguf").write_bytes(packed(keys, tensors, ours=False))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True, "target_modules": [*MODULES.values()]}
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter" / "adapter_model.safetensors")
    return verify(folder / "merged.gguf", folder / "base.gguf", [(folder / "adapter", 1.0)])


def in_bf16(values):
    return values.astype(bfloat16).astype(np.float32)


@pytest.mark.parametrize("change", [0.005, 0.02, 0.1])
def test_dora_merged_in_bf16_is_not_wrong(tmp_path, change):
    report = dora_in_bf16(tmp_path, change)
    assert report.verdict != "wrong", report.findings


@pytest.mark.parametrize(
    "spoil",
    [
        lambda name, rows: rows * np.float32(1.02),
        lambda name, rows: rows[::-1] if name == "blk.1.ffn_up.weight" else rows,
        lambda name, rows: np.roll(rows, 1, axis=1) if name == "blk.1.ffn_up.weight" else rows,
        lambda name, rows: np.where(np.arange(len(rows))[:, None] == 7, rows * np.float32(1.1), rows),
        lambda name, rows: np.where(np.arange(rows.size).reshape(rows.shape) == 777, -rows, rows),
    ],
    ids=["longer rows", "rows reversed", "columns moved", "one row longer", "one weight turned"],
)
def test_wrong_merges_of_dora_in_bf16_are_not_right(tmp_path, spoil):
    assert dora_in_bf16(tmp_path, 0.02, spoil).verdict == "wrong"
