"""Every refusal of what an adapter, or a model, is gives a way out, and a test goes it.

``WAYS`` lists the refusals of the rooms that read and place adapters, by words of their lines, with the test that goes
the way out; a refusal that is not in the list fails.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from lora_gguf import api
from lora_gguf.adapters.adapter_config import REFUSED
from lora_gguf.errors import MismatchError, UnsupportedError
from lora_gguf.mapping.architectures import REFUSED as REFUSED_MODELS
from tests import tiny
from tests.calls import merge
from tests.common import FIXTURES, text_kv

HERE = Path(__file__).parent
KINDS = FIXTURES / "kinds"
ROOMS = ("adapters/*.py", "mapping/*.py", "commands/convert.py", "commands/unconvert.py", "hub/base_models.py")
CLASSES = ("UnsupportedError", "UsageError", "MismatchError", "ElsewhereError")
PEFT = "clients/test_ways_out.py::"
ANOTHER_BASE = "test_ways_out.py::test_the_base_that_it_was_trained_on"
# words of a refusal -> the test that goes its way out
WAYS = {
    "not a regular expression": "test_accounts.py::test_a_leftover_is_an_error_and_allow_unused_the_only_way_past_it",
    "save_projection=True": "test_updates.py::test_the_merged_weights_are_pefts",
    "of a convolution: merge it with PEFT": PEFT + "test_convolutions_of_loha_and_lokr_are_merged_by_peft",
    "on a convolution: merge it with PEFT": PEFT + "test_dora_of_a_convolution_is_merged_by_peft",
    "write the adapter as F16": "test_tools.py::test_adapter_ggufs_of_any_type",
    "which GGUF stores transposed": PEFT + "test_rotations_of_what_a_gguf_holds_turned_are_merged_by_peft",
    "whose layout differs: merge it with PEFT": PEFT + "test_tokens_are_merged_by_peft",
    "single rows of": PEFT + "test_tokens_are_merged_by_peft",
    "a bias that GGUF stores fused or scaled": PEFT + "test_biases_are_merged_by_peft",
    "whole norms of": PEFT + "test_norms_are_merged_by_peft",
    "not supported yet: merge it with PEFT": "test_ways_out.py::test_what_an_adapter_gguf_cannot_hold_is_merged",
    "an adapter GGUF is low rank": "test_support.py::test_convert_does_what_the_table_says",
    "the layout depends on the base: give": "test_base_models.py::test_convert_without_a_base_takes_its_config_from_a_folder",
    "which the adapter does not name: give": "test_base_models.py::test_convert_without_a_base_says_what_to_give",
    "which is not here nor on the Hub": "test_base_models.py::test_convert_without_a_base_says_what_to_give",
    "shards: name a folder": "test_base_models.py::test_one_quantization_is_fetched",
    "no adapters to an mmproj": "test_towers.py::test_a_tower_is_merged_as_llama_cpp_converts_pefts_merge",
    "--to peft wants an adapter GGUF": "test_unconvert.py::test_it_wants_a_gguf_and_its_base",
    "leave it out with --allow-unused REGEX": "test_unconvert.py::test_tensors_without_a_module_are_named",
    "its layout cannot be undone": "test_ways_out.py::test_what_has_no_way_back_is_merged",
    "the layout of {} is known: leave it out": "test_layout_of.py::test_a_known_architecture_keeps_its_layout",
    "is not supported: give the base as a GGUF": "test_ways_out.py::test_a_class_that_is_not_known_has_a_gguf",
    "which PEFT saved it": "test_orientation.py::test_a_square_one_alone_is_refused_where_nothing_tells",
    ": give {}": "test_orientation.py::test_qwen3vlmoe_of_both_transformers_is_asked_for_before_019",
    "layout_of": "test_layout_of.py::test_merge_verify_and_doctor",
    "use 'lora-gguf convert'": "test_families.py::test_an_adapter_that_waits_for_its_tokens_is_converted_and_not_merged",
    "projector {}": "test_towers.py::test_a_tower_is_merged_as_llama_cpp_converts_pefts_merge",
    "is it for another base model?": ANOTHER_BASE,
    "the base it was trained on?": ANOTHER_BASE,
    "do not divide by the": "test_tools.py::test_torchtunes_own_files",
    "the base that the adapter was trained on?": ANOTHER_BASE,
    "is it the one it was trained on?": ANOTHER_BASE,
    "take a GGUF that has one": "test_vocabulary.py::test_rows_and_tokens",
    "save its embedding layers too": "test_vocabulary.py::test_rows_and_tokens",
    "save it with save_embedding_layers=True": "test_vocabulary.py::test_rows_and_tokens",
    # with the line that says what is likely the matter (mapping/refusals.py)
    "two modules claim it": ANOTHER_BASE,
    "expected experts 0 to": ANOTHER_BASE,
    "its experts differ in shape": ANOTHER_BASE,
    "expected parts of": ANOTHER_BASE,
}
# lines that are made elsewhere, and raised with what a table or a list says
MADE = {"{}", "{}{}", "{}: {}", "{}: {}: {}", "config.json: {}: {}", "{}: {}: is {} the base it was trained on?"}


def refusals():
    """What the rooms raise: (place, the line with {} for what is filled in)."""
    for room in ROOMS:
        for path in sorted((HERE.parent / "lora_gguf").glob(room)):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                call = node.exc if isinstance(node, ast.Raise) else None
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Name)
                    and call.func.id in (*CLASSES, "refuse")
                ):
                    yield f"{path.name}:{node.lineno}", line_of(call.args)


def line_of(arguments):
    parts = []
    for node in arguments:
        for value in node.values if isinstance(node, ast.JoinedStr) else [node]:
            parts.append(value.value if isinstance(value, ast.Constant) else "{}")
        if isinstance(node, ast.JoinedStr | ast.Constant) and "refuse" not in parts:
            break
    return "".join(map(str, parts))


def test_every_refusal_is_listed_and_the_list_has_no_others():
    lines = dict(refusals())
    assert len(lines) > 30
    unlisted = {
        place: line for place, line in lines.items() if line not in MADE and not any(words in line for words in WAYS)
    }
    assert not unlisted
    assert not [words for words in WAYS if not any(words in line for line in lines.values())]


@pytest.mark.parametrize("way", sorted(set(WAYS.values())))
def test_the_test_that_goes_the_way_is_there(way):
    file, _, name = way.partition("::")
    assert re.search(rf"^def {name}\(", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE), way


def test_every_field_and_class_refused_by_name_says_what_to_do():
    for why in (*REFUSED.values(), *REFUSED_MODELS.values()):
        assert re.search(r"(merge|take|give|name) ", why.rpartition(": ")[2]), why


def adapter(folder, **fields):
    """The adapter of tiny llama with other fields."""
    shutil.copytree(tiny.TINY / "llama" / "adapter", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(("field", "value"), [("megatron_config", {"a": 1}), ("arrow_config", {"top_k": 1})])
def test_fields_that_are_taken_out(tmp_path, field, value):
    """Without the field it is an adapter as others are: what Arrow routes between are such, too."""
    base = tiny.base_gguf(tmp_path, "llama")
    with pytest.raises(UnsupportedError, match=field):
        merge(base, [(adapter(tmp_path / "a", **{field: value}), 1.0)], None)
    assert merge(base, [(adapter(tmp_path / "b", **{field: None}), 1.0)], None).plan.merged


def test_the_base_that_it_was_trained_on(tmp_path):
    """Whether folder or GGUF, whether the names or only the shapes are others'."""
    right, source = tiny.base_gguf(tmp_path, "llama"), tiny.TINY / "llama" / "adapter"
    api.convert(source, tmp_path / "a.gguf", right)
    for wrong in ("gpt2", "deepseek2"):
        for found in (source, tmp_path / "a.gguf"):
            with pytest.raises(MismatchError, match=r"base.*\?$"):
                merge(tiny.base_gguf(tmp_path, wrong), [(found, 1.0)], None)
            assert merge(right, [(found, 1.0)], None).plan.merged


