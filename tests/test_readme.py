"""The README says what the code's own tables and its command line say."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from lora_gguf.cli import app
from lora_gguf.cli.reference import commands, examples, rewritten, terms
from tests.common import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = list(commands())


def test_what_is_made_from_the_code_is_up_to_date():
    assert rewritten(README) == README, "run: make readme"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_all_that_it_takes_is_explained_and_shown(name):
    command = commands()[name]
    assert examples(command), "its docstring shows no command line"
    for term in terms(command):
        assert term.help.strip().endswith((".", ")")) and (term.value or term.names), term


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_what_typer_parses(name):
    parsed = typer.main.get_command(app).commands[name]
    known = {
        word
        for param in parsed.params
        if param.param_type_name == "option"
        for word in (*param.opts, *param.secondary_opts)
    }
    said = {word for term in terms(commands()[name]) for names in term.names for word in names.split("/")}
    assert said == known
    flags = {param.opts[0] for param in parsed.params if param.param_type_name == "option" and param.is_flag}
    assert {term.names[0].split("/")[0] for term in terms(commands()[name]) if term.names and not term.value} == flags


def command_lines() -> list[str]:
    """Every command line that the README and the help show."""
    headless = re.sub("^### .*$", "", README, flags=re.MULTILINE)
    blocks = re.findall(r"`(lora-gguf [a-z-]+ [^`]+)`|^    (lora-gguf .+)$", headless, re.MULTILINE)
    shown = [inline or block for inline, block in blocks] + [
        line for command in commands().values() for line in examples(command)
    ]
    return sorted({line for line in shown if not re.search(r"[\[\]|]|FILE|DIR", line)})


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_that_is_shown_parses(line):
    _, name, *words = shlex.split(line, comments=True)
    typer.main.get_command(app).commands[name].make_context(name, words)


def test_every_option_that_the_readme_names_exists():
    known = {
        word
        for command in commands().values()
        for term in terms(command)
        for names in term.names
        for word in names.split("/")
    }
    known |= {"--help", "--version", "--debug", "--install-completion", "--show-completion"}
    others = {"--hidden", "--reflink"}
    assert set(re.findall(r"`(?:[^`]*\s)?(--[a-z][a-z-]+)", README)) <= known | others
