"""The README says what the code's own tables say."""

import re

import pytest

from lora_gguf.cli import app
from lora_gguf.mapping import support
from tests.common import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("name", "table"), [("kinds", support.kinds_table), ("architectures", support.architectures_table)])
def test_tables(name, table):
    assert f"<!-- {name} -->\n{table()}\n<!-- end -->" in README


def test_every_command_and_option_that_it_names_exists():
    commands = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}
    assert set(re.findall(r"lora-gguf (merge|convert|fetch|verify|extract|inspect|doctor)\b", README)) <= set(commands)
    options = {"--" + name.replace("_", "-") for callback in commands.values() for name in callback.__annotations__}
    aliases = {"--json", "--outfile", "--reflink", "--hidden"}
    assert set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", README)) <= options | aliases
