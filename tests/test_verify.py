"""Files that hold what they should, and files that are wrong in each of the ways that verify names."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.api import verify
from lora_gguf.cli import execute
from lora_gguf.cli.tables import verify_table
from lora_gguf.errors import MismatchError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import raw_key_values
from lora_gguf.files.imatrix import Imatrix
from lora_gguf.mapping.hparams import from_config
from lora_gguf.merging.options import ROUNDINGS, Policy
from lora_gguf.merging.tensor import NO_IMPORTANCE
from lora_gguf.quants.table import CODECS
from tests import tiny
from tests.calls import merge
from tests.common import FIXTURES, pack_gguf, smollm2_path, text_kv, u32_kv
from tests.test_merge import stored

TYPES = ("Q4_0", "Q4_K", "Q8_0", "F16")
SHAPES = {"attn_q": (128, 256), "attn_k": (64, 256), "attn_v": (64, 256), "ffn_up": (256, 256), "ffn_down": (256, 256)}
N_LAYERS, N_HEADS, N_KV_HEADS = 3, 4, 2
# of an update, so that it is about 0.05 of a step
SIZE = {"Q4_0": 2e-4, "Q4_K": 2e-4, "Q8_0": 1e-5, "F16": 5e-7, "Q4_1": 2e-4}


def write_base(path, type_name, seed=0, vocab=64):
    rng = np.random.default_rng(seed)

    def tensor(name, shape, type_name):
        weights = (rng.normal(size=shape) * 0.02).astype(np.float32)
        return (name, type_name, shape, stored(weights.reshape(-1, shape[-1]), type_name).tobytes())

    tensors = [tensor("token_embd.weight", (vocab, 256), type_name), tensor("output_norm.weight", (256,), "F32")]
    for layer in range(N_LAYERS):
        tensors += [tensor(f"blk.{layer}.{kind}.weight", shape, type_name) for kind, shape in SHAPES.items()]
        tensors += [tensor(f"blk.{layer}.{kind}.weight", (256,), "F32") for kind in ("attn_norm", "ffn_norm")]
    hparams = {"block_count": N_LAYERS, "attention.head_count": N_HEADS, "attention.head_count_kv": N_KV_HEADS}
    hparams |= {"embedding_length": 256, "attention.key_length": 32}
    key_values = [text_kv("general.architecture", "llama")] + [u32_kv(f"llama.{key}", n) for key, n in hparams.items()]
    path.write_bytes(pack_gguf(key_values, tensors))


def some_pairs(size, seed=1, rank=4, names=None) -> list[LoraPair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for name, (n_out, n_in) in (
        names or {f"blk.{i}.{k}.weight": s for i in range(N_LAYERS) for k, s in SHAPES.items()}
    ).items():
        a = rng.normal(size=(rank, n_in)).astype(np.float32)
        pairs.append(LoraPair(name, a, (rng.normal(size=(n_out, rank)) * size).astype(np.float32), 1.0))
    return pairs


def write_adapter(path, pairs):
    write_adapter_gguf(path, pairs, "llama", "f32", force=True)
    return path


class Case:
    """A base, an adapter, and their merge, of one type, in a folder."""

    def __init__(self, folder, type_name):
        self.folder, self.type_name = folder, type_name
        self.base, self.merged = folder / "base.gguf", folder / "merged.gguf"
        write_base(self.base, type_name)
        self.pairs = some_pairs(SIZE[type_name])
        self.adapter = write_adapter(folder / "adapter.gguf", self.pairs)
        self.merge(self.adapter)

    def merge(self, adapter, scale=1.0, out=None, base=None, **policy):
        merge(base or self.base, [(adapter, scale)], out or self.merged, Policy(**policy), force=True)
        return out or self.merged

    def other(self, pairs, **options):
        """The base merged with another adapter of these pairs, beside the right one."""
        return self.merge(
            write_adapter(self.folder / "other.gguf", pairs), out=self.folder / "other-merged.gguf", **options
        )

    def verify(self, merged=None, adapters=None):
        return verify(merged or self.merged, self.base, adapters or [(self.adapter, 1.0)])

    def graft(self, names, source, target=None):
        """A copy of ``target`` (the right merge) with the tensors ``names`` as they are in ``source``."""
        out = self.folder / f"grafted-{len(list(self.folder.iterdir()))}.gguf"
        shutil.copy(target or self.merged, out)
        with GgufReader(source) as donor, GgufReader(out) as reader, open(out, "r+b") as file:
            for name in names:
                file.seek(reader.data_position + reader.tensors[name].offset)
                file.write(donor.read(donor.tensors[name]).tobytes())
        return out


@pytest.fixture(scope="module", params=TYPES)
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def stripped(path):
    """A copy of a file without the keys that say how it was made, as if another tool had."""
    with GgufReader(path) as reader:
        tensors = [(name, info.type.name, info.shape, reader.read(info)) for name, info in reader.tensors.items()]
        pairs = [raw for key, raw in zip(reader.kv, raw_key_values(reader)) if not key.startswith("lora_gguf.")]
    out = path.with_name(f"stripped-{path.name}")
    out.write_bytes(pack_gguf(pairs, tensors))
    return out


def only(report, cause):
    """The single finding of a report, which must be ``cause``."""
    assert [finding.cause for finding in report.findings] == [cause], "\n".join(map(str, report.findings))
    return report.findings[0]


def test_a_right_merge_holds(case):
    report = case.verify()
    assert report.ok and not report.notes and 0.8 < report.whole.kept < 1.2
    assert len(report.adapted) == N_LAYERS * len(SHAPES)
    assert report.verdict == "right" and report.remade and all(check.proved for check in report.checks)


def test_the_base_itself(case):
    finding = only(case.verify(case.base), "not merged")
    assert "all 15 adapted tensors as in the base, byte for byte: kept 0.00" in str(finding)


@pytest.mark.parametrize("scale", [0.5, 2.0, 0.25])
def test_another_scale(case, scale):
    finding = only(case.verify(case.merge(case.adapter, scale, case.folder / "scaled.gguf")), "scale")
    told = len(finding.tensors) == 15 or case.type_name == "Q8_0"  # there the recorded scale alone may tell
    assert abs(float(finding.found.split()[0]) - scale) < 0.1 and told


def test_the_opposite_sign(case):
    assert "-1.0" in only(case.verify(case.merge(case.adapter, -1.0, case.folder / "minus.gguf")), "sign").found


def test_another_adapter(case):
    finding = only(case.verify(case.other(some_pairs(SIZE[case.type_name], seed=99))), "other adapter")
    assert "kept" in finding.found and len(finding.tensors) == 15


def rows_in_order(pair, order_of):
    heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}.get(pair.name.split(".")[2])
    if not heads:
        return pair
    order = np.arange(len(pair.b)).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
    return replace(pair, b=pair.b[order_of(order)])


@pytest.mark.parametrize("order_of", [np.argsort, np.asarray], ids=["left out", "twice"])
def test_q_and_k_in_another_order(case, order_of):
    finding = only(case.verify(case.other([rows_in_order(pair, order_of) for pair in case.pairs])), "row order")
    turned = {f"blk.{i}.attn_{k}.weight" for i in range(N_LAYERS) for k in "qk"}
    assert set(finding.tensors) <= turned and len(finding.tensors) >= len(turned) // 2
    assert "rotary permutation" in str(finding)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.0.attn_v.weight"])
def test_a_tensor_left_out(case, name):
    assert only(case.verify(case.graft([name], case.base)), "skipped").tensors == (name,)


def test_several_wrongs_at_once(case):
    names = ("blk.0.ffn_up.weight", "blk.2.attn_k.weight")
    other = case.merge(case.adapter, -2.0, case.folder / "minus.gguf")
    report = case.verify(case.graft(["blk.1.attn_q.weight"], other, case.graft(names, case.base)))
    kind = "damaged" if case.type_name == "F16" else "scale"  # a faint update in halves tells no factor
    assert {finding.cause: finding.tensors for finding in report.findings} == {
        "skipped": names,
        kind: ("blk.1.attn_q.weight",),
    }
    assert "2 tensors, such as blk.0.ffn_up.weight: expected the update in it" in "\n".join(map(str, report.findings))
    assert sorted(check.name for check in report.checks if not check.holds) == sorted([*names, "blk.1.attn_q.weight"])


@pytest.mark.parametrize("name", ["blk.1.ffn_norm.weight", "token_embd.weight"])
def test_an_untouched_tensor_changed(case, name):
    out = case.graft([], case.base)
    with GgufReader(out) as reader:
        at = reader.data_position + reader.tensors[name].offset + 2 * 256
    raw = bytearray(out.read_bytes())
    raw[at + 1] ^= 1
    out.write_bytes(raw)
    finding = only(case.verify(out), "changed")
    assert finding.tensors == (name,) and "1 bytes that differ" in finding.found


def test_another_base(case):
    write_base(case.folder / "base2.gguf", case.type_name, seed=5)
    out = case.merge(case.adapter, out=case.folder / "merged2.gguf", base=case.folder / "base2.gguf")
    assert "of 8 changed" in only(case.verify(out), "other base").found


def test_a_matrix_transposed(case):
    turned = [
        replace(pair, a=np.ascontiguousarray(pair.b.T), b=np.ascontiguousarray(pair.a.T))
        if "ffn" in pair.name
        else pair
        for pair in case.pairs
    ]
    assert len(only(case.verify(case.other(turned)), "transposed").tensors) == 6


def test_updates_of_two_tensors_swapped(case):
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    kinds = {kind: swap.get(kind, kind) for kind in SHAPES}
    swapped = [
        replace(p, name=p.name.replace(kind, kinds[kind])) for p in case.pairs for kind in SHAPES if kind in p.name
    ]
    assert len(only(case.verify(case.other(swapped)), "other tensor").tensors) == 6


def test_damaged_blocks_of_an_adapted_tensor(case):
    out = case.graft([], case.base)
    with GgufReader(out) as reader:
        info = reader.tensors["blk.0.ffn_up.weight"]
        at = reader.data_position + info.offset + 20 * info.row_bytes
        middle = info.type.block_bytes // 2 if info.type.block_size > 1 else 1
    raw = bytearray(out.read_bytes())
    raw[at + middle] ^= 0x5A
    out.write_bytes(raw)
    assert only(case.verify(out), "damaged").tensors == ("blk.0.ffn_up.weight",)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_all_scales_of_a_tensor_wrong(case, factor):
    """That auto moves scales where single columns matter excuses no tensor whose scales all moved."""
    codec = CODECS[case.type_name]
    if not codec.scales_at:
        pytest.skip("has no scales")
    out = stripped(case.graft([], case.base))
    with GgufReader(out) as reader:
        info = reader.tensors["blk.0.ffn_up.weight"]
        blocks = reader.read(info).reshape(-1, codec.type.block_bytes).copy()
        at = reader.data_position + info.offset
    scales = slice(codec.scales_at[0], codec.scales_at[0] + 2)
    blocks[:, scales] = (np.ascontiguousarray(blocks[:, scales]).view(np.float16) * np.float16(factor)).view(np.uint8)
    raw = bytearray(out.read_bytes())
    raw[at : at + blocks.size] = blocks.tobytes()
    out.write_bytes(raw)
    assert only(case.verify(out), "damaged").tensors == ("blk.0.ffn_up.weight",)


@pytest.mark.parametrize("rounding", ["nearest", "fresh"])
def test_erased_by_rounding_is_neither_corrupt_nor_right(case, rounding):
    larger = write_adapter(case.folder / "larger.gguf", some_pairs(SIZE[case.type_name] * 3))
    out = case.merge(larger, out=case.folder / "rounded.gguf", rounding=rounding)
    report = case.verify(out, [(larger, 1.0)])
    assert report.remade and not report.findings and report.whole.kept < 0.8
    if report.whole.kept < 0.4:
        assert report.verdict == "unproved" and "smaller than its type can show" in report.missing[0]
    assert f"kept {report.whole.kept:.2f}" in report.notes[0]


def test_one_tensor_rounded_away(case):
    larger = write_adapter(
        case.folder / "larger.gguf", some_pairs(SIZE[case.type_name] * (1 if case.type_name == "F16" else 1.6))
    )
    right = case.merge(larger, out=case.folder / "dithered.gguf")
    nearest = case.merge(larger, out=case.folder / "rounded.gguf", rounding="nearest")
    finding = only(case.verify(case.graft(["blk.2.attn_q.weight"], nearest, right), [(larger, 1.0)]), "rounded away")
    assert finding.tensors == ("blk.2.attn_q.weight",)


@pytest.mark.parametrize(
    ("factors", "cause", "says"),
    [
        ((1.0, 1.0), None, ""),
        ((1.0, 0.0), "scale", r"-?0\.0\d times adapter 2 \(second\)"),
        ((-1.0, 1.0), "sign", r"-(0\.9|1\.0)\d times adapter 1 \(adapter\)"),
        ((0.5, 1.0), "scale", r"0\.\d\d times adapter 1 \(adapter\)|0\.5, 1"),
    ],
)
def test_several_adapters(case, factors, cause, says):
    second = write_adapter(case.folder / "second.gguf", some_pairs(SIZE[case.type_name] * 1.5, seed=7)[:9])
    both = [case.adapter, second]
    merge(case.base, list(zip(both, factors)), case.folder / "both.gguf", force=True)
    report = case.verify(case.folder / "both.gguf", [(path, 1.0) for path in both])
    if cause is None:
        assert report.ok
    else:
        assert re.fullmatch(says, only(report, cause).found)


def test_an_adapter_that_the_file_records_and_nobody_named(case):
    second = write_adapter(case.folder / "second.gguf", some_pairs(SIZE[case.type_name] * 1.5, seed=7)[:9])
    out = case.folder / "both.gguf"
    merge(case.base, [(case.adapter, 1.0), (second, 0.5)], out, force=True)
    for named, other in ((case.adapter, "second at scale 0.5"), (second, "adapter at scale 1")):
        finding = only(case.verify(out, [(named, 1.0)]), "more adapters")
        assert finding.found == f"{other} too" and "--lora" in str(finding)
    finding = only(case.verify(case.merged, [(case.adapter, 1.0), (second, 0.5)]), "fewer adapters")
    assert finding.found == "only adapter"


def test_the_table_proves_nothing_of_a_file_that_is_not_proved(case):
    nearest = case.merge(case.adapter, out=case.folder / "nearest.gguf", rounding="nearest")
    report = case.verify(nearest)
    if report.verdict == "unproved":
        rows = verify_table(report).splitlines()[1:-1]  # without the head, and the tensors that no adapter touches
        assert all("unproved" in row for row in rows)
        assert "merge with --rounding auto" in report.missing[0] and "--type" not in report.missing[0]


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.06])
def test_the_share_kept_has_the_error_that_is_stated(tmp_path, scale):
    """Update / step is 0.05 to 0.003 here; z is kept's distance from 1 in standard errors."""
    write_base(tmp_path / "base.gguf", "Q4_0", vocab=1)
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(SIZE["Q4_0"]))
    z = []
    for seed in range(8):
        merge(tmp_path / "base.gguf", [(adapter, scale)], tmp_path / "merged.gguf", Policy("dither", seed), force=True)
        bare = stripped(tmp_path / "merged.gguf")
        report = verify(bare, tmp_path / "base.gguf", [(adapter, scale)])
        assert report.verdict == "unproved" and not report.remade
        found = [check.comparison for check in report.adapted]
        z += [(sums.kept - sums.dithered) / sums.standard_error for sums in found]
    assert abs(np.mean(z)) < 5 / np.sqrt(len(z)) and 0.8 < np.std(z) < 1.2


