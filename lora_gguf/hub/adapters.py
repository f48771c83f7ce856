"""Hub repository or local path to a local directory that holds one adapter."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterable
from pathlib import Path

from lora_gguf.errors import FileError, HubError, UsageError, printable
from lora_gguf.files.output import copy_file
from lora_gguf.files.weights import shard_names
from lora_gguf.hub.references import gguf_path, names_file
from lora_gguf.hub.repository import Repo, download, open_repo, remember
from lora_gguf.progress import FileProgress

CONFIG = "adapter_config.json"
# the first of these that is there is taken
WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.bin.index.json",
    "adapters.safetensors",
)
TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
_REFERENCE = re.compile(
    r"(?:hf://|https?://(?:huggingface\.co|hf\.co)/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>.+)|/(?:tree|blob)/(?P<branch>[^/]+)(?:/(?P<folder>.+))?)?/?"
)


def fetch(
    source: str | os.PathLike,
    revision: str | None = None,
    subfolder: str | None = None,
    output: str | os.PathLike | None = None,
    *,
    force: bool = False,
    progress: FileProgress | None = None,
) -> Path:
    """The local directory (or file) of the adapter ``source``: a path, or on the Hub ``OWNER/NAME[@REVISION]``, or
    ``hf://OWNER/NAME/FILE.gguf`` for an adapter GGUF.

    A path that exists is returned as it is. From the Hub come only the files that matter, into its own cache, at one
    commit, each compared with its hash; with ``output`` they are copied there,
    and ``force`` replaces files that differ. ``progress`` is called with a
    file's name, its bytes so far and in all. Raises ``HubError``, ``IntegrityError``, ``FileError``, ``UsageError``.
    """
    if names_file(source) and not (revision or subfolder):
        path = gguf_path(source, progress=progress)
        return copy_to(Path(output), [path], force) / path.name if output is not None else path
    local = local_path(source)
    if local is not None:
        return _local_adapter(local, revision, subfolder, output)
    repo_id, revision, subfolder = parse_reference(str(source), revision, subfolder)
    repo = open_repo(repo_id, revision)
    names = adapter_files(repo, subfolder)
    paths = [download(repo, name, progress) for name in names]
    if names[-1].endswith(".index.json"):
        shards = _shards(repo, subfolder, paths[-1])
        paths += [download(repo, name, progress) for name in shards]
    remember(repo)
    return copy_to(Path(output), paths[1:] + paths[:1], force) if output is not None else paths[0].parent


def local_path(source: str | os.PathLike) -> Path | None:
    """``source`` as a path where it is one; None where it names a repository. Raises where it can be neither."""
    text = os.fspath(source)
    try:
        if text and Path(text).exists():
            return Path(text)
    except (OSError, ValueError):
        pass
    if (
        isinstance(source, str)
        and _REFERENCE.fullmatch(text)
        and not text.startswith((".", "~", "/"))
        and "\\" not in text
    ):
        return None
    raise FileError(
        f"{printable(text)}: no such file or folder, and not a Hub id: expected a path or OWNER/NAME[@REVISION]"
    )


def parse_reference(source: str, revision: str | None, subfolder: str | None) -> tuple[str, str | None, str]:
    """Repository, revision and subfolder ('' for the root) of ``OWNER/NAME[@REVISION]``, ``hf://…`` or an address."""
    match = _REFERENCE.fullmatch(source)
    written = match["revision"] or match["branch"]
    if revision and written and revision != written:
        raise UsageError(
            f"{printable(source)}: it names revision {printable(written)}, "
            f"and {printable(revision)} is asked for: give one"
        )
    folder = (subfolder or match["folder"] or "").strip("/")
    if folder and not all(part.strip(".") and part.isprintable() for part in re.split(r"[/\\]", folder)):
        raise UsageError(f"subfolder '{printable(folder, 60)}': expected a folder within the repository")
    return match["repo"], revision or written, folder


def adapter_files(repo: Repo, subfolder: str = "") -> list[str]:
    """The files of ``repo`` that make an adapter, the configuration first and the weights (or their index) last."""
    prefix = f"{subfolder}/" if subfolder else ""
    weights = next((prefix + name for name in WEIGHTS if prefix + name in repo.files), None)
    if prefix + CONFIG not in repo.files or weights is None:
        raise HubError(f"{repo.id}: {_what_is_missing(repo.files, prefix)}")
    extras = [prefix + name for name in TOKENIZER if prefix + name in repo.files]
    return [prefix + CONFIG, *extras, weights]


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


def _local_adapter(path: Path, revision: str | None, subfolder: str | None, output) -> Path:
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
