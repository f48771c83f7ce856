"""A folder for make: the rules from adapters on the Hub to merged models, and a Makefile to fill in."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from lora_gguf.errors import FileError, printable
from lora_gguf.files.output import check_target, write_bytes

FILES = ("pipeline.mk", "Makefile")


def init_pipeline(folder: str | os.PathLike, *, force: bool = False) -> list[Path]:
    """Write a ``Makefile`` and the rules that it includes into ``folder``; their paths.

    Raises ``FileError`` where one is there already, unless ``force``; then nothing is written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{printable(folder)}: cannot make this folder: {error.strerror}: name another") from error
    paths = [folder / name for name in FILES]
    for path in paths:
        check_target(path, force=force)
    for path in paths:
        write_bytes(path, (files("lora_gguf.commands") / "pipelines" / path.name).read_bytes(), force=force)
    return paths