def test_tiny_updates_of_a_small_tensor_are_not_misjudged(tmp_path):
    """A single tensor whose codes hardly move: no right file is refused, and one that chance cannot explain is."""
    names = {"blk.0.attn_k.weight": (64, 256)}
    write_base(tmp_path / "base.gguf", "Q4_0", vocab=1)
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(SIZE["Q4_0"] / 10, names=names))
    for seed in range(15):
        merge(tmp_path / "base.gguf", [(adapter, 1.0)], tmp_path / "merged.gguf", Policy("dither", seed), force=True)
        assert verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(adapter, 1.0)]).ok
    merge(tmp_path / "base.gguf", [(adapter, -10.0)], tmp_path / "merged.gguf", force=True)
    assert not verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(adapter, 1.0)]).ok


@pytest.mark.parametrize("size", [0.2, 10])
def test_every_rounding_of_updates_of_every_size(case, size):
    adapter = write_adapter(case.folder / "sized.gguf", some_pairs(SIZE[case.type_name] * size))
    for rounding in ROUNDINGS:
        report = case.verify(
            case.merge(adapter, out=case.folder / "sized-merged.gguf", rounding=rounding), [(adapter, 1.0)]
        )
        erased = report.verdict == "unproved" and rounding in ("nearest", "fresh")
        assert report.ok or erased, (rounding, report.findings)
    out = case.merge(adapter, 0.5, case.folder / "sized-merged.gguf", rounding=ROUNDINGS[0])
    assert only(case.verify(out, [(adapter, 1.0)]), "scale")


