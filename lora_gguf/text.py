"""Tables and numbers for people, JSON for programs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_gguf import __version__

PACKAGES = ("numpy", "numba", "gguf")  # all of them dependencies


def text_table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Return columns as wide as their widest cell, the first ``left`` aligned left, the others right.

    On a terminal that is narrower each row takes several lines, the further ones indented.
    """
    return aligned([head, *rows], left, screen_width())


def aligned(rows: Sequence[Sequence[object]], left: int = 1, screen: int | None = None) -> str:
    """Return ``text_table`` without a head, on a ``screen`` of so many columns (None: of any number)."""
    lines = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=False)]
    cells = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        for line in lines
    ]
    parts = folded(widths, screen)
    return "\n".join("\n  ".join("  ".join(line[part]).rstrip() for part in parts) for line in cells)


def folded(widths: Sequence[int], screen: int | None) -> list[slice]:
    """Return which columns of these ``widths`` go on a row's first line, its second and so on."""
    first, used, parts = 0, 0, []
    for i, width in enumerate(widths):
        if screen is not None and i > first and used + 2 + width > screen:
            parts.append(slice(first, i))
            first, used = i, 0
        used += 2 + width if used or parts else width
    return [*parts, slice(first, len(widths))]


def screen_width() -> int | None:
    """Return the columns of the terminal that stdout is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def size_text(n_bytes: float) -> str:
    """Return ``n_bytes`` for a reader, in powers of 1000 as disks count: 98.4 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            break
        n_bytes /= 1000
    else:
        unit = "TB"
    return f"{n_bytes:.0f} {unit}" if unit == "bytes" or n_bytes >= 100 else f"{n_bytes:.3g} {unit}"


def count_text(n: float) -> str:
    """Return a number of weights for a reader: 134.5 M."""
    for unit in ("", "K", "M", "B"):
        if n < 999.5:
            break
        n /= 1000
    else:
        unit = "T"
    return f"{n:.0f}" if not unit else f"{n:.4g} {unit}"


def share_text(share: float, digits: int = 3) -> str:
    """Return a share of one for a reader; n/a where there is nothing to share."""
    return f"{share:.{digits}f}" if math.isfinite(share) else "n/a"


def size_of(path: str | os.PathLike[str]) -> int | None:
    """Return the bytes of a file, or of the files in a folder; None where there is none."""
    place = Path(path)
    if place.is_dir():
        return sum(entry.stat().st_size for entry in place.iterdir() if entry.is_file())
    return place.stat().st_size if place.exists() else None


def versions() -> dict[str, str]:
    """Return the versions of this program and of what its results depend on; "unknown" where that can't be read."""
    found = {name: _version(name) for name in PACKAGES}
    return {"lora-gguf": __version__, "Python": platform.python_version(), **found}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def json_text(data: object, indent: int | None = 1) -> str:
    """Return ``data`` as JSON that any parser takes: null for NaN and infinity, ASCII only."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
