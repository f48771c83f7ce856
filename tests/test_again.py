"""A merged file as a base: what it holds is kept in its metadata, and nothing is merged into it twice by mistake."""

from __future__ import annotations

import json
import shutil

import pytest

from lora_gguf.api import convert, doctor, extract, inspect
from lora_gguf.errors import UsageError
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.gguf_writer import GgufWriter, raw_key_values
from lora_gguf.mapping.sources import placement_of
from lora_gguf.merging.options import Policy
from lora_gguf.merging.plan import make_plan
from lora_gguf.merging.provenance import merges_of
from tests.calls import merge
from tests.common import DEMO_ADAPTER, FIXTURES, smollm2_path
from tests.test_cli import run
from tests.test_completeness import lessened
from tests.test_merge import base_and_adapter

PERL = FIXTURES / "perl-adapter"


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    path = tmp_path_factory.mktemp("once") / "once.gguf"
    merge(smollm2_path(), [(PERL, 1.0)], path, Policy("dither", 7))
    return path


def test_another_adapter_is_added_and_all_is_told(tmp_path, capsys, once):
    second, third = tmp_path / "second.gguf", tmp_path / "third.gguf"
    code, _, err = run(capsys, "merge", once, DEMO_ADAPTER, "-o", second, "--scale", "0.5")
    assert code == 0 and "once.gguf is a merged file: it holds perl-adapter already" in err
    assert run(capsys, "merge", second, FIXTURES / "scales-adapter", "-o", third, "--scale", "1e-3")[0] == 0
    with GgufReader(third) as reader:
        names = [found["adapter.names"] for found in merges_of(reader)]
        assert names == [["perl-adapter"], ["demo-adapter"], ["scales-adapter"]]
        assert reader.get("lora_gguf.earlier.0.seed") == 7 and reader.get("lora_gguf.earlier.1.adapter.scales") == [0.5]
        assert len(reader.kv) == len(set(reader.kv))
    with GgufReader(once) as before, GgufReader(third) as after:
        for key in (key for key in before.kv if key.startswith("lora_gguf.")):
            assert after.get(key.replace("lora_gguf.", "lora_gguf.earlier.0.")) == before.get(key)
    found = inspect(third)
    assert found.provenance.adapters[0][0] == "scales-adapter"
    assert [merge.adapters for merge in found.earlier] == [[("perl-adapter", 1.0)], [("demo-adapter", 0.5)]]
    code, page, _ = run(capsys, "inspect", third)
    assert code == 0 and all(name in page for name in ("perl-adapter", "demo-adapter", "scales-adapter"))
    code, data, _ = run(capsys, "inspect", third, "--json")
    assert [merge["seed"] for merge in json.loads(data)["earlier"]] == [7, 0]


def test_the_same_adapter_again_is_refused(tmp_path, capsys, once):
    renamed = tmp_path / "renamed"
    shutil.copytree(PERL, renamed)
    convert(PERL, tmp_path / "perl.gguf", smollm2_path())
    for adapter in (PERL, renamed, tmp_path / "perl.gguf"):
        code, _, err = run(capsys, "merge", once, adapter, "-o", tmp_path / "out.gguf")
        assert code == UsageError.exit_code and "holds" in err and "--again" in err
        assert not (tmp_path / "out.gguf").exists()
    assert run(capsys, "doctor", once, PERL)[0] == UsageError.exit_code
    assert isinstance(doctor(once, PERL).refusal, UsageError) and doctor(once, PERL, again=True).ok
    code, _, err = run(capsys, "merge", once, PERL, "-o", tmp_path / "out.gguf", "--again")
    assert code == 0 and "is a merged file" in err


def test_the_same_adapter_is_refused_after_others(tmp_path, once):
    merge(once, [(DEMO_ADAPTER, 1.0)], tmp_path / "two.gguf")
    with pytest.raises(UsageError, match="perl-adapter already"):
        merge(tmp_path / "two.gguf", [(PERL, 1.0)], tmp_path / "three.gguf")


def test_another_one_of_the_same_name_is_asked_about(tmp_path, capsys, once):
    other = lessened(tmp_path / "perl-adapter", PERL, lambda name: "layers.5.mlp" in name)
    code, _, err = run(capsys, "merge", once, other, "-o", tmp_path / "out.gguf")
    assert code == 0 and "called perl-adapter is in it already" in err


def test_an_adapter_named_twice_in_one_merge_is_the_user_s_wish(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q8_0")
    assert merge(base, [(adapter, 0.5), (adapter, 0.5)], tmp_path / "out.gguf").whole.kept > 0.9


@pytest.mark.parametrize("value", [1, "yes", None])
def test_again_is_a_flag(tmp_path, value):
    base, adapter, _ = base_and_adapter(tmp_path, "Q8_0")
    with pytest.raises(UsageError):
        doctor(base, adapter, again=value)


def test_what_was_extracted_is_merged_back_at_its_strength(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0", rows=256)
    merge(base, [(adapter, 1.0)], tmp_path / "once.gguf", Policy("dither"))
    extract(base, tmp_path / "once.gguf", tmp_path / "back.gguf", 128, outtype="f32")  # with what rounding added
    found = merge(base, [(tmp_path / "back.gguf", 1.0)], tmp_path / "twice.gguf", Policy("dither"))
    assert abs(found.whole.kept - 1) < 0.05


@pytest.mark.parametrize("strip", [False, True])
def test_the_same_adapter_again_keeps_as_much_as_with_another_seed(tmp_path, once, strip):
    base = once
    if strip:
        base = tmp_path / "stripped.gguf"
        with Base(smollm2_path()) as clean, Base(once) as merged:
            pairs, targets = raw_key_values(clean.readers[0]), list(clean.tensors.values())
            with GgufWriter(base, pairs, targets, alignment=clean.alignment) as writer:
                for info in targets:
                    writer.write(
                        writer.tensors[info.name], 0, merged.reader_of(info.name).read(merged.tensors[info.name])
                    )
                writer.commit()
    kept = [
        merge(base, [(PERL, 1.0)], tmp_path / f"{seed}.gguf", Policy("dither", seed), again=True).whole.kept
        for seed in (7, 8)
    ]
    assert abs(kept[0] - kept[1]) < 0.02


def test_the_random_numbers_are_of_what_is_merged_and_stay(tmp_path):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    other = tmp_path / "other"
    other.mkdir()
    _, second, _ = base_and_adapter(other, "Q4_0", seed=1)

    def keys(base, *adapters):
        with Base(base) as model:
            placements = [(placement_of(path, model), 1.0) for path in adapters]
            return [int(tensor.recipe.key) for tensor in make_plan(model, placements, Policy()).merged]

    assert keys(base, adapter) == keys(base, adapter)
    merge(base, [(adapter, 1.0)], tmp_path / "merged.gguf")
    found = [
        keys(base, adapter),
        keys(base, second),
        keys(base, adapter, second),
        keys(tmp_path / "merged.gguf", second),
    ]
    assert len({tuple(key) for key in found}) == len(found)


def test_an_adapter_that_is_named_twice_is_warned_of(tmp_path, capsys):
    from tests import tiny
    from tests.test_cli import run

    base, adapter = tiny.base_gguf(tmp_path, "llama"), tiny.TINY / "llama" / "adapter"
    code, _, err = run(capsys, "merge", base, adapter, "--lora", adapter, "-o", tmp_path / "out.gguf")
    assert code == 0 and "is the same adapter as one before it" in err