@pytest.mark.parametrize(
    "type_name", ["F32", "BF16", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ2_0"]
)
def test_other_types(tmp_path, type_name):
    write_base(tmp_path / "base.gguf", type_name, vocab=1)
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(SIZE.get(type_name, 2e-4)))
    for scale, cause in ((1.0, []), (0.5, ["scale"]), (-1.0, ["sign"])):
        merge(tmp_path / "base.gguf", [(adapter, scale)], tmp_path / "merged.gguf", Policy("dither"), force=True)
        report = verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [(adapter, 1.0)])
        assert [finding.cause for finding in report.findings] == cause, (scale, report.findings)


@pytest.mark.parametrize("policy", [{"type": "Q8_0"}, {"type": "BF16"}, {"type": "Q6_K"}])
def test_promoted_tensors(case, policy):
    adapter = write_adapter(case.folder / "larger.gguf", some_pairs(SIZE["Q4_0"]))
    for scale, cause in ((1.0, []), (0.5, ["scale"])):
        out = case.merge(adapter, scale, case.folder / "promoted.gguf", **policy)
        report = case.verify(out, [(adapter, 1.0)])
        assert [finding.cause for finding in report.findings] == cause, (scale, report.findings)


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "Q2_K"])
def test_quantized_on_the_way(tmp_path, mix):
    write_base(tmp_path / "base.gguf", "F16")
    adapter = write_adapter(tmp_path / "adapter.gguf", some_pairs(2e-4))
    base, out = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    merge(base, [(adapter, 1.0)], out, Policy(mix=mix))
    report = verify(out, base, [(adapter, 1.0)])
    assert report.ok and report.as_dict()["untouched"]["requantized"] == ["token_embd.weight"]
    merge(base, [(adapter, 0.5)], out, Policy(mix=mix), force=True)
    assert only(verify(out, base, [(adapter, 1.0)]), "scale")
    write_base(tmp_path / "base2.gguf", "F16", seed=3)
    merge(tmp_path / "base2.gguf", [(adapter, 1.0)], out, Policy(mix=mix), force=True)
    assert only(verify(out, base, [(adapter, 1.0)]), "other base")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_merge_of_ours_is_made_again(case, rounding):
    out = case.merge(case.adapter, out=case.folder / "again.gguf", seed=7, rounding=rounding)
    report = case.verify(out)
    assert report.remade and not report.findings and all(check.proved for check in report.checks)
    assert not case.verify(case.merge(case.adapter, 1.5, case.folder / "again.gguf")).ok


