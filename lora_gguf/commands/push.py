"""A merged file to a repository on the Hub, with its Modelfile and a card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.commands.card import MARK, Told, card
from lora_gguf.files.base import Base
from lora_gguf.hub.repository import Repo, download
from lora_gguf.hub.uploads import upload
from lora_gguf.merging.modelfile import modelfile

CARD, MODELFILE = "README.md", "Modelfile"


@dataclass(frozen=True)
class PushReport:
    """What was pushed: the repository, the address of the commit, the files' names; ``own_card`` says that the card
    there is its owner's and was left as it is.
    """

    repo_id: str
    url: str
    files: tuple[str, ...]
    own_card: bool

    def as_dict(self) -> dict:
        """Return the same as plain data for JSON."""
        return {"repo": self.repo_id, "url": self.url, "files": list(self.files), "own_card": self.own_card}


def push(merged: str | os.PathLike[str], repo: Repo, told: Told = Told(), *, bars: bool = False) -> PushReport:
    """Upload the GGUF ``merged`` (of a split one all shards), its Modelfile and its card to ``repo``.

    ``told`` is what the merge has just measured. A card that somebody wrote there is left as it is.
    """
    with Base(merged) as model:
        files: dict[str, Path | bytes] = {path.name: path for path in model.paths}
        if len(model.paths) == 1:
            files[MODELFILE] = modelfile(model, model.paths[0].name).encode()
        own_card = has_own_card(repo)
        if not own_card:
            files[CARD] = card(model, repo.id, told).encode()
        url = upload(repo, files, f"Add {model.paths[0].name}", bars=bars)
        model.check_unchanged()
    return PushReport(repo.id, url, tuple(files), own_card)


def has_own_card(repo: Repo) -> bool:
    """Return whether ``repo`` has a card that its owner wrote."""
    return CARD in repo.files and MARK not in download(repo, CARD).read_text(encoding="utf-8", errors="replace")
