"""Downloads: what a user names, made local. Adapters and models that are paths already stay where they are."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterable
from pathlib import Path

from lora_gguf.adapters.weight_files import WEIGHTS, weights_among
from lora_gguf.errors import FileError, HubError, UsageError, printable
from lora_gguf.files.input_file import NO_HINT, path_hint
from lora_gguf.files.output import copy_file
from lora_gguf.files.weights import shard_names
from lora_gguf.hub.quantizations import Quantization, choose, fetch_quantization, listed, quantizations
from lora_gguf.hub.references import Name, Scaled, adapter_reference, local_path, model_reference, names_file
from lora_gguf.hub.repository import Repo, download, open_repo, remember
from lora_gguf.progress import FileProgress

CONFIG = "adapter_config.json"
IMATRIX = re.compile(r"imatrix[^/]*\.(dat|gguf)$|\.imatrix$", re.IGNORECASE)
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def fetch_model(source: Name, progress: FileProgress | None = None) -> Path:
    """Return the local path of the GGUF (of a split one the first shard) that ``source`` names, downloaded if need be.

    A path is returned as it is, whether it exists or not. ``progress`` is called with a file's name, its bytes so far
    and in all. Raises ``HubError``, ``IntegrityError``, ``FileError``, ``UsageError``.
    """
    found = find_model(source)
    return fetch_quantization(*found, progress) if found else Path(source)


def fetch_imatrix(source: Name, progress: FileProgress | None = None) -> Path | None:
    """Return the local path of the importance matrix in the repository that ``source`` names on the Hub, downloaded if
    need be; None where there is none, and of a path.

    Of several it is the one with the shortest name. Raises as ``fetch_model``.
    """
    reference = model_reference(source)
    if reference is None:
        return None
    repo = open_repo(reference.repo, reference.revision)
    name = imatrix_of(repo)
    return download(repo, name, progress) if name else None


def imatrix_of(repo: Repo) -> str | None:
    """Return the name of the importance matrix in a repository, None where there is none."""
    names = [name for name in repo.files if IMATRIX.search(name)]
    return min(names, key=lambda name: (len(name), name)) if names else None


def find_model(source: Name) -> tuple[Repo, Quantization] | None:
    """Return the repository and the files that ``source`` names on the Hub, nothing downloaded; None where it is a
    path.
    """
    reference = model_reference(source)
    if reference is None:
        return None
    repo = _opened(source, reference.repo, reference.revision, "file")
    if not reference.file:
        return repo, choose(quantizations(repo), reference.quant, repo.id)
    found = next((entry for entry in quantizations(repo, every=True) if reference.file in entry.files), None)
    if found is None:
        raise HubError(
            f"{repo.id}: there is no file {printable(reference.file, 80)}: it has {listed(quantizations(repo))}"
        )
    return repo, found


def fetch_adapters(named: Iterable[Scaled], progress: FileProgress | None = None) -> list[tuple[Path, float]]:
    """Return each adapter's folder or file, downloaded if need be, with its factor. Raises as ``fetch_adapter``."""
    return [(fetch_adapter(name, progress=progress), scale) for name, scale in named]


def fetch_adapter(
    source: Name,
    revision: str | None = None,
    subfolder: str | None = None,
    output: Name | None = None,
    *,
    force: bool = False,
    progress: FileProgress | None = None,
) -> Path:
    """Return the local folder (or GGUF) of the adapter ``source``, downloaded if need be.

    A path that exists is returned as it is. From the Hub come only the files that matter, into its own cache, at one
    commit, each compared with its hash; with ``output`` they are copied there, and ``force`` replaces files that
    differ. ``progress`` is called with a file's name, its bytes so far and in all. Raises ``HubError``,
    ``IntegrityError``, ``FileError``, ``UsageError``.
    """
    if names_file(source) and not (revision or subfolder):
        path = fetch_model(source, progress)
        return copy_to(Path(output), [path], force) / path.name if output is not None else path
    local = local_path(source)
    if local is not None:
        return _local_adapter(local, revision, subfolder, output)
    repo_id, revision, subfolder = adapter_reference(str(source), revision, subfolder)
    repo = _opened(source, repo_id, revision, "folder")
    names = adapter_files(repo, subfolder)
    paths = [download(repo, name, progress) for name in names]
    if names[-1].endswith(".index.json"):
        shards = _shards(repo, subfolder, paths[-1])
        paths += [download(repo, name, progress) for name in shards]
    remember(repo)
    return copy_to(Path(output), paths[1:] + paths[:1], force) if output is not None else paths[0].parent