def test_the_importance_matrix_of_the_merge_is_asked_for(case):
    with Base(case.base) as base:
        columns = {
            name: np.ones((1, info.n_cols), np.float32) for name, info in base.tensors.items() if len(info.shape) == 2
        }
    for values in columns.values():
        values[:, ::7] = 100
    imatrix = Imatrix("some.imatrix", columns)
    out = case.merge(case.adapter, out=case.folder / "again.gguf", imatrix=imatrix)
    report = case.verify(out)
    assert report.verdict == "unproved" and "--imatrix" in report.missing[0] and "some.imatrix" in report.missing[0]
    report = verify(out, case.base, [(case.adapter, 1.0)], imatrix=imatrix)
    assert report.ok and not report.notes and all(check.proved for check in report.adapted)


def rewritten(case, change):
    """The right merge with its (key/values, tensors) changed."""
    with GgufReader(case.merged) as reader:
        tensors = [(name, info.type.name, info.shape, reader.read(info)) for name, info in reader.tensors.items()]
        raw = change(raw_key_values(reader), tensors)
    out = case.folder / "rewritten.gguf"
    out.write_bytes(pack_gguf(*raw))
    return out


def test_a_tensor_missing_or_too_many(case):
    out = rewritten(case, lambda keys, tensors: (keys, tensors[:-1]))
    assert "blk.2.ffn_norm.weight: expected (256,), found none" in str(only(case.verify(out), "shape"))
    out = rewritten(case, lambda keys, tensors: (keys, [*tensors, ("rope_freqs.weight", "F32", (4,), bytes(16))]))
    assert "rope_freqs.weight: expected no such tensor, found (4,)" in str(only(case.verify(out), "shape"))


