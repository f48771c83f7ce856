"""What a caller gives, looked at before any work: each function raises ``UsageError`` where it is not what is expected.

The one line names the argument, what was expected and what was found.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from collections.abc import Collection, Iterable
from typing import Any

from lora_gguf.errors import UsageError, printable

FEW = 8  # names that a line can list
OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".onnx", ".zip", ".json", ".txt", ".html", ".png")


def refuse(name: str, expected: str, found: object) -> UsageError:
    """Return the error of an argument that is not what is expected."""
    return UsageError(f"{name}: expected {expected}, found {printable(repr(found), 60)}", argument=name)


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if not (isinstance(value, str) and value in allowed):
        raise UsageError(none_of(name, value, allowed), argument=name)


def none_of(name: str, value: object, allowed: Collection[str]) -> str:
    """Return what is wrong with a ``value`` that is none of ``allowed``, and which was meant, if one is like it."""
    found, meant = printable(repr(value), 60), alike(value, allowed)
    if not meant:
        return f"{name}: expected one of {', '.join(allowed)}, found {found}"
    known = f"expected one of {', '.join(allowed)}, found {found}" if len(allowed) <= FEW else f"{found} is not known"
    return f"{name}: {known}: did you mean {meant}?"


def alike(value: object, names: Iterable[str]) -> str:
    """Return the name that is most like ``value``, whatever the case and the marks between; empty where none is."""
    plain = {_plain(name): name for name in reversed([*names])}
    found = difflib.get_close_matches(_plain(str(value)[:60]), plain, 1, 0.6)
    return plain[found[0]] if found else ""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False: the text "no" would count as yes."""
    if not isinstance(value, bool):
        raise refuse(name, "True or False", value)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise unless ``value`` is a whole number from ``least`` to ``most``."""
    whole = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if whole is None or whole < least or (most is not None and whole > most):
        raise refuse(name, f"a whole number from {least}" + (f" to {most}" if most is not None else ""), value)


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number from ``least`` to ``most``."""
    real = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(real) and least <= real <= most):
        bounds = "" if math.isinf(least) else f" from {least:g}" + ("" if math.isinf(most) else f" to {most:g}")
        raise refuse(name, f"a finite number{bounds}", value)


def check_path(name: str, value: object, expected: str = "a path") -> None:
    """Raise unless ``value`` is text or a path without a NUL, which no file system can hold."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise refuse(name, expected, value)


def check_gguf_name(path: str | os.PathLike[str]) -> None:
    """Raise where a GGUF is to be written at a ``path`` that says it is something else."""
    stem, suffix = os.path.splitext(os.fspath(path))
    if suffix.lower() in OTHER_FORMATS and not os.path.lexists(path):  # what is there is judged by what it is
        raise UsageError(f"{printable(path)}: a GGUF is written: call it {printable(stem)}.gguf")


def check_text(name: str, value: object, expected: str = "text") -> None:
    """Raise unless ``value`` is text, not empty, without control characters."""
    if not (isinstance(value, str) and value and value.isprintable()):
        raise refuse(name, expected, value)


def check_pattern(name: str, value: object) -> None:
    """Raise unless ``value`` is a regular expression."""
    check_text(name, value, "a regular expression")
    try:
        re.compile(str(value))
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{name} {printable(value, 60)}: not a regular expression: {error}") from None