def _opened(source: Name, repo_id: str, revision: str | None, what: str) -> Repo:
    """Return the repository that ``source`` names. Raises ``HubError``, which tells that it may be a misspelt path."""
    try:
        return open_repo(repo_id, revision)
    except HubError as error:
        if "://" in str(source):
            raise
        hint = path_hint(source)
        meant = "" if hint == NO_HINT else f": {hint}"
        raise HubError(f"{error} (nor is there a {what} {printable(source)} here{meant})") from None


def adapter_files(repo: Repo, subfolder: str = "") -> list[str]:
    """Return the files of ``repo`` that make an adapter: the configuration first, the weights (or an index) last."""
    prefix = f"{subfolder}/" if subfolder else ""
    here = [name.removeprefix(prefix) for name in repo.files if name.startswith(prefix)]
    try:
        weights = [prefix + name for name in weights_among([name for name in here if "/" not in name])]
    except FileError as error:
        raise HubError(f"{repo.id}: {error}") from None
    if prefix + CONFIG not in repo.files or not weights:
        raise HubError(f"{repo.id}: {_what_is_missing(repo.files, prefix)}")
    extras = [prefix + name for name in TOKENIZER if prefix + name in repo.files]
    return [prefix + CONFIG, *extras, *weights]


def _what_is_missing(names: Iterable[str], prefix: str) -> str:
    names = sorted(names)
    where = prefix or "its root folder"
    folders = [name[: -len(CONFIG) - 1] for name in names if name.endswith("/" + CONFIG)]
    gguf = [name for name in names if name.endswith(".gguf")]
    if prefix + CONFIG in names:
        return f"{where} has {CONFIG} but no weights: expected {WEIGHTS[0]}"
    if folders:
        shown = ", ".join(printable(folder, 60) for folder in folders[:5])
        return f"no {CONFIG} in {where}: its adapters are in {shown}: choose one with --subfolder"
    if gguf:
        return f"no {CONFIG} in {where}, but GGUF files: name one, as hf://OWNER/NAME/{printable(gguf[0], 80)}"
    if prefix + "config.json" in names:
        return f"no {CONFIG} in {where}, but config.json: a whole model, not an adapter"
    return f"no {CONFIG} in {where}: not a PEFT adapter"


def _shards(repo: Repo, subfolder: str, index: Path) -> list[str]:
    prefix = f"{subfolder}/" if subfolder else ""
    names = [prefix + name for name in shard_names(index)]
    missing = sorted(set(names) - repo.files.keys())
    if missing:
        raise HubError(f"{repo.id}: {index.name} names {missing[0]}, which is not there: the repository is incomplete")
    return names


def _local_adapter(path: Path, revision: str | None, subfolder: str | None, output: Name | None) -> Path:
    if revision or output is not None:
        raise UsageError(
            f"{printable(path)}: a local path: a revision or an output folder is for repositories on the Hub"
        )
    if subfolder and not (path / subfolder).is_dir():
        raise FileError(f"{printable(path)}: no folder {printable(subfolder)} in it: check --subfolder")
    return path / subfolder if subfolder else path


def copy_to(folder: Path, paths: list[Path], force: bool = False) -> Path:
    """Copy the files to ``folder``, each whole or not at all; what is there already must be the same, or ``force``
    given.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            target = folder / path.name
            if not (target.is_file() and filecmp.cmp(path, target, shallow=False)):
                copy_file(path, target, force=force)
    except OSError as error:
        raise FileError(f"{printable(folder)}: cannot copy there: {error.strerror}: name another folder") from error
    return folder
