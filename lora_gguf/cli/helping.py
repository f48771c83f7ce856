"""How the command line helps: options in groups, completion, and a way out of what it cannot parse."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from typer.core import TyperCommand
from typer.main import get_command

from lora_gguf.arguments import none_of
from lora_gguf.cli.terms import as_number
from lora_gguf.errors import UsageError, printable

# the groups of a command's help, in their order, and the names of the options in them
GROUPS = {
    "Input": (
        "base",
        "lora",
        "model",
        "scale",
        "subfolder",
        "quant",
        "imatrix",
        "prompt",
        "prompts",
        "n_predict",
        "raw",
    ),
    "Output": ("output", "modelfile", "push", "public", "dry_run", "force"),
    "Quality": ("rounding", "max_growth", "min_retention", "seed", "rank"),
    "Types": ("type", "quantize", "outtype"),
    "Split and parallel": ("keep_split", "split_max_size", "shard", "threads", "memory"),
    "Report": ("report", "plot", "as_json", "verbose", "quiet", "progress"),
}
RARE = "Rare"
LEAST = 52  # columns that click writes help in where there are fewer


def help_width() -> int | None:
    """Return the columns of help where the terminal has fewer than click expects; else None, for click's choice."""
    columns = shutil.get_terminal_size().columns
    return columns - 1 if columns < LEAST else None


def group_of(name: str) -> str:
    """Return the group of the option whose parameter is called ``name``."""
    return next((group for group, names in GROUPS.items() if name in names), RARE)


class Grouped(TyperCommand):
    """A command whose help shows the options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options under its name."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Arguments", *GROUPS, RARE, "Help")}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections[_section(param)].append((re.sub(r" <\w+>$", "", record[0]), record[1]))
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records, col_max=30 if formatter.width > LEAST else 8)


def _section(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    return "Help" if param.name == "help" else group_of(param.name)


def asked_for_help(words: list[str]) -> list[str]:
    """Return the words of a command line, ``help COMMAND`` as ``COMMAND --help``."""
    return [*words[1:2], "--help"] if words[:1] == ["help"] else words


def way_out(error: Any) -> str:
    """Return what is wrong with a command line and what to write instead, for the mistakes that are made most; else
    nothing.
    """
    kind, context = type(error).__name__, error.ctx
    if kind == "UsageError" and "unexpected extra argument" in error.format_message() and context:
        return _too_many(error.format_message().rpartition("(")[2].partition(")")[0].split(" ")[0], context.command)
    param = getattr(error, "param", None)
    if kind == "MissingParameter" and param is not None:
        name = f"{param.opts[0]} {param.metavar}" if param.param_type_name == "option" else param.metavar
        return f"{name} is missing, as in: {example(context.command)}"
    given = "".join(str(found["input"]) for found in _found(error))
    if param is not None and (number := as_number(given)):
        return f"{max(param.opts, key=len)} {printable(given, 20)}: expected a number: write {number}"
    if found := re.match(r"No such command '(.*)'\.$", error.format_message(), re.DOTALL):
        return f"no such command: {printable(found[1], 80)}: name one first, as in: lora-gguf merge BASE.gguf ADAPTER"
    if found := re.search(r"'([^']*)' is not one of (.*)", error.format_message()):
        option = re.search(r"--[\w-]+", error.format_message())
        return none_of(option[0] if option else "value", found[1], re.findall(r"'([^']*)'", found[2]))
    return ""


def _too_many(name: str, command: Any) -> str:
    """Return what a name is that is one too many: an output, or one more adapter."""
    options, shown = {word for param in command.params for word in param.opts}, printable(name, 80)
    is_gguf, exists = name.endswith(".gguf"), os.path.exists(name)
    by_place = any(param.name == "base" and param.param_type_name == "argument" for param in command.params)
    likely = {
        "--base": is_gguf and exists and not by_place,
        "--lora": exists or not is_gguf,
        "-o": is_gguf and not exists,
    }
    words = {"--base": "the base", "--lora": "each further adapter", "-o": "the output"}
    found = next((option for option in words if option in options and likely[option]), "")
    way = f"name {words[found]} with {found} {shown}" if found else f"as in: {example(command)}"
    return f"one name too many: {shown}: {way}"


def example(command: Any) -> str:
    """Return the first command line in a command's help."""
    found = re.search(r"lora-gguf .+", command.help or "")
    return found[0].strip() if found else f"lora-gguf {command.name} --help"


def as_typed(error: UsageError, app: Any, line: Sequence[str]) -> str:
    """Return a message, its argument called as in the command ``line`` where it was given as an option there."""
    command = getattr(get_command(app), "commands", {}).get(line[1] if len(line) > 1 else "")
    names = [name for param in command.params for name in param.opts if param.name == error.argument] if command else []
    typed = next((name for name in names if any(word.partition("=")[0] == name for word in line)), "")
    return typed + str(error).removeprefix(error.argument) if typed else str(error)


def _found(error: Any) -> list[dict]:
    """Return what typer's validator tells of a value that it refused."""
    return error.__cause__.errors() if hasattr(error.__cause__, "errors") else []


def words(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a completion from ``names``."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def types() -> list[str]:
    """Return the types that tensors can be written in."""
    from lora_gguf.quants.mixes import MIXES

    return sorted({default for default, _ in MIXES.values()})


def mixes() -> list[str]:
    """Return llama.cpp's mixes of types."""
    from lora_gguf.quants.mixes import MIXES

    return list(MIXES)


def gguf_files(incomplete: str) -> list[str]:
    """Return the GGUFs and folders whose path begins with ``incomplete``."""
    return [path for path in _paths(incomplete) if path.endswith((os.sep, ".gguf"))]


def _paths(incomplete: str) -> list[str]:
    found = glob.glob(glob.escape(os.path.expanduser(incomplete)) + "*")
    return sorted(path + os.sep if os.path.isdir(path) else path for path in found)
