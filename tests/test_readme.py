"""The README and the documents say what the code's own tables and its command line say."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from lora_gguf.cli import app
from lora_gguf.cli.reference import commands, examples, rewritten, terms
from tests.common import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README, **DOCS}
NAMES = list(commands())


@pytest.mark.parametrize("name", DOCS)
def test_what_is_made_from_the_code_is_up_to_date(name):
    assert rewritten(DOCS[name]) == DOCS[name], "run: make docs"


def test_every_part_that_can_be_made_is_there():
    made = re.findall(r"<!-- (?!end )(\w+) -->", "".join(DOCS.values()))
    assert sorted(made) == ["architectures", "commands", "kinds", "towers"]


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)#:]+)", TEXTS[name]):
        assert (folder / target).exists(), target


def test_every_document_is_named_by_the_readme():
    assert set(re.findall(r"\(docs/([\w.]+)\)", README)) == set(DOCS)


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
    headless = re.sub("^### .*$", "", "\n".join(TEXTS.values()), flags=re.MULTILINE)
    blocks = re.findall(r"`(lora-gguf [a-z-]+ [^`]+)`|^(?:    )?(lora-gguf .+)$", headless, re.MULTILINE)
    shown = [inline or block for inline, block in blocks] + [
        line for command in commands().values() for line in examples(command)
    ]
    return sorted({line for line in shown if not re.search(r"[\[\]|]|FILE|DIR|^lora-gguf help", line)})


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_that_is_shown_parses(line):
    _, name, *words = shlex.split(line, comments=True)
    typer.main.get_command(app).commands[name].make_context(name, words)


def test_every_option_that_is_named_exists():
    known = {
        word
        for command in commands().values()
        for term in terms(command)
        for names in term.names
        for word in names.split("/")
    }
    known |= {"--help", "--version", "--debug", "--install-completion", "--show-completion"}
    others = {"--hidden", "--reflink"}
    assert set(re.findall(r"`(?:[^`\n]*\s)?(--[a-z][a-z-]+)", "\n".join(TEXTS.values()))) <= known | others
