"""Every refusal of the program, one exit code each.

    LoraGgufError            1
    ├── UsageError           2   the command line, or a call, makes no sense
    ├── MalformedError       3   an input file is not what its format says
    ├── UnsupportedError     4   a type, an architecture or a kind of adapter that we do not handle
    ├── MismatchError        5   the adapter does not fit the base
    ├── NumericError         6   NaN, infinity, overflow, or too little of the adapter kept
    ├── FileError            7   reading or writing failed, no space, output exists
    ├── HubError             8   the Hub or the network
    ├── IntegrityError       9   a hash or a size differs; an input changed under us
    ├── UnprovedError       10   a merged file can neither be proved right nor wrong
    └── ExecutorError       11   an executor that a merge was given: its workers are gone, or not as the caller

SIGINT ends with 130, SIGHUP with 129, SIGTERM with 143.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path


class LoraGgufError(Exception):
    """A refusal. The message says where, what was expected, what was found and the fix, in one line.

    ``details`` lists the offenders where there are several; they are printed below the line.
    """

    exit_code = 1

    def __init__(self, message: str, details: Iterable[str] = ()):
        super().__init__(message)
        self.details = tuple(details)


class UsageError(LoraGgufError):
    """``argument`` is the name of a function's argument with which the message begins, if it is about one."""

    exit_code = 2

    def __init__(self, message: str, details: Iterable[str] = (), argument: str = ""):
        super().__init__(message, details)
        self.argument = argument


class MalformedError(LoraGgufError):
    exit_code = 3


class UnsupportedError(LoraGgufError):
    exit_code = 4


class MismatchError(LoraGgufError):
    exit_code = 5


class NumericError(LoraGgufError):
    exit_code = 6


class FileError(LoraGgufError):
    exit_code = 7


class HubError(LoraGgufError):
    exit_code = 8


class IntegrityError(LoraGgufError):
    exit_code = 9


class UnprovedError(LoraGgufError):
    exit_code = 10


class ExecutorError(LoraGgufError):
    exit_code = 11


def not_installed(what: str, package: str, purpose: str) -> UnsupportedError:
    """Return the refusal of ``what`` for want of an optional ``package``, with the command that this installation needs
    to add it.
    """
    return UnsupportedError(f"{what}: expected the package {package} ({purpose}), not found: {_how_to_add(package)}")


def _how_to_add(package: str) -> str:
    home = Path(sys.prefix)
    if (home / "pipx_metadata.json").is_file():
        return f"pipx inject lora-gguf {package}"
    with contextlib.suppress(OSError):
        if re.search(r"^uv\s*=", (home / "pyvenv.cfg").read_text(encoding="utf-8"), re.MULTILINE):
            return f"uv pip install --python {shlex.quote(sys.executable)} {package}"
    return f"pip install {package}"


def printable(text: object, limit: int = 200) -> str:
    """Return ``text`` on one line with no control characters, cut at ``limit`` characters: safe for a terminal."""
    line = str(text)[: limit + 1]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else line[: limit - 1] + "…"
