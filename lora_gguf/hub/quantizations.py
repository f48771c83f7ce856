"""Base models on the Hub: the GGUF quantizations of a model.

The tags that say which model a repository quantizes are those of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.errors import HubError, UsageError, printable
from lora_gguf.files.base import split_name
from lora_gguf.hub.references import REPO_ID
from lora_gguf.hub.repository import Repo, download, is_name, open_repo, remember, search, tags_of
from lora_gguf.progress import FileProgress

DEFAULT_QUANT = "Q4_K_M"
MAX_REPOS = 8
_QUANT = re.compile(
    r"(?:^|[-_./])((?:UD-)?(?:I?Q\d+_\w+|TQ\d_\d|BF16|F16|F32|FP16|MXFP4(?:_MOE)?|NVFP4))(?=[-./]|$)", re.IGNORECASE
)
_BITSANDBYTES = re.compile(r"(-unsloth)?-bnb-[48]bit$", re.IGNORECASE)
_NO_MODEL = re.compile(r"(^|[-_./])(mmproj|imatrix|lora)", re.IGNORECASE)


@dataclass(frozen=True)
class Quantization:
    """One quantization of a model: its ``files`` (the shards in order) in ``repo``, ``n_bytes`` together."""

    repo: str
    quant: str
    files: tuple[str, ...]
    n_bytes: int


def fetch_quantization(repo: Repo, chosen: Quantization, progress: FileProgress | None = None) -> Path:
    """Download all files of a quantization; the path of the first."""
    paths = [download(repo, name, progress) for name in chosen.files]
    remember(repo)
    return paths[0]


def quantizations(repo: Repo, every: bool = False) -> list[Quantization]:
    """Return the models among the GGUF files of a repository, shards together, smallest first; ``every``: all GGUF
    files.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(repo.files):
        if name.endswith(".gguf") and (every or not _NO_MODEL.search(name)):
            split = split_name(name)
            groups.setdefault(f"{split[0]}/{split[2]}" if split else name, []).append(name)
    found = [
        Quantization(repo.id, quant_of(names[0]), tuple(names), sum(repo.files[name].size or 0 for name in names))
        for names in groups.values()
        if _is_whole(names)
    ]
    return sorted(found, key=lambda entry: (entry.n_bytes, entry.quant))


def _is_whole(names: list[str]) -> bool:
    split = split_name(names[0])
    return split is None or len(names) == split[2]


def quant_of(name: str) -> str:
    """Return the quantization that a file's name (or its folder's) states, in capitals; an empty string if it states
    none.
    """
    split = split_name(name)
    stem = split[0] if split else name.removesuffix(".gguf")
    for part in reversed(stem.split("/")):
        found = _QUANT.findall(part)
        if found:
            return found[-1].upper()
    return ""


def choose(found: Iterable[Quantization], quant: str | None, where: str) -> Quantization:
    """Return the first with this quantization; without a wish Q4_K_M, or the only one there is."""
    found = list(found)
    if not found:
        raise HubError(
            f"{where}: no GGUF model found: name a repository that has some, as OWNER/NAME-GGUF:Q4_K_M; "
            "lora-gguf fetch ADAPTER --base lists those of an adapter's base"
        )
    wanted = (quant or DEFAULT_QUANT).upper()
    match = next((entry for name in (wanted, f"UD-{wanted}") for entry in found if entry.quant == name), None)
    if match is None and not quant and len(found) == 1:
        match = found[0]
    if match is None:
        default = f" (where none is named, {DEFAULT_QUANT} is taken)"
        raise UsageError(
            f"{where}: no {printable(wanted, 40)} among its quantizations: choose one of {listed(found)}{default}"
        )
    twins = [entry for entry in found if (entry.repo, entry.quant) == (match.repo, match.quant)]
    if len(twins) > 1:
        names = " or ".join(f"hf://{entry.repo}/{printable(entry.files[0], 120)}" for entry in twins[:5])
        raise UsageError(f"{where}: {len(twins)} files of one quantization, {match.quant}: name one: {names}")
    return match


def listed(found: Iterable[Quantization]) -> str:
    names = dict.fromkeys(entry.quant or printable(entry.files[0], 60) for entry in found)
    return ", ".join(list(names)[:20]) or "no GGUF model"


def find_quantizations(base_model: str) -> list[Quantization]:
    """Return the GGUF quantizations on the Hub of ``base_model``, an id as adapters state it, the most downloaded
    first.

    A bitsandbytes variant stands for the model that it was made of, and so does a copy under the same name.
    Raises ``HubError``.
    """
    if not (is_name(base_model) and re.fullmatch(REPO_ID, base_model, re.ASCII)):
        raise HubError(f"base model '{printable(base_model, 80)}': not a Hub id: find the base's GGUF by its name")
    repos = quantizing(
        _BITSANDBYTES.sub("", base_model)
    )  # first: a Hub that cannot be asked is an error here, and only here
    models = _same_model(base_model)
    repos = models + repos + [repo for model in models[1:] for repo in quantizing(model)]
    found: list[Quantization] = []
    for repo_id in list(dict.fromkeys(repos))[: MAX_REPOS + len(models)]:
        with contextlib.suppress(HubError):  # deleted, private or gated: the others count
            found += quantizations(open_repo(repo_id))
    return found


def quantizing(model: str) -> list[str]:
    """Return the repositories of GGUFs that say that they quantize ``model``, the most downloaded first."""
    return search(model, ["gguf", f"base_model:quantized:{model}"], MAX_REPOS)


def _same_model(base_model: str) -> list[str]:
    """Return ``base_model`` without bitsandbytes' suffix, and the ids of the same name that tags give as its origin."""
    asked, models = [base_model], [_BITSANDBYTES.sub("", base_model)]
    name = models[0].partition("/")[2].lower()
    while asked and len(models) < MAX_REPOS:
        tags: list[str] = []
        with contextlib.suppress(HubError):
            tags = tags_of(asked.pop())
        origins = {tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:")} - set(models)
        same = sorted(
            origin
            for origin in origins
            if re.fullmatch(REPO_ID, origin, re.ASCII) and origin.partition("/")[2].lower() == name
        )
        models += same
        asked += same
    return models
