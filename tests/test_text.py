"""Numbers and versions for people."""

from __future__ import annotations

import re

from lora_gguf.text import PACKAGES, versions
from tests.common import ROOT


def test_only_packages_that_are_always_there_are_asked_for_their_version():
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    names = set(re.findall(r'"([\w-]+)', listed))
    assert set(PACKAGES) <= names and all(versions().values())