@pytest.mark.parametrize("name", ["new-tokens-whole", "dora", "ia3", "norms", "bias-all", "lora-bias"])
def test_what_an_adapter_gguf_cannot_hold_is_merged(tmp_path, name):
    base = tiny.base_gguf(tmp_path, (KINDS / name / "base").read_text())
    with pytest.raises((UnsupportedError, MismatchError), match="merge"):
        api.convert(KINDS / name, tmp_path / "a.gguf", base)
    assert merge(base, [(KINDS / name, 1.0)], None).plan.merged


@pytest.mark.parametrize("name", ["dora", "tokens", "boft"])
def test_what_needs_the_bases_tensors_gets_them(tmp_path, name):
    of = (KINDS / name / "base").read_text()
    with pytest.raises(MismatchError, match=r"give --base BASE\.gguf"):
        api.convert(KINDS / name, tmp_path / "a.gguf", base_config=tiny.TINY / of)
    assert api.convert(KINDS / name, tmp_path / "a.gguf", tiny.base_gguf(tmp_path, of), rank=4).pairs


def test_a_class_that_is_not_known_has_a_gguf(tmp_path):
    source = tiny.TINY / "llama" / "adapter"
    (tmp_path / "config.json").write_text(json.dumps(tiny.config_of("llama") | {"architectures": ["OfNextWeek"]}))
    with pytest.raises(UnsupportedError, match="OfNextWeek is not supported: give the base as a GGUF"):
        api.convert(source, tmp_path / "a.gguf", base_config=tmp_path)
    assert api.convert(source, tmp_path / "a.gguf", tiny.base_gguf(tmp_path, "llama")).pairs


