"""What the commands' options share: their words, their numbers, and how the program talks."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gguf.errors import UsageError, printable

if TYPE_CHECKING:
    from lora_gguf.report.content import Content
    from lora_gguf.report.files import Pictures

COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar(
    "COMMAND_LINE", default=("lora-gguf",)
)  # the words of the running command


class Rounding(str, Enum):
    auto = "auto"
    dither = "dither"
    nearest = "nearest"
    fresh = "fresh"


class Tied(str, Enum):
    separate = "separate"
    shared = "shared"
    refuse = "refuse"


class ExpertLayout(str, Enum):
    rank_major = "rank-major"
    expert_major = "expert-major"


class ExpertAxis(str, Enum):
    given = "in"
    made = "out"


class Form(str, Enum):
    gguf = "gguf"
    peft = "peft"


class OutType(str, Enum):
    auto = "auto"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


def base_and_adapter(first: str | None, second: str | None, model: str | None) -> tuple[str, str | None]:
    """Return BASE and ADAPTER, of which BASE may have been named with -m; then the only argument is the adapter."""
    if model and second:
        raise UsageError(f"two base models: {printable(first)} and -m {printable(model)}: name one")
    base, adapter = (model, first) if model else (first, second)
    if not base:
        command = COMMAND_LINE.get()[1:2] or ("merge",)
        raise UsageError(
            f"no base model: name its GGUF first, then the adapter: lora-gguf {command[0]} BASE.gguf ADAPTER"
        )
    return base, adapter


def named_adapters(adapter: str | None, scale: float, lora: Iterable[str] | None) -> list[tuple[str, float]]:
    """Return ADAPTER at --scale and those of --lora, which have scales of their own; at least one."""
    if lora and not adapter and scale != 1.0:
        raise UsageError(
            f"--scale {scale:g} is ADAPTER's, and only --lora names any: write each one's behind it: "
            f"--lora ADAPTER:{scale:g}"
        )
    named = ([(adapter, scale)] if adapter else []) + adapters_of(lora or [])
    if not named:
        raise UsageError("no adapter: name its folder, Hub id or GGUF after the base; several with --lora")
    return named


def adapters_of(texts: Iterable[str]) -> list[tuple[str, float]]:
    """Return the adapters of --lora and their scales: ADAPTER[:SCALE], several with commas as llama.cpp takes them."""
    return [
        with_scale(part) for text in texts for part in ([text] if os.path.exists(text) else text.split(",")) if part
    ]


def joined_scales(arguments: Iterable[str]) -> list[str]:
    """Return the command line with ``--lora-scaled ADAPTER SCALE``, as llama.cpp took it once, as ``--lora-scaled
    ADAPTER:SCALE``.
    """
    words: list[str] = []
    for word in arguments:
        if (
            words[-2:-1] == ["--lora-scaled"]
            and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", word)
            and not os.path.exists(word)
        ):
            words[-1] += f":{word}"
        else:
            words.append(word)
    return words


def as_number(text: str) -> str:
    """Return a percentage, or a number with a decimal comma, as a number: 0.75 for 75% and for 0,75; else nothing."""
    found = re.fullmatch(r"\s*([-+]?\d+(?:[.,]\d+)?)\s*(%?)\s*", text)
    if not found or not (found[2] or "," in found[1]):
        return ""
    return f"{float(found[1].replace(',', '.')) / (100 if found[2] else 1):g}"


def with_scale(text: str) -> tuple[str, float]:
    """Return ADAPTER[:SCALE], as llama.cpp's --lora-scaled takes it."""
    if os.path.exists(text):
        return text, 1.0
    name, _, number = text.rpartition(":")
    try:
        return (name, float(number)) if name else (text, 1.0)
    except ValueError:
        if os.path.exists(name):
            raise UsageError(
                f"--lora {printable(text)}: expected a number as its scale, found {printable(number)!r}"
                + (f": write {meant}" if (meant := as_number(number)) else "")
            ) from None
        return text, 1.0


def mmproj_command(named: Iterable[tuple[str, float]]) -> str:
    """Return the command line that merges the vision and audio part of the adapters."""
    words = [f"{name}:{scale:g}" if scale != 1 else str(name) for name, scale in named]
    if len(words) == 1 and words[0] == str(next(iter(named))[0]):
        return f"lora-gguf merge mmproj.gguf {shlex.quote(words[0])}"
    return f"lora-gguf merge mmproj.gguf {' '.join(f'--lora {shlex.quote(word)}' for word in words)}"


def n_bytes(option: str, size: str | None) -> int | None:
    """Return 500M or 2G in bytes; None where ``option`` was not given."""
    if size is None:
        return None
    found = re.fullmatch(r"([0-9]{1,12}) ?([MG])B?", size, re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise UsageError(f"{option} {printable(size)}: expected a number of megabytes or gigabytes, such as 500M or 2G")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2].upper()]


def pictures(page: Path | None, plot: Path | None, force: bool, inputs: Iterable[str | os.PathLike[str]]) -> Pictures:
    """Return the files of --report and --plot, of the running command."""
    from lora_gguf.report.files import Pictures

    return Pictures(page, plot, COMMAND_LINE.get(), force, tuple(inputs))


def draw(pictures: Pictures, content: Callable[[], Content], quiet: bool = False) -> None:
    """Write the pictures, if any are wanted, of what ``content`` returns."""
    for path in pictures.write(content()) if pictures else ():
        if not quiet:
            say(f"wrote {printable(path)}")


def say_written(path: str | os.PathLike, more: str = "") -> None:
    """Tell of an output, with its size."""
    say(written(path) + more)


def written(path: str | os.PathLike) -> str:
    """Return a line that tells of an output, with its size where the system says it."""
    from lora_gguf.text import size_text

    try:
        size = f" ({size_text(os.path.getsize(path))})"
    except OSError:
        size = ""
    return f"wrote {printable(path)}{size}"


def announce_first_run() -> None:
    """Say that kernels will be compiled, where none ever were: it takes some seconds in which nothing else happens."""
    home = os.environ.get("LORA_GGUF_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "lora-gguf"
    )
    if not any(Path(home).glob("kernels-*/**/*.nbi")):
        say("the first run compiles its kernels, once: about ten seconds more")


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        say(f"lora-gguf: warning: {printable(warning, 600)}")


def say(line: str) -> None:
    """Print on stderr; where that fails there is nobody to tell."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
