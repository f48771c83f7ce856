"""Files that verify must not call right, over eleven types, ours and as if another tool's; and right ones of other tools."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from ml_dtypes import bfloat16

from lora_gguf.api import verify
from lora_gguf.errors import MismatchError, UnprovedError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import key_value
from lora_gguf.merging.options import Policy
from lora_gguf.merging.provenance import SEAL, sealed
from lora_gguf.quants.ggml import BY_NAME
from tests import tiny
from tests.calls import merge
from tests.common import ROOT, text_kv
from tests.test_cli import run
from tests.test_merge import stored
from tests.test_verify import SIZE, some_pairs, write_adapter, write_base
from tests.wrong_files import CODECS, DAMAGES, WHOLE, Merge, packed, spoiled, unpacked

# of an update, so that it is about 0.05 of a step
SIZES = {"Q5_0": 1e-4, "Q6_K": 5e-5, "Q2_K": 8e-4, "IQ4_NL": 2e-4, "IQ3_S": 4e-4, "BF16": 4e-6} | SIZE
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_NL", "F16", "BF16", "IQ3_S")
LABELS = [*DAMAGES, *WHOLE]
SHARE = {"IQ3_S": 10}  # of the damages that a type is tried with, one in so many


def chosen(type_name, rounding):
    """Some of the damages, others for each type and rounding, so that all are tried over several of both."""
    step = SHARE.get(type_name, 5)
    return LABELS[(2 * TYPES.index(type_name) + (rounding == "fresh")) % step :: step]


@pytest.fixture(scope="module", params=[(name, rounding) for name in TYPES for rounding in ("auto", "fresh")], ids=str)
def case(request, tmp_path_factory):
    """Dithered with an update of 0.05 steps, and rounded to nearest on a fresh grid with one of 2 steps."""
    type_name, rounding = request.param
    folder = tmp_path_factory.mktemp(f"{type_name}-{rounding}")
    return Merge(folder, type_name, SIZES[type_name] * (40 if rounding == "fresh" else 1), rounding)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another tool's"])
def test_no_wrong_file_is_right(case, ours):
    path = case.folder / "spoiled.gguf"
    for label in chosen(case.type_name, case.rounding):
        path.write_bytes(spoiled(case, label, ours=ours))
        verdict = verify(path, case.base, [(case.adapter, 1.0)]).verdict
        assert verdict == "wrong" if ours else verdict != "right", label


def test_the_right_file_is_right(case):
    found = [verify(case.merged, case.base, [(case.adapter, 1.0)]).verdict]
    path = case.folder / "bare.gguf"
    path.write_bytes(packed(*unpacked(case.merged), ours=False))
    found.append(verify(path, case.base, [(case.adapter, 1.0)]).verdict)
    if case.rounding == "fresh":
        assert found == ["right", "right"]
    elif case.type_name == "IQ3_S":  # which has no codes to dither: an update this small is erased
        assert found == ["unproved", "unproved"]
    else:
        assert found == ["right", "unproved"]


def experts_of(tmp_path):
    """A mixture of experts, an adapter of it, and their right merge."""
    base = tiny.base_gguf(tmp_path, "qwen3moe")
    adapter, merged = tiny.TINY / "qwen3moe" / "adapter", tmp_path / "merged.gguf"
    merge(base, [(adapter, 1.0)], merged)
    return base, adapter, merged


def swapped(rows, other):
    return np.concatenate([rows[len(rows) // 2 :], rows[: len(rows) // 2]])


def left_out(rows, other):
    half = len(rows) // 2
    return np.concatenate([other[:half], rows[half:]])


def twice(rows, other):
    return np.concatenate([rows[: len(rows) // 2]] * 2)


@pytest.mark.parametrize("change", [swapped, left_out, twice])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another tool's"])
def test_experts_that_are_others(tmp_path, change, ours):
    base, adapter, merged = experts_of(tmp_path)
    pairs, tensors = unpacked(merged)
    before, name = unpacked(base)[1], next(name for name in tensors if "_exps" in name)
    assert (before[name][2] != tensors[name][2]).any()
    path = tmp_path / "wrong.gguf"
    path.write_bytes(packed(pairs, tensors, ours=ours))
    assert verify(path, base, adapter).ok
    tensors[name][2] = change(tensors[name][2], before[name][2])
    path.write_bytes(packed(pairs, tensors, ours=ours))
    report = verify(path, base, adapter)
    assert report.verdict == "wrong" and report.findings[0].tensors == (name,)


def test_split_files_are_made_again(tmp_path):
    base, adapter, _ = experts_of(tmp_path)
    first = merge(base, [(adapter, 1.0)], tmp_path / "parts.gguf", max_bytes=50_000).written
    other = merge(first[0], [(adapter, 0.5)], tmp_path / "more.gguf", shards=True, again=True).written
    assert len(first) == len(other) > 1
    for path, parent, scale in ((first[-1], base, 1.0), (other[0], first[0], 0.5)):
        report = verify(path, parent, [(adapter, scale)])
        assert report.ok and report.remade
    raw = bytearray(other[1].read_bytes())
    raw[-40] ^= 4
    other[1].write_bytes(raw)
    assert verify(other[0], first[0], [(adapter, 0.5)]).verdict == "wrong"


def test_every_flipped_bit_of_a_file_of_ours_is_found(tmp_path):
    case = Merge(tmp_path, "Q4_K", SIZES["Q4_K"], "auto")
    raw, rng = case.merged.read_bytes(), np.random.default_rng(5)
    with GgufReader(case.merged) as reader:
        table = raw.index(b"token_embd.weight")
        norm = reader.tensors["blk.0.attn_norm.weight"]
        places = [*rng.integers(24, table, 4), *rng.integers(table, reader.data_position - 40, 2)]
        places += [reader.data_position - 1] if raw[reader.data_position - 1] == 0 else []
        places += [*rng.integers(reader.data_position, len(raw), 3), reader.data_position + norm.offset + 5]
    keys = [raw.index(key) + len(key) + 16 for key in (b"lora_gguf.version", b"lora_gguf.seed", b"lora_gguf.rounding")]
    keys += [raw.index(b"lora_gguf.adapter.names") + 45, raw.index(b"lora_gguf.metadata_sha256") + 3]
    path = tmp_path / "flipped.gguf"
    assert len(set(places) | set(keys)) >= 15
    for place in [*places, *keys]:
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert verify(path, case.base, [(case.adapter, 1.0)]).verdict == "wrong", (place, bit)
            except Exception as error:
                assert getattr(error, "exit_code", 1) in (3, 4, 5), (place, bit, error)


UPDATES = {
    "f32": lambda a, b: b @ a,
    "f64": lambda a, b: (b.astype(np.float64) @ a.astype(np.float64)).astype(np.float32),
    "another order": lambda a, b: np.ascontiguousarray(b[:, ::-1]) @ np.ascontiguousarray(a[::-1]),
    "half factors": lambda a, b: held_as(b, np.float16) @ held_as(a, np.float16),
    "bf16": lambda a, b: held_as(held_as(b, bfloat16) @ held_as(a, bfloat16), bfloat16),
}
BASE_TYPES, FACTORS = ("F16", "BF16", "Q4_0", "Q8_0"), (1, 30)
HELD = (("F32", "F16"), ("BF16", "BF16"), ("BF16", "Q8_0"), ("F16", "Q4_K"))  # the sum in, the file in
THROUGH = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16}


def held_as(weights, dtype):
    """Weights f32 as a float type holds them."""
    return weights.astype(dtype).astype(np.float32)


def merged_by_others(base, pairs, update, through, type_name):
    """The bytes of a merge in numpy, the base and the sum held in a float type, and then quantized by libgguf."""
    keys, tensors = unpacked(base)
    by_name = {pair.name: pair for pair in pairs}
    for name, (kind, shape, rows) in tensors.items():
        if name not in by_name and (kind == type_name or len(shape) == 1):
            continue
        held = held_as(CODECS[kind].decoded(rows), THROUGH[through])
        if name in by_name:
            pair = by_name[name]
            held = held_as(held + UPDATES[update](pair.a, pair.b), THROUGH[through])
        raw = stored(np.ascontiguousarray(held), type_name).tobytes()
        tensors[name] = [type_name, shape, np.frombuffer(raw, np.uint8).reshape(len(held), -1)]
    return packed(keys, tensors, ours=False)


@pytest.mark.parametrize("base_type", BASE_TYPES)
def test_right_files_of_other_tools_are_never_wrong(tmp_path, base_type):
    base, found = tmp_path / "base.gguf", {}
    write_base(base, base_type)
    for factor in FACTORS:
        pairs = some_pairs(SIZES[base_type] * factor)
        adapter = write_adapter(tmp_path / "adapter.gguf", pairs)
        for update in UPDATES:
            for through, type_name in HELD:
                out = tmp_path / "merged.gguf"
                out.write_bytes(merged_by_others(base, pairs, update, through, type_name))
                report = verify(out, base, [(adapter, 1.0)])
                found[factor, update, through, type_name] = report.verdict
                assert report.verdict != "wrong", (factor, update, through, type_name, report.findings)
    assert found[30, "f32", "F32", "F16"] == found[30, "another order", "F32", "F16"] == "right"


def test_the_promises_count_what_is_tried():
    said = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    n_files = sum(len(chosen(name, rounding)) for name in TYPES for rounding in ("auto", "fresh"))
    assert f"{len(LABELS)} kinds of damage over {len(TYPES)} types, {n_files} wrong files" in said
    assert f"{len(BASE_TYPES) * len(FACTORS) * len(UPDATES) * len(HELD)} merges of other tools' kinds" in said


def test_the_exit_codes_of_the_three_verdicts(tmp_path, capsys):
    case = Merge(tmp_path, "Q4_1", SIZES["Q4_1"], "auto")
    words = ("--base", case.base, "--lora", case.adapter)
    assert run(capsys, "verify", case.merged, *words)[0] == 0
    path = tmp_path / "bare.gguf"
    path.write_bytes(packed(*unpacked(case.merged), ours=False))
    code, _, err = run(capsys, "verify", path, *words)
    assert code == UnprovedError.exit_code == 10 and "cannot be proved" in err and "how it was made" in err
    path.write_bytes(spoiled(case, "a tensor zeroed", ours=False))
    assert run(capsys, "verify", path, *words)[0] == MismatchError.exit_code


@pytest.mark.parametrize("asked", [1e-6, -4e-7, 0.0])
def test_a_small_scale_is_as_exact_as_a_large_one(tmp_path, asked):
    write_base(tmp_path / "base.gguf", "Q4_0")
    strong = write_adapter(tmp_path / "strong.gguf", some_pairs(1e6 * SIZE["Q4_0"]))
    merge(tmp_path / "base.gguf", [(strong, 5e-7)], tmp_path / "merged.gguf")
    assert verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(strong, 5e-7)]).ok
    report = verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(strong, asked)])
    assert report.verdict == "wrong"


@pytest.mark.parametrize("type_name", ["I8", "I32", "F64"])
def test_a_tensor_that_nobody_decodes_is_the_base_s(tmp_path, type_name):
    write_base(tmp_path / "base.gguf", "F16")
    keys, tensors = unpacked(tmp_path / "base.gguf")
    rows = np.arange(64 * BY_NAME[type_name].block_bytes, dtype=np.uint8).reshape(1, -1)
    (tmp_path / "base.gguf").write_bytes(packed(keys, {**tensors, "table": [type_name, (64,), rows]}, ours=True))
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(1e-4))
    merge(tmp_path / "base.gguf", [(adapter, 1.0)], tmp_path / "merged.gguf", Policy("fresh"))
    keys, tensors = unpacked(tmp_path / "merged.gguf")
    path = tmp_path / "another.gguf"
    path.write_bytes(packed(keys, tensors, ours=False))
    assert verify(path, tmp_path / "base.gguf", [(adapter, 1.0)]).ok
    tensors["table"][2] = rows ^ np.uint8(1)
    path.write_bytes(packed(keys, tensors, ours=False))
    report = verify(path, tmp_path / "base.gguf", [(adapter, 1.0)])
    assert [finding.tensors for finding in report.findings] == [("table",)]


def test_the_padding_before_the_data_is_zero(tmp_path):
    case = Merge(tmp_path, "F16", 1e-4, "fresh")
    keys, tensors = unpacked(case.merged)
    named = {**keys, "general.description": text_kv("general.description", "x" * 11)}
    raw = bytearray(packed(named, tensors, ours=False))
    path = tmp_path / "padded.gguf"
    path.write_bytes(raw)
    with GgufReader(path) as reader:
        assert reader.table_end < reader.data_position
        last = reader.data_position - 1
    assert verify(path, case.base, [(case.adapter, 1.0)]).ok
    raw[last] = 7
    path.write_bytes(raw)
    assert verify(path, case.base, [(case.adapter, 1.0)]).verdict == "wrong"


def test_weights_too_small_for_f16_are_no_damage_of_a_merge_in_f16(tmp_path):
    write_base(tmp_path / "base.gguf", "BF16")
    keys, tensors = unpacked(tmp_path / "base.gguf")
    tensors["token_embd.weight"][2][1:3, 5] = 0x33  # the high byte of a bf16 of 4e-8
    (tmp_path / "base.gguf").write_bytes(packed(keys, tensors, ours=True))
    pairs = some_pairs(1e-3)
    adapter, by_name = write_adapter(tmp_path / "adapter.gguf", pairs), {pair.name: pair for pair in pairs}
    for name, (kind, shape, rows) in tensors.items():
        if len(shape) == 2:
            held = CODECS[kind].decoded(rows)
            if name in by_name:
                held = held + by_name[name].b @ by_name[name].a
            halves = held_as(held_as(held, np.float16), bfloat16)
            tensors[name][2] = np.frombuffer(stored(halves, kind).tobytes(), np.uint8).reshape(len(rows), -1)
    (tmp_path / "merged.gguf").write_bytes(packed(keys, tensors, ours=False))
    report = verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(adapter, 1.0)])
    assert report.verdict == "right"


@pytest.mark.parametrize("scale", [0.998, 1.003])
@pytest.mark.parametrize("type_name", ["F16", "BF16", "F32"])
def test_halves_do_not_hide_another_scale(tmp_path, type_name, scale):
    write_base(tmp_path / "base.gguf", "F16")
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(1e-3))
    for factor, verdict in ((1.0, "right"), (scale, "unproved")):
        policy = Policy("fresh", type=type_name)
        merge(tmp_path / "base.gguf", [(adapter, factor)], tmp_path / "merged.gguf", policy, force=True)
        bare = tmp_path / "bare.gguf"
        bare.write_bytes(packed(*unpacked(tmp_path / "merged.gguf"), ours=False))
        assert verify(bare, tmp_path / "base.gguf", [(adapter, 1.0)]).verdict == verdict


@pytest.mark.parametrize("row", [0, 5, -1])
def test_a_strong_update_does_not_hide_one_bit(tmp_path, row):
    case = Merge(tmp_path, "F16", 2e-2, "fresh")
    keys, tensors = unpacked(case.merged)
    tensors["blk.1.ffn_up.weight"][2][row, ::64] ^= 1
    path = tmp_path / "wrong.gguf"
    path.write_bytes(packed(keys, tensors, ours=False))
    assert verify(path, case.base, [(case.adapter, 1.0)]).verdict != "right"


def resealed(pairs):
    """Key/value pairs with a seal that fits them."""
    raw = sealed([pair for key, pair in pairs.items() if key != SEAL])
    return {str(number): pair for number, pair in enumerate(raw)}


def test_a_seal_that_fits_proves_no_more_than_the_rest(tmp_path):
    case = Merge(tmp_path, "Q8_0", SIZES["Q8_0"], "auto")
    pairs, tensors = unpacked(case.merged)
    true = hashlib.sha256(case.base.read_bytes()).hexdigest()
    key, last = "lora_gguf.base.sha256", "lora_gguf.metadata_sha256"
    files = {digest: key_value(key, [digest], "str") for digest in (true, "0" * 64)}
    before = dict(list(pairs.items())[: list(pairs).index("lora_gguf.rounding")])
    after = {name: pair for name, pair in pairs.items() if name not in before and name != last}
    edited = {
        "right": [pairs, {**before, key: files[true], **after}],
        "wrong": [{**before, key: files["0" * 64], **after}, dict(reversed(pairs.items()))],
        "unproved": [{**pairs, "lora_gguf.seed": key_value("lora_gguf.seed", -1, "i64")}],
    }
    path = tmp_path / "edited.gguf"
    for verdict, edits in edited.items():
        for edit in edits:
            path.write_bytes(packed(resealed(edit), tensors, ours=True))
            assert verify(path, case.base, [(case.adapter, 1.0)]).verdict == verdict, list(edit)
