"""The base model: one GGUF, or the shards that llama.cpp's gguf-split made of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lora_gguf.errors import FileError, MalformedError, UsageError, printable
from lora_gguf.files.gguf_reader import GgufReader, TensorInfo
from lora_gguf.files.input_file import FileState, InputFile

_SHARD = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
CONVERT = "make a GGUF of it with llama.cpp's convert_hf_to_gguf.py, or let lora-gguf fetch ADAPTER --base find one"
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def shard_path(prefix: str | os.PathLike, number: int, count: int) -> Path:
    """Return the path of shard ``number`` (from 0) of ``count``."""
    return Path(f"{os.fspath(prefix)}-{number + 1:05d}-of-{count:05d}.gguf")


def split_name(path: str | os.PathLike) -> tuple[str, int, int] | None:
    """Return (prefix, number from 0, count) of a shard's path; None for another path."""
    match = _SHARD.fullmatch(os.fspath(path))
    return match and (match["prefix"], int(match["number"]) - 1, int(match["count"]))


def evenly(n: int, most: int) -> np.ndarray:
    """Return up to ``most`` of the numbers from 0 to ``n`` - 1, evenly spaced, ascending."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


class Base:
    """A base model open for reading: the shards' tensors as one table, in order. Use as a context manager.

    ``path`` may be any shard; ``opener`` opens a path that is not one of this machine. ``tensors``, ``kv``, ``get``,
    ``length``, ``hparam``, ``architecture``, ``alignment`` and ``label`` are those of ``GgufReader``, the metadata that
    of the first shard. Raises ``FileError`` for a folder, ``MalformedError`` for safetensors and where shards do not
    belong together.
    """

    def __init__(self, path: str | os.PathLike, opener: Callable[[Path], GgufReader] = GgufReader) -> None:
        _refuse_others(Path(path))
        with ExitStack() as opened:
            first = opened.enter_context(opener(Path(path)))
            count = first.get("split.count", 0)
            paths = _shard_paths(Path(path), first, count) if count else [Path(path)]
            readers = [first if shard == Path(path) else opened.enter_context(opener(shard)) for shard in paths]
            if count:
                _check_shards(readers)
            self._opened = opened.pop_all()
        self.readers = readers
        self.tensors: dict[str, TensorInfo] = {
            name: info for reader in readers for name, info in reader.tensors.items()
        }
        self._reader_of = {name: reader for reader in readers for name in reader.tensors}
        head = readers[0]
        self.path, self.label, self.kv, self.alignment = head.path, head.label, head.kv, head.alignment
        self.get, self.length, self.hparam, self.architecture = head.get, head.length, head.hparam, head.architecture

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *exc: object) -> None:
        self._opened.close()

    def reader_of(self, name: str) -> GgufReader:
        """Return the file that holds the tensor ``name``."""
        return self._reader_of[name]

    def rows(self, info: TensorInfo, rows: Iterable[int]) -> np.ndarray:
        """Return the rows of a tensor with these numbers, as stored: uint8 (rows, row_bytes)."""
        reader, rows = self.reader_of(info.name), np.asarray(rows)
        stored = np.empty((len(rows), info.row_bytes), np.uint8)
        for row, place in zip(rows, stored, strict=False):
            reader.read_into(info, int(row) * info.row_bytes, place)
        return stored

    @property
    def paths(self) -> list[Path]:
        return [reader.path for reader in self.readers]

    @property
    def n_bytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(info.n_bytes for info in self.tensors.values())

    @property
    def states(self) -> tuple[FileState, ...]:
        """What the files of this machine were when they were opened."""
        return tuple(reader.source.state for reader in self.readers if isinstance(reader.source, InputFile))

    def check_unchanged(self) -> None:
        for reader in self.readers:
            reader.check_unchanged()


def _refuse_others(path: Path) -> None:
    """Say what was named where a model's GGUF is expected, if it is something else that users have."""
    if path.is_dir():
        raise FileError(f"{printable(path)}: expected a model's GGUF, found {_folder(path)}")
    if path.suffix == ".safetensors" and path.is_file():
        raise MalformedError(f"{printable(path)}: expected a model's GGUF, found safetensors: {CONVERT}")


def _folder(path: Path) -> str:
    """What kind of folder ``path`` is, and what to do."""
    if (path / "adapter_config.json").exists():
        return "an adapter's folder: name the model first, then the adapter"
    if (path / "config.json").exists():
        return f"a Hugging Face model's folder: {CONVERT}"
    names = sorted(entry.name for entry in path.glob("*.gguf"))
    return "a folder: name a file" + (f" in it, such as {printable(names[0])}" if names else "")


def _shard_paths(path: Path, reader: GgufReader, count: int) -> list[Path]:
    name = split_name(path)
    number = reader.get("split.no")
    if not isinstance(count, int) or not isinstance(number, int) or not 0 <= number < count:
        raise MalformedError(
            f"{reader.label}: split.no {printable(number)} of {printable(count)}: the split metadata is damaged"
        )
    if count == 1:
        return [path]
    if name is None or name[1:] != (number, count):
        raise UsageError(
            f"{reader.label}: shard {number + 1} of {count}: expected the file name to end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf: give it its name back"
        )
    return [shard_path(name[0], i, count) for i in range(count)]


def _check_shards(readers: list[GgufReader]) -> None:
    head, names = readers[0], set[str]()
    for number, reader in enumerate(readers):
        found = (reader.get("split.no"), reader.get("split.count"))
        if found != (number, len(readers)):
            raise MalformedError(
                f"{reader.label}: expected shard {number + 1} of {len(readers)}, its metadata says {found}: "
                "not its shard"
            )
        if reader.architecture not in ("", head.architecture):
            raise MalformedError(
                f"{reader.label}: a {printable(reader.architecture)} model among shards of {head.architecture}"
            )
        if twice := names & set(reader.tensors):
            raise MalformedError(
                f"{reader.label}: {sorted(twice)[0]} is in two shards: the shards do not belong together"
            )
        names |= set(reader.tensors)
    total = head.get("split.tensors.count")
    if total is not None and total != len(names):
        raise MalformedError(
            f"{head.label}: expected {total} tensors in all shards, found {len(names)}: a shard is of another model"
        )
