"""``orientation``: packed experts as five versions of PEFT lay them out, alone and together, square and not, against the
updates that each PEFT made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_gguf.adapters.adapter import read_adapter
from lora_gguf.errors import UsageError
from lora_gguf.mapping.hparams import Hparams
from lora_gguf.mapping.orientation import oriented, version_of
from tests.common import FIXTURES

VERSIONS = sorted(path.stem for path in (FIXTURES / "experts").glob("*.json"))
SAVED = {version: json.loads((FIXTURES / "experts" / f"{version}.json").read_text()) for version in VERSIONS}
CASES = [(version, case) for version in VERSIONS for case in SAVED[version]["target_parameters"]]


def unpacked(folder, version, case, **changes):
    """The adapter's folder as PEFT saved it, and what PEFT adds to each parameter: (E, out, in)."""
    stored = load_file(FIXTURES / "experts" / f"{version}.safetensors")
    parts = {key.removeprefix(f"{case}/"): value for key, value in stored.items() if key.startswith(f"{case}/")}
    save_file(
        {key.removeprefix("adapter/"): value for key, value in parts.items() if key.startswith("adapter/")},
        folder / "adapter_model.safetensors",
    )
    config = SAVED[version]["config"] | {"target_parameters": SAVED[version]["target_parameters"][case]} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {key.removeprefix("update/"): value for key, value in parts.items() if key.startswith("update/")}


def base_of(case):
    architecture = next(name for name in ("gpt-oss", "llama4", "granitemoe", "qwen3moe") if case.startswith(name))
    return Hparams(architecture, {"embedding_length": 8}, None, {}, "base.gguf")


def assert_updates(found, wanted):
    assert {pair.name.removeprefix("model.layers.0.") for pair in found} == wanted.keys()
    for pair in found:
        expected = wanted[pair.name.removeprefix("model.layers.0.")]
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(pair.delta(), expected, rtol=0, atol=1e-6, err_msg=pair.name)


@pytest.mark.parametrize(("version", "case"), CASES)
def test_the_update_is_pefts(version, case, tmp_path):
    wanted = unpacked(tmp_path, version, case)
    found, warnings = oriented(read_adapter(tmp_path), base_of(case))
    alone = "square-gate-up-gate" in case or "square-down-down" in case
    in_doubt = alone and case.startswith("gpt-oss") and version > "0.19"
    assert bool(warnings) == in_doubt
    if in_doubt and "transformers-4" in version:
        (flag,) = {"in", "out"} & set(warnings[0].removesuffix(" if with 4").split()[-1:])
        found, warnings = oriented(read_adapter(tmp_path), base_of(case), flag)
        assert not warnings
    assert_updates(found, wanted)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("stated", [None, "unknown", "0.19.1.dev0", "0.19.0.dev0@12ab"])
def test_a_square_one_alone_is_refused_where_nothing_tells(version, stated, tmp_path):
    case = "llama4-square-down-down"
    wanted = unpacked(tmp_path, version, case, peft_version=stated, qalora_group_size=None)
    with pytest.raises(UsageError, match="give --expert-a-axis in, .* or --expert-a-axis out") as refusal:
        oriented(read_adapter(tmp_path), base_of(case))
    assert "down_proj: (8, 8)" in str(refusal.value)
    for axis in ("in", "out"):
        found, _ = oriented(read_adapter(tmp_path), base_of(case), axis)
        expected = wanted if (axis == "out") == (version >= "0.19.1") else turned(wanted)
        assert_updates(found, expected)


def turned(updates):
    return {name: update.swapaxes(1, 2) for name, update in updates.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_other_parameter_tells_whatever_the_version(version, tmp_path):
    wanted = unpacked(tmp_path, version, "gpt-oss-square-down-both", peft_version="unknown")
    assert_updates(oriented(read_adapter(tmp_path), base_of("gpt-oss"))[0], wanted)


def test_qwen3vlmoe_of_both_transformers_is_asked_for_before_019(tmp_path):
    base = Hparams("qwen3vlmoe", {"embedding_length": 8}, None, {}, "base.gguf")
    unpacked(tmp_path, "0.18.0", "qwen3moe-square-down-down")
    with pytest.raises(UsageError, match="transformers 5, --expert-a-axis .* with 4"):
        oriented(read_adapter(tmp_path), base)
    wanted = unpacked(tmp_path, "0.19.1", "qwen3moe-square-down-down")
    found, warnings = oriented(read_adapter(tmp_path), base)
    assert len(warnings) == 1
    assert_updates(found, wanted)


@pytest.mark.parametrize(
    ("stated", "version"),
    [
        ("0.18.1", (0, 18, 1)), ("0.20.0.dev0@abc", (0, 20, 0)), ("0.19.1", (0, 19, 1)), ("0.19.0rc1", None),
        ("1.0.0", (1, 0, 0)), ("latest", None),
    ],
)  # fmt: skip
def test_versions(stated, version):
    assert version_of({"peft_version": stated}) == version


def test_the_versions_before_they_named_themselves():
    assert version_of({"qalora_group_size": 16}) == (0, 17, 0) and version_of({}) is None
