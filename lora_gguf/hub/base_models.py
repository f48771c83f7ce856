"""The model that an adapter was trained on, and its GGUF quantizations on the Hub."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.adapters.adapter_config import read_json
from lora_gguf.errors import HubError, MalformedError, UsageError, printable
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.output import copy_file
from lora_gguf.hub.downloads import CONFIG, copy_to
from lora_gguf.hub.quantizations import Quantization, choose, fetch_quantization, find_quantizations
from lora_gguf.hub.references import REPO_ID, adapter_reference, local_path
from lora_gguf.hub.repository import download, open_repo
from lora_gguf.progress import FileProgress

ADDRESS = "https://huggingface.co/"
MODEL_CONFIG = "config.json"
OR_BASE = "--base BASE.gguf or --base-config DIR"


@dataclass(frozen=True)
class Bases:
    """The ``model`` that an adapter was trained on, and its quantizations by what to write as BASE for each."""

    model: str
    found: dict[str, Quantization]


def bases_of(source: str | os.PathLike[str], subfolder: str | None = None) -> Bases:
    """Return the model that the adapter ``source`` was trained on, and its GGUFs on the Hub. Raises as
    ``base_model_of``.
    """
    model = base_model_of(source, subfolder)
    return Bases(model, named(find_quantizations(model)))


def base_model_of(source: str | os.PathLike, subfolder: str | None = None) -> str:
    """Return the model that the adapter ``source`` was trained on, as it states it: the folder or GGUF of an adapter,
    or its Hub id.

    A repository that holds a model and no adapter stands for itself. Raises ``HubError``, ``FileError``,
    ``MalformedError``.
    """
    path = local_path(source)
    if path is not None:
        path = path / (subfolder or "")
    else:
        repo_id, revision, subfolder = adapter_reference(str(source), None, subfolder)
        repo = open_repo(repo_id, revision)
        name = f"{subfolder}/{CONFIG}" if subfolder else CONFIG
        if name not in repo.files:
            return repo.id
        path = download(repo, name).parent
    stated = (
        _stated_by_gguf(path) if path.suffix == ".gguf" else read_json(path / CONFIG).get("base_model_name_or_path")
    )
    if not stated or not isinstance(stated, str):
        raise MalformedError(
            f"{printable(path)}: it does not say what model it was trained on: find the base's GGUF by its name"
        )
    return stated


def base_config_of(adapter: Path, progress: FileProgress | None = None) -> Path:
    """Return the ``config.json`` of the model that ``adapter``, a folder or a file in it, was trained on: kilobytes,
    from the Hub or where the adapter says that the model lies.

    Raises ``UsageError`` where the adapter does not say, ``HubError`` where the Hub cannot be asked; both say what to
    give instead.
    """
    stated = read_json((adapter.parent if adapter.is_file() else adapter) / CONFIG).get("base_model_name_or_path")
    if not stated or not isinstance(stated, str):
        raise UsageError(f"the layout depends on the base, which the adapter does not name: give {OR_BASE}")
    local = Path(stated) / MODEL_CONFIG
    if local.is_file():
        return local
    if not re.fullmatch(REPO_ID, stated, re.ASCII):
        raise UsageError(
            f"the layout depends on the base, {printable(stated, 80)}, which is not here nor on the Hub: give {OR_BASE}"
        )
    try:
        repo = open_repo(stated)
        if MODEL_CONFIG not in repo.files:
            raise HubError(f"{repo.id}: no {MODEL_CONFIG}, which tells the layout")
        return download(repo, MODEL_CONFIG, progress)
    except HubError as error:
        raise HubError(f"{error}; or give {OR_BASE}", error.details) from error


def _stated_by_gguf(path: Path) -> str:
    with GgufReader(path) as reader:
        return stated_by(reader)


def stated_by(adapter: GgufReader) -> str:
    """Return the model that an open adapter GGUF says that it is for; an empty text where it does not say."""
    address = str(adapter.get("general.base_model.0.repo_url", ""))
    return address.removeprefix(ADDRESS) or str(adapter.get("general.base_model.0.name", ""))


def fetch_base(
    model: str,
    quant: str | None = None,
    output: str | os.PathLike | None = None,
    *,
    force: bool = False,
    progress: FileProgress | None = None,
) -> Path:
    """Download a GGUF of ``model``, a Hub id as adapters state it; the path of it (of a split one of the first shard).

    ``quant`` is such as ``Q4_K_M``, which is also what is taken without it. The files are copied to ``output``, a
    folder or a path that ends in ``.gguf``. Raises ``UsageError`` where there is no such quantization, ``HubError``,
    ``IntegrityError``, ``FileError``.
    """
    chosen = choose(find_quantizations(model), quant, printable(model, 100))
    repo = open_repo(chosen.repo)
    first = fetch_quantization(repo, chosen, progress)
    if output is None:
        return first
    if os.fspath(output).endswith(".gguf"):
        return _copy_one(first, Path(output), chosen, force)
    return copy_to(Path(output), [repo.snapshot / name for name in chosen.files], force) / first.name


def _copy_one(path: Path, target: Path, chosen: Quantization, force: bool) -> Path:
    if len(chosen.files) > 1:
        raise UsageError(
            f"{printable(target)}: {chosen.repo}:{chosen.quant} has {len(chosen.files)} shards: name a folder"
        )
    copy_file(path, target, force=force)
    return target


def named(found: list[Quantization]) -> dict[str, Quantization]:
    """Return what to write as BASE for each: ``OWNER/NAME:QUANT``, or the file where that could be another."""
    names: dict[str, Quantization] = {}
    counts = Counter((entry.repo, entry.quant) for entry in found)
    for entry in found:
        name = f"{entry.repo}:{entry.quant}"
        plain = entry.quant and counts[entry.repo, entry.quant] == 1 and re.fullmatch(r"[\w.-]+", entry.quant)
        names[name if plain else f"hf://{entry.repo}/{entry.files[0]}"] = entry
    return names
