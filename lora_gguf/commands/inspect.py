"""What a file, a folder or a repository is, from headers alone: on the Hub nothing but these is transferred."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from lora_gguf.adapters.adapter import adapter_directory
from lora_gguf.adapters.adapter_config import read_config
from lora_gguf.adapters.weight_files import weights_of
from lora_gguf.checks.inspection import Inspection, inspect_gguf, inspect_peft
from lora_gguf.errors import FileError, printable
from lora_gguf.files.base import Base, split_name
from lora_gguf.files.gguf_reader import MAGIC
from lora_gguf.files.input_file import InputFile, Source
from lora_gguf.files.weights import Entry, read_header, read_weights, shard_names
from lora_gguf.hub.downloads import CONFIG, TOKENIZER, adapter_files, find_model
from lora_gguf.hub.quantizations import quantizations
from lora_gguf.hub.references import adapter_reference, local_path, names_file
from lora_gguf.hub.remote import open_model, open_source
from lora_gguf.hub.repository import download, open_repo

Opener = Callable[[str], Source]
NAMES_QUANT = re.compile(r"[\w.-]:[\w.-]+$")  # OWNER/NAME:Q4_K_M


def inspect(source: str | os.PathLike) -> Inspection:
    """Return what ``source`` is: a GGUF, a PEFT adapter's folder, or either on the Hub (an id, or a reference to a
    file).

    Returns a ``ModelInspection`` or an ``AdapterInspection``. Only headers are read; of a repository the configuration
    and the headers are transferred, no weights. Raises the subclasses of ``LoraGgufError``.
    """
    name = os.fspath(source)
    if names_file(source) or (NAMES_QUANT.search(name) and not os.path.exists(name)):
        return remote_model(name)
    path = local_path(source)
    if path is None:
        return remote_adapter(name) or remote_model(name)
    return inspect_folder(path) if path.is_dir() else inspect_file(path)


def inspect_file(path: Path) -> Inspection:
    """Inspect a GGUF, known by its content, or the adapter that the file is part of."""
    with InputFile(path) as file:
        is_gguf = file.read(0, min(4, file.size)) == MAGIC
    if is_gguf or path.suffix not in (".safetensors", ".bin", ".json"):
        with Base(path) as base:
            return inspect_gguf(base, printable(path))
    return inspect_folder(path.parent)


def inspect_folder(path: Path) -> Inspection:
    """Inspect the one model in a folder, or the adapter. Raises ``FileError`` where there are several models."""
    models = sorted(path.glob("*.gguf"))
    if models and not (path / CONFIG).is_file():
        split = split_name(models[0])
        if len(models) > (split[2] if split else 1):
            shown = ", ".join(printable(model.name, 60) for model in models[:5])
            raise FileError(f"{printable(path)}: a folder of {len(models)} GGUFs: name one of {shown}")
        return inspect_file(models[0])
    folder = adapter_directory(path)
    weights = [file.name for file in weights_of(folder, path if path.is_file() else None)]
    shards = shard_names(folder / weights[0]) if weights[0].endswith(".index.json") else []
    named = (CONFIG, *TOKENIZER, *weights, *shards)
    files = {name: (folder / name).stat().st_size for name in named if (folder / name).is_file()}
    tensors = [entry for name in weights for entry in header_of(name, folder, lambda name: InputFile(folder / name))]
    return inspect_peft(read_config(folder), tensors, files, printable(path))


def header_of(weights: str, folder: Path, opener: Opener) -> list[Entry]:
    """Return the tensors of an adapter's weights, whose index (if they have one) lies in ``folder``.

    A PyTorch file has no header of its own: it is read whole, from ``folder``.
    """
    if weights.endswith(".index.json"):
        return [entry for name in shard_names(folder / weights) for entry in header_of(name, folder, opener)]
    if weights.endswith(".safetensors"):
        with opener(weights) as file:
            return read_header(file)[0]
    arrays = read_weights(folder / weights)
    return [
        Entry(name, array.dtype.name.upper().replace("FLOAT", "F"), array.shape, 0, array.nbytes)
        for name, array in arrays.items()
    ]


def remote_model(reference: str) -> Inspection:
    """Inspect the GGUF that ``reference`` names on the Hub."""
    found = find_model(reference)
    if found is None:
        raise FileError(
            f"{printable(reference)}: no such file, and not a reference to one on the Hub: expected OWNER/NAME[:QUANT]"
        )
    with open_model(*found) as base:
        return inspect_gguf(base, printable(f"{found[0].id}/{found[1].files[0]}"))


def remote_adapter(source: str) -> Inspection | None:
    """Inspect the PEFT adapter in a repository (or a folder of it); None where it holds GGUF models instead."""
    repo_id, revision, subfolder = adapter_reference(source, None, None)
    repo = open_repo(repo_id, revision)
    prefix = f"{subfolder}/" if subfolder else ""
    if prefix + CONFIG not in repo.files and quantizations(repo):
        return None
    found = adapter_files(repo, subfolder)
    config = download(repo, found[0])
    weights = [Path(name).name for name in found if Path(name).name not in (CONFIG, *TOKENIZER)]
    for name in weights:
        if not name.endswith(".safetensors"):
            download(repo, prefix + name)
    names = shard_names(config.parent / weights[0]) if weights[0].endswith(".index.json") else []
    files = {name: repo.files[name].size or 0 for name in (*found, *(prefix + name for name in names))}
    tensors = [
        entry
        for name in weights
        for entry in header_of(name, config.parent, lambda name: open_source(repo, prefix + name))
    ]
    return inspect_peft(read_config(config.parent), tensors, files, printable(f"{repo.id}/{prefix}".rstrip("/")))
