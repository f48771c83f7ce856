"""The parts of the documentation that the code itself says: the commands with all their options, and the tables of what
is supported.

python -m lora_gguf.cli.reference docs/*.md
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from inspect import Parameter, cleandoc, signature
from pathlib import Path

from typer.models import ArgumentInfo, OptionInfo

from lora_gguf.cli import app


@dataclass(frozen=True)
class Term:
    """An argument or an option of a command: its ``names`` (none for an argument) and the word for its ``value`` (none
    for a flag).
    """

    names: tuple[str, ...]
    value: str
    help: str
    default: object

    @property
    def text(self) -> str:
        return " ".join(filter(None, (", ".join(self.names), self.value)))

    @property
    def meaning(self) -> str:
        if self.default is Parameter.empty:
            return f"{self.help} (required)" if self.names else self.help
        plain = self.default is None or isinstance(self.default, bool) or "efault" in self.help
        return self.help if plain else f"{self.help} (default: {getattr(self.default, 'value', self.default)})"


def commands() -> dict[str, Callable]:
    """Return the commands' functions by name, in the order of the help."""
    return {
        command.name or callback.__name__.replace("_", "-"): callback
        for command in app.registered_commands
        if (callback := command.callback)
    }


def terms(command: Callable) -> list[Term]:
    """Return what a command takes, in the order of its help."""
    hints = typing.get_type_hints(command, include_extras=True)
    return [
        _term(name, hint, info, parameter.default)
        for name, parameter in signature(command).parameters.items()
        for hint, info in [typing.get_args(hints[name])[:2]]
    ]


def _term(name: str, hint: type, info: ArgumentInfo | OptionInfo, default: object) -> Term:
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)]
    choices = "|".join(choice.value for kind in kinds if issubclass(kind, Enum) for choice in kind)
    declared = (info.default, *(info.param_decls or ()))  # in Annotated the first one takes the place of the default
    named = tuple(word for word in declared if isinstance(word, str)) or (f"--{name.replace('_', '-')}",)
    names = named if isinstance(info, OptionInfo) else ()
    return Term(names, "" if bool in kinds else choices or info.metavar or "", info.help or "", default)


def examples(command: Callable) -> list[str]:
    """Return the command lines in a command's help."""
    return re.findall(r"^lora-gguf .+$", cleandoc(command.__doc__ or ""), re.MULTILINE)


def commands_reference() -> str:
    """Return all commands in Markdown."""
    return "\n\n".join(part for name, command in commands().items() for part in _section(name, command))


def _section(name: str, command: Callable) -> Iterator[str]:
    taken = terms(command)
    arguments = [
        term.value if term.default is Parameter.empty else f"[{term.value}]" for term in taken if not term.names
    ]
    yield f"### `{' '.join(['lora-gguf', name, *arguments])}`"
    yield re.sub(r"\s+", " ", cleandoc(command.__doc__ or "").split("\n\n")[0])
    yield "\n".join(f"    {example}" for example in examples(command))
    yield "\n".join(["| | |", "|---|---|", *(f"| `{_cell(term.text)}` | {_cell(term.meaning)} |" for term in taken)])


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def rewritten(text: str) -> str:
    """Return ``text`` with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""
    from lora_gguf.mapping import support

    parts = {
        "kinds": support.kinds_table,
        "architectures": support.architectures_table,
        "towers": support.towers_table,
        "commands": commands_reference,
    }
    return re.sub(
        r"(?<=<!-- )(?!end )(\w+)( -->\n).*?(?=\n<!-- end -->)",
        lambda found: f"{found[1]}{found[2]}{parts[found[1]]()}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
