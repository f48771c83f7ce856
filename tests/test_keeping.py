"""What merge and doctor say of an update that is nothing, or of which little is kept."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from libgguf import quantize_rows
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.lora import LoraPair, write_adapter_gguf
from lora_gguf.commands.doctor import doctor
from lora_gguf.errors import NumericError
from lora_gguf.merging.options import Policy
from lora_gguf.quants.ggml import BY_NAME
from tests import tiny
from tests.calls import merge
from tests.common import FIXTURES, pack_gguf, smollm2_path, text_kv, u32_kv
from tests.test_cli import run
from tests.test_merge import base_and_adapter

PERL = FIXTURES / "perl-adapter"


def changed(folder, source, change=lambda name, array: array, **config):
    """A copy of an adapter with other weights and fields."""
    folder.mkdir()
    fields = json.loads((source / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    weights = load_file(source / "adapter_model.safetensors")
    save_file({name: change(name, array) for name, array in weights.items()}, folder / "adapter_model.safetensors")
    return folder


def without_b(name, array):
    return np.zeros_like(array) if "lora_B" in name else array


def without_a(name, array):
    return np.zeros_like(array) if "lora_A" in name else array


IDLE = {
    "lora_B is zero": (dict(change=without_b), 1.0),
    "lora_A is zero": (dict(change=without_a), 1.0),
    "lora_alpha is 0": (dict(lora_alpha=0), 1.0),
    "the scale is 0": ({}, 0.0),
    "the scale is next to 0": ({}, 1e-9),
}


@pytest.mark.parametrize("name", IDLE)
def test_an_adapter_that_changes_nothing_is_not_praised(tmp_path, capsys, name):
    changes, scale = IDLE[name]
    adapter = changed(tmp_path / "idle", PERL, **changes)
    base, out = smollm2_path(), tmp_path / "out.gguf"
    code, table, err = run(capsys, "merge", base, adapter, "-o", out, "--scale", scale)
    assert code == 0 and len(re.findall(r"warning: .*(changes nothing|nothing changes)", err)) == 1
    if name != "the scale is next to 0":
        assert re.search(r"all merged +\d+ +n/a", table) and "1.000" not in table
    code, _, err = run(capsys, "merge", base, adapter, "-o", out, "--scale", scale, "--min-retention", "0.9", "--force")
    assert code == NumericError.exit_code and "nothing to keep" in err
    code, page, _ = run(capsys, "doctor", base, adapter, "--scale", scale)
    assert code == 0 and "merge with the defaults" not in page and "nothing changes" in page.splitlines()[-1]
    code, data, _ = run(
        capsys,
        "merge",
        base,
        adapter,
        "-o",
        out,
        "--scale",
        scale,
        "--json",
        "--force",
        "--report",
        tmp_path / "p.html",
    )
    kept = json.loads(data)["all"]["kept"]
    assert code == 0 and (kept is None or name == "the scale is next to 0")
    report = doctor(base, [(adapter, scale)])
    assert json.loads(json.dumps(report.as_dict(), allow_nan=True))


def test_a_dry_run_says_it_too(tmp_path, capsys):
    code, _, err = run(capsys, "merge", smollm2_path(), PERL, "--scale", "0", "--dry-run")
    assert code == 0 and "perl-adapter at scale 0 changes nothing" in err


def test_of_several_adapters_the_idle_one_is_named(tmp_path):
    idle = changed(tmp_path / "idle", PERL, without_b)
    report = merge(smollm2_path(), [(PERL, 1.0), (idle, 1.0)], tmp_path / "out.gguf")
    assert any(warning.startswith("idle at scale 1 changes nothing") for warning in report.plan.warnings)
    assert report.whole.kept > 0.9


def test_adapters_that_cancel_are_nothing(tmp_path):
    report = merge(smollm2_path(), [(PERL, 1.0), (PERL, -1.0)], tmp_path / "out.gguf")
    assert any("nothing changes" in warning for warning in report.plan.warnings)


def test_ia3_of_ones_is_nothing(tmp_path):
    source = FIXTURES / "kinds" / "ia3"
    adapter = changed(tmp_path / "ones", source, lambda _, array: np.ones_like(array))
    base = tiny.base_gguf(tmp_path, (source / "base").read_text())
    report = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf")
    assert any("nothing changes" in warning for warning in report.plan.warnings)
    with pytest.raises(NumericError, match="nothing to keep"):
        merge(base, [(adapter, 1.0)], tmp_path / "two.gguf", min_retention=0.5)


def test_new_tokens_alone_are_not_nothing(tmp_path):
    source = FIXTURES / "kinds" / "new-tokens-only"
    base = tiny.base_gguf(tmp_path, (source / "base").read_text())
    report = merge(base, [(source, 1.0)], tmp_path / "out.gguf", min_retention=0.9)
    assert not any("nothing" in warning for warning in report.plan.warnings)


@pytest.mark.parametrize("goal", [0.98, 0.99])
def test_the_remedy_reaches_the_figure_that_was_asked_for(tmp_path, goal):
    with pytest.raises(NumericError) as caught:
        merge(smollm2_path(), [(PERL, 1.0)], tmp_path / "out.gguf", min_retention=goal)
    said = re.search(r"--type (\w+) would keep about (\d\.\d+)", str(caught.value))
    assert float(said[2]) >= goal and "--rounding auto" not in str(caught.value)
    report = merge(smollm2_path(), [(PERL, 1.0)], tmp_path / "out.gguf", Policy(type=said[1]), min_retention=goal)
    assert report.whole.kept >= goal


def test_a_figure_that_nothing_reaches_is_said_to_be_one(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0", size=2e-7)
    with pytest.raises(NumericError, match=r"no other rounding or type keeps 0.9999"):
        merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", min_retention=0.9999)


def two_kinds(folder):
    """A base of a Q4_0 tensor and a Q2_K one, and an adapter whose update of the second is far below its steps."""
    rng = np.random.default_rng(0)
    tensors, pairs = [], []
    for name, type_name, size in (("ffn_up", "Q4_0", 2e-3), ("ffn_down", "Q2_K", 1e-5)):
        weights = (rng.normal(size=(256, 512)) * 0.02).astype(np.float32)
        raw = bytes(quantize_rows(weights, BY_NAME[type_name].id))
        tensors.append((f"blk.0.{name}.weight", type_name, weights.shape, raw))
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 512), (256, 4)))
        pairs.append(LoraPair(f"blk.0.{name}.weight", a, b * np.float32(size), 1.0))
    head = [text_kv("general.architecture", "llama"), u32_kv("llama.block_count", 1)]
    (folder / "base.gguf").write_bytes(pack_gguf([*head, u32_kv("llama.attention.head_count", 2)], tensors))
    write_adapter_gguf(folder / "adapter.gguf", pairs, "llama", "f32")
    return folder / "base.gguf", folder / "adapter.gguf"


def test_a_kind_that_keeps_little_is_not_hidden_in_the_whole(tmp_path):
    base, adapter = two_kinds(tmp_path)
    report = merge(base, [(adapter, 1.0)], tmp_path / "out.gguf", Policy("nearest"))
    assert report.whole.kept > 0.8
    (warning,) = report.plan.warnings
    assert re.search(r"only 0\.\d+ of the update of ffn_down \(Q2_K\) was kept, and 0\.9\d of the whole: ", warning)
    said = re.search(r"--(rounding|type) (\w+) would keep about", warning)
    better = merge(base, [(adapter, 1.0)], tmp_path / "better.gguf", Policy(**{said[1]: said[2]}))
    assert not better.plan.warnings


def test_every_kind_of_a_good_merge_passes(tmp_path):
    report = merge(smollm2_path(), [(PERL, 1.0)], tmp_path / "out.gguf")
    assert not report.plan.warnings and report.whole.kept > 0.9
    remarks = doctor(smollm2_path(), [(PERL, 1.0)]).remarks
    assert not [remark for remark in remarks if remark.topic == "kept"]