@pytest.mark.parametrize("architecture", ["eagle3", "wavtokenizer-dec"])
def test_models_that_stand_beside_another_name_it(tmp_path, architecture):
    from tests.common import pack_gguf

    (tmp_path / "draft.gguf").write_bytes(pack_gguf([text_kv("general.architecture", architecture)], []))
    source = tiny.TINY / "llama" / "adapter"
    with pytest.raises(UnsupportedError, match="name (that model's GGUF|the GGUF of the language model)"):
        merge(tmp_path / "draft.gguf", [(source, 1.0)], None)
    assert merge(tiny.base_gguf(tmp_path, "llama"), [(source, 1.0)], None).plan.merged


def test_what_has_no_way_back_is_merged(tmp_path, monkeypatch):
    """Where a layout could not be undone, the adapter GGUF is merged as it is."""
    base, source = tiny.base_gguf(tmp_path, "llama"), tiny.TINY / "llama" / "adapter"
    api.convert(source, tmp_path / "a.gguf", base)
    monkeypatch.setattr("lora_gguf.commands.unconvert.is_same", lambda one, other: False)
    with pytest.raises(UnsupportedError, match="cannot be undone: merge the adapter instead"):
        api.convert(tmp_path / "a.gguf", tmp_path / "back", base, to="peft")
    assert not (tmp_path / "back").exists()
    assert merge(base, [(tmp_path / "a.gguf", 1.0)], None).plan.merged


def test_patterns_that_are_not_read_become_plain_names(tmp_path):
    base = tiny.base_gguf(tmp_path, "llama")
    rank = json.loads((tiny.TINY / "llama" / "adapter" / "adapter_config.json").read_text())["r"]
    with pytest.raises(UnsupportedError, match="write plain module names instead"):
        merge(base, [(adapter(tmp_path / "a", rank_pattern={r"(?=q)q_proj": rank}), 1.0)], None)
    assert merge(base, [(adapter(tmp_path / "b", rank_pattern={"q_proj": rank}), 1.0)], None).plan.merged