def test_other_metadata(case):
    def change(keys, tensors):
        return [
            u32_kv("llama.attention.head_count", 8) if b"head_count" in key and b"kv" not in key else key
            for key in keys
        ], tensors

    assert "the base's llama.attention.head_count" in str(only(case.verify(rewritten(case, change)), "metadata"))


def test_not_a_number(case):
    with GgufReader(case.merged) as reader:
        at = reader.data_position + reader.tensors["blk.0.ffn_up.weight"].offset
    raw = bytearray(case.merged.read_bytes())
    raw[at : at + 2] = np.float16(np.nan).tobytes()
    (case.folder / "nan.gguf").write_bytes(raw)
    assert "NaN" in only(case.verify(case.folder / "nan.gguf"), "damaged").found


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name not in ("bert", "falcon-h1")])
def test_pefts_own_merge_holds_in_every_architecture(tmp_path, name):
    base, model = tiny.base_gguf(tmp_path, name), from_config(tiny.config_of(name))
    weights = tiny.tensors_of(name, model) | tiny.tensors_of(name, model, "merged")
    merged = tiny.write_gguf(tmp_path / "merged.gguf", name, weights)
    report = verify(merged, base, [(tiny.TINY / name / "adapter", 1.0)])
    assert report.ok, report.findings
    assert all(abs(check.comparison.kept - 1) < 0.01 for check in report.adapted)
    if name in ("llama", "gemma3"):
        assert only(verify(merged, base, [(tiny.TINY / name / "adapter", 0.5)]), "scale").found == "2.00 times it"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2, and an adapter of 42 of its linear layers whose update is about 0.02 of a step; merged rightly."""
    folder = tmp_path_factory.mktemp("smollm2")
    with GgufReader(smollm2_path()) as reader:
        matrices = [info for name, info in reader.tensors.items() if name.startswith("blk.") and len(info.shape) == 2]
        names = {info.name: info.shape for info in matrices if int(info.name.split(".")[1]) < 6}
    pairs = some_pairs(2e-4, rank=8, names=names)
    adapter = write_adapter(folder / "adapter.gguf", pairs)
    merge(smollm2_path(), [(adapter, 1.0)], folder / "merged.gguf")
    return folder, adapter, pairs


def test_smollm2_holds(smollm2):
    folder, adapter, pairs = smollm2
    report = verify(folder / "merged.gguf", smollm2_path(), [(adapter, 1.0)])
    assert report.ok and report.remade and len(report.adapted) == 42
    bare = verify(stripped(folder / "merged.gguf"), smollm2_path(), [(adapter, 1.0)])
    assert bare.verdict == "unproved" and "does not say how it was made" in bare.missing[0]
    assert abs(bare.whole.kept - bare.whole.dithered) < 5 * bare.whole.standard_error


@pytest.fixture(scope="module")
def smollm2_of(tmp_path_factory):
    """SmolLM2 with its linear layers in another type."""

    def make(type_name):
        path = tmp_path_factory.mktemp(type_name) / "base.gguf"
        with GgufReader(smollm2_path()) as reader:
            tensors = []
            for name, info in reader.tensors.items():
                fits = info.n_cols % CODECS[type_name].type.block_size == 0
                data, codec = reader.read(info), CODECS[type_name if fits else "Q5_0"]
                if info.type.name == "Q4_1":
                    data = codec.encoded(CODECS["Q4_1"].decoded(data.reshape(info.n_rows, -1)), NO_IMPORTANCE)
                tensors.append(
                    (name, codec.type.name if info.type.name == "Q4_1" else info.type.name, info.shape, data)
                )
            path.write_bytes(pack_gguf(raw_key_values(reader), tensors))
        return path

    return make


@pytest.mark.parametrize(("type_name", "scale"), [("Q4_K", 1.0), ("Q4_K", 4.0), ("Q8_0", 1.0)])
def test_a_merge_by_auto_that_says_nothing_is_not_called_wrong(smollm2_of, tmp_path, type_name, scale):
    """A real adapter, and a grid that moves where single columns matter."""
    base, adapters = smollm2_of(type_name), [(FIXTURES / "perl-adapter", scale)]
    merge(base, adapters, tmp_path / "merged.gguf")
    bare = verify(stripped(tmp_path / "merged.gguf"), base, adapters)
    assert bare.verdict == "unproved", bare.findings


@pytest.mark.parametrize(
    ("change", "scale", "cause", "n"),
    [
        (None, 0.5, "scale", 42),
        (None, -1.0, "sign", 42),
        (lambda pairs: some_pairs(2e-4, 9, 8, {pair.name: pair.shape for pair in pairs}), 1.0, "other adapter", 42),
        (lambda pairs: [unturned(pair) for pair in pairs], 1.0, "row order", 12),
        (lambda pairs: [pair for pair in pairs if pair.name != "blk.3.attn_k.weight"], 1.0, "skipped", 1),
    ],
    ids=["half the scale", "sign", "other adapter", "row order", "skipped"],
)
def test_smollm2_merged_wrongly(smollm2, change, scale, cause, n):
    folder, adapter, pairs = smollm2
    wrong = write_adapter(folder / "wrong.gguf", change(pairs)) if change else adapter
    merge(smollm2_path(), [(wrong, scale)], folder / "wrong-merged.gguf", force=True)
    assert len(only(verify(folder / "wrong-merged.gguf", smollm2_path(), [(adapter, 1.0)]), cause).tensors) == n


def unturned(pair):
    heads = {"attn_q": 9, "attn_k": 3}.get(pair.name.split(".")[2])
    if not heads:
        return pair
    return replace(pair, b=pair.b[np.argsort(np.arange(len(pair.b)).reshape(heads, 2, -1).swapaxes(1, 2).ravel())])


def test_smollm2_is_not_its_own_merge(smollm2):
    _, adapter, _ = smollm2
    assert only(verify(smollm2_path(), smollm2_path(), [(adapter, 1.0)]), "not merged")


def test_the_command_says_so_by_its_exit_code(case, capsys):
    arguments = ["verify", str(case.merged), "--base", str(case.base), "--lora"]
    assert execute([*arguments, str(case.adapter)]) == 0
    captured = capsys.readouterr()
    assert "attn_q" in captured.out and "proved" in captured.out
    assert execute([*arguments, f"{case.adapter}:2"]) == MismatchError.exit_code
    captured = capsys.readouterr()
    assert len([line for line in captured.err.splitlines() if "error" in line]) == 1
    expected = (
        r"merged.gguf: 15 tensors, such as blk.0.attn_q.weight: expected the adapter's update, found 0.\d\d times it"
    )
    assert re.search(expected, captured.err)


def test_the_command_as_json(case, capsys):
    arguments = ["verify", str(case.base), "--base", str(case.base), "--lora", str(case.adapter), "--json"]
    assert execute(arguments) == MismatchError.exit_code
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["findings"][0]["cause"] == "not merged" and report["kept"] == 0
    assert len(report["tensors"]) == 15 and report["untouched"]["identical"] == 8
