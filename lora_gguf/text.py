"""Tables and numbers for people, JSON for programs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from lora_gguf import __version__

PACKAGES = ("numpy", "numba", "gguf")  # all of them dependencies


def text_table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Return columns as wide as their widest cell, the first ``left`` aligned left, the others right."""
    return aligned([head, *rows], left)


def aligned(rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Return ``text_table`` without a head."""
    lines = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=False)]
    align = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=False)).rstrip()
        for line in lines
    )


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
    """Return the versions of this program and of what its results depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"lora-gguf": __version__, "Python": platform.python_version(), **found}


def json_text(data: object, indent: int | None = 1) -> str:
    """Return ``data`` as JSON that any parser takes: null for NaN and infinity, ASCII only."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
