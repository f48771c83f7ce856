"""``merge`` on F32 models of many architectures, and with every kind of adapter: PEFT's merged weights, and llama.cpp's
word.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters import kinds
from lora_gguf.adapters.adapter_config import FIELDS
from lora_gguf.adapters.lora import decode
from lora_gguf.api import convert, verify
from lora_gguf.errors import MismatchError, UnsupportedError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.hparams import from_config
from tests import tiny
from tests.calls import merge
from tests.common import FIXTURES
from tests.test_convert import TOLERANCE, assert_top

KINDS = FIXTURES / "kinds"
ADAPTERS = sorted(path.parent.name for path in KINDS.glob("*/merged.safetensors"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def assert_merged(base, adapter, out, wanted, **options):
    """The merged file has ``wanted`` where it differs, and the base's bytes where it does not."""
    report = merge(base, [(adapter, 1.0)], out, **options)
    assert {account.outcome for account in report.accounts} <= {"applied", "ignored"} and report.accounts
    with GgufReader(base) as before, GgufReader(out) as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, info in after.tensors.items():
            found = decode(after, info)
            expected = wanted.get(name, decode(before, before.tensors[name]))
            atol = 3e-6 * max(1, np.abs(expected).max()) if name in wanted else 0
            np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_architectures(folder, name):
    base, out = tiny.base_gguf(folder, name), folder / f"{name}-merged.gguf"
    model = from_config(tiny.config_of(name))
    # the base does not say by what Falcon-H1's weights are multiplied, its config.json does
    options = {"base_config": tiny.TINY / name} if name == "falcon-h1" else {}
    assert_merged(base, tiny.TINY / name / "adapter", out, tiny.tensors_of(name, model, "merged"), **options)
    assert verify(out, base, [(tiny.TINY / name / "adapter", 1.0)], **options).ok
    if name != "bert":
        assert_top(tiny.generate(out), tiny.expected(name)["merged"]["top"], TOLERANCE.get(name, 1e-4))


def test_the_forms_of_packed_experts_are_pefts_own(folder):
    """PEFT before 0.19.1 saves in and out of packed experts exchanged, or not: what it makes of them is the same."""
    shapes = {}
    for version in ("0.18.0", "0.19.0", "0.19.1"):
        for name in ("experts", "experts-gpt-oss"):
            factors = load_file(KINDS / f"{name}-{version}" / "adapter_model.safetensors")
            shapes[name, version] = factors[
                "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
            ].shape
    assert shapes["experts", "0.18.0"] != shapes["experts", "0.19.1"]
    assert shapes["experts-gpt-oss", "0.19.0"] != shapes["experts-gpt-oss", "0.19.1"]


def test_an_adapter_that_waits_for_its_tokens_is_converted_and_not_merged(folder):
    base = tiny.base_gguf(folder, "llama")
    with pytest.raises(UnsupportedError, match="aLoRA.*cannot be merged.*convert"):
        merge(base, [(KINDS / "alora", 1.0)], folder / "no.gguf")
    convert(KINDS / "alora", folder / "alora.gguf", base)
    with GgufReader(folder / "alora.gguf") as reader:
        assert reader.get("adapter.alora.invocation_tokens") == [5, 6, 7]
    with pytest.raises(UnsupportedError, match="aLoRA.*cannot be merged"):
        merge(base, [(folder / "alora.gguf", 1.0)], folder / "no.gguf")
    assert tiny.generate(base, folder / "alora.gguf")  # llama.cpp loads it


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_changed_base_is_refused_with_the_way_out(folder, command):
    base, out = tiny.base_gguf(folder, "llama"), folder / "no.gguf"
    with pytest.raises(UnsupportedError, match="pissa.*path_initial_model_for_weight_conversion"):
        merge(base, [(KINDS / "pissa", 1.0)], out) if command == "merge" else convert(KINDS / "pissa", out, base)


@pytest.mark.campaign("adapters that do not fit")
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_replicated_layers_are_refused(tmp_path, command):
    shutil.copytree(tiny.TINY / "llama" / "adapter", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layer_replication": [[0, 2], [1, 2]]}))
    base, out = tiny.base_gguf(tmp_path, "llama"), tmp_path / "no.gguf"
    with pytest.raises(UnsupportedError, match="layer_replication.*in PEFT, give each weights of its own.*then merge"):
        merge(base, [(tmp_path / "a", 1.0)], out) if command == "merge" else convert(tmp_path / "a", out, base)


@pytest.mark.campaign("adapters that do not fit")
def test_what_the_base_does_not_say_is_asked_for(folder):
    base = tiny.base_gguf(folder, "falcon-h1")
    with pytest.raises(MismatchError, match="multiplier.*--base-config.*GGUF alone"):
        merge(base, [(tiny.TINY / "falcon-h1" / "adapter", 1.0)], folder / "no.gguf")


def test_the_layout_of_unsloths_experts_may_be_told(tmp_path):
    """B as Unsloth laid it out until September 2026, unmarked: with the option the merge is PEFT's."""
    shutil.copytree(tiny.TINY / "qwen3moe" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    for name in [name for name in factors if ".mlp.experts" in name and "lora_B" in name]:
        b = factors[name]
        factors[name] = np.ascontiguousarray(b.reshape(-1, 4, 4).transpose(0, 2, 1).reshape(len(b), -1))
    save_file(factors, path)
    wanted = tiny.tensors_of("qwen3moe", from_config(tiny.config_of("qwen3moe")), "merged")
    base = tiny.base_gguf(tmp_path, "qwen3moe")
    assert_merged(base, tmp_path / "adapter", tmp_path / "out.gguf", wanted, expert_b_layout="expert-major")
    with pytest.raises(AssertionError):
        assert_merged(base, tmp_path / "adapter", tmp_path / "other.gguf", wanted)


@pytest.mark.parametrize("name", ADAPTERS)
def test_kinds(folder, name):
    source = KINDS / name
    family = (source / "base").read_text()
    wanted = tiny.tensors_from(source / "merged.safetensors", from_config(tiny.config_of(family)))
    assert_merged(tiny.base_gguf(folder, family), source, folder / f"{name}.gguf", wanted)


def test_every_kind_has_an_adapter_that_peft_made_and_merged():
    """mlx's are not PEFT's: tests/test_kinds.py has theirs."""
    made = {json.loads((KINDS / name / "adapter_config.json").read_text())["peft_type"] for name in ADAPTERS}
    assert made == set(kinds.KINDS) - {"MLX", "MLX_VLM"}


def test_every_field_of_a_configuration_that_is_read_has_a_type():
    """A field that ``FIELDS`` lacks is read as it comes, of whatever type."""
    read = set()
    for module in Path(kinds.__file__).parent.glob("*.py"):
        for call in re.findall(r"(?:config\.get\(|number\(config, )\"(\w+)\"", module.read_text()):
            read.add(call)
    assert {"alpha", "coft", "use_dora"} < read <= set(FIELDS)
