"""``merge`` on F32 models of many architectures, and with every kind of adapter: PEFT's merged weights, and llama.cpp's word."""

from __future__ import annotations

import numpy as np
import pytest

from lora_gguf.adapters.lora import decode
from lora_gguf.commands.merge import merge
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.mapping.hparams import from_config
from tests import tiny
from tests.common import FIXTURES
from tests.test_convert import TOLERANCE, assert_top

KINDS = FIXTURES / "kinds"
# without its config.json the base does not say by what Falcon-H1's weights are multiplied
FAMILIES = [name for name in tiny.NAMES if name != "falcon-h1"]
ADAPTERS = sorted(path.name for path in KINDS.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def assert_merged(base, adapter, out, wanted):
    """The merged file has ``wanted`` where it differs, and the base's bytes where it does not."""
    merge(base, [(adapter, 1.0)], out)
    with GgufReader(base) as before, GgufReader(out) as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, info in after.tensors.items():
            found = decode(after, info)
            expected = wanted.get(name, decode(before, before.tensors[name]))
            atol = 3e-6 * max(1, np.abs(expected).max()) if name in wanted else 0
            np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_architectures(folder, name):
    base, out = tiny.base_gguf(folder, name), folder / f"{name}-merged.gguf"
    model = from_config(tiny.config_of(name))
    assert_merged(base, tiny.TINY / name / "adapter", out, tiny.tensors_of(name, model, "merged"))
    if name != "bert":
        assert_top(tiny.generate(out), tiny.expected(name)["merged"]["top"], TOLERANCE.get(name, 1e-4))


@pytest.mark.parametrize("name", ADAPTERS)
def test_kinds(folder, name):
    source = KINDS / name
    family = (source / "base").read_text()
    wanted = tiny.tensors_from(source / "merged.safetensors", from_config(tiny.config_of(family)))
    assert_merged(tiny.base_gguf(folder, family), source, folder / f"{name}.gguf", wanted)
