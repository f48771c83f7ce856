"""What every refusal must look like, and what no run may ever do; ``Hole`` is a breach of it, and its subclasses are
counted.
"""

from __future__ import annotations

from pathlib import Path

from lora_gguf.files.output import SUFFIX
from tests.forked import Result, snapshot

CODES = {2, 3, 4, 5, 6, 7, 8, 9}
SECONDS, PEAK_BYTES = 2.0, 300e6  # for an input below 1 MB


class Hole(AssertionError):
    """The contract is broken."""


class Hang(Hole):
    """It took too long, or too much memory."""


class Trace(Hole):
    """A traceback, a crash, or an error that is no clean line."""


class Corruption(Hole):
    """Bytes that should be there are not: an output half written, an input changed, a wrong result with exit code 0."""


def check_line(result: Result) -> None:
    """One sanitised error line, with its offenders below it, and no traceback."""
    lines = result.err.split("\n")
    errors = [line for line in lines if line.startswith("lora-gguf: error: ")]
    others = [
        line for line in lines if not line.startswith(("lora-gguf: error: ", "lora-gguf: warning: ", "  ")) and line
    ]
    if result.code is None:
        raise Hang(f"killed after {result.seconds:.1f} s: {result.err[-300:]}")
    if (
        "Traceback" in result.err
        or "internal error" in result.err
        or len(errors) != 1
        or others
        or not errors[0].isprintable()
    ):
        raise Trace(f"exit code {result.code}: {result.err[-2000:]}")


def check_refusal(result: Result, codes=CODES, quick: bool = True) -> None:
    """A refusal with one of ``codes``, in time and memory where ``quick``."""
    check_line(result)
    if result.code not in codes:
        raise Trace(f"exit code {result.code}, expected {codes}: {result.err[-500:]}")
    if quick and (result.seconds > SECONDS or result.peak_bytes > PEAK_BYTES):
        raise Hang(f"{result.seconds:.1f} s, {result.peak_bytes / 1e6:.0f} MB")


def check_preserved(folder: Path, before: dict, allowed: dict[str, tuple] | None = None) -> None:
    """``folder`` holds what it held; ``allowed`` gives for some names what else may lie there (None: nothing)."""
    after = snapshot(folder)
    for name in before.keys() | after.keys():
        if name.endswith((SUFFIX, ".incomplete")) and name not in before:
            raise Corruption(f"{name} was left")
        if after.get(name) != before.get(name) and after.get(name) not in (allowed or {}).get(name, ()):
            raise Corruption(f"{name}: {'is gone' if name not in after else 'changed or appeared'}")
