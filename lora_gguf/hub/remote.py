"""A file of a Hub repository that is read where it lies: only the parts that are asked for are transferred."""

from __future__ import annotations

from typing import Any

from lora_gguf.errors import HubError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.input_file import InputFile, Source
from lora_gguf.hub.failures import host
from lora_gguf.hub.quantizations import Quantization
from lora_gguf.hub.repository import Repo, client, retrying

MIN_WINDOW, MAX_WINDOW = 64 << 10, 1 << 20


def open_source(repo: Repo, name: str) -> Source:
    """Return the file ``name`` of ``repo``: the one in the cache, or the one on the Hub. Raises ``HubError``,
    ``FileError``.
    """
    cached = repo.snapshot / name
    return InputFile(cached) if cached.is_file() else RemoteFile(repo, name)


def open_model(repo: Repo, chosen: Quantization) -> Base:
    """Return a model on the Hub, open for reading where it lies. Raises ``HubError``, ``MalformedError``."""
    return Base(chosen.files[0], lambda path: GgufReader(open_source(repo, path.as_posix())))


class RemoteFile(Source):
    """A file on the Hub, at the commit of ``repo``, by HTTP range requests; what was read once is kept in memory.

    Raises ``HubError``.
    """

    def __init__(self, repo: Repo, name: str):
        size = repo.files[name].size
        if size is None:
            raise HubError(f"{repo.id}: {printable(name)}: {host()} does not say how large it is: check HF_ENDPOINT")
        self.repo, self.name, self.size = repo, name, size
        self.label = printable(name.rpartition("/")[2])
        self.window = min(max(size // 1000, MIN_WINDOW), MAX_WINDOW)
        self._parts: list[tuple[int, bytes]] = []

    def read_into(self, position: int, buffer: Any, label: str = "") -> None:
        view = memoryview(buffer).cast("B")
        if len(view):
            view[:] = self._part(position, len(view))

    def _part(self, position: int, n_bytes: int) -> bytes:
        for start, part in reversed(self._parts):
            if start <= position and position + n_bytes <= start + len(part):
                return part[position - start : position - start + n_bytes]
        with client(self.repo, self.name):
            part = retrying(lambda: self._ask(position, n_bytes))
        self._parts.append((position, part))
        return part

    def _ask(self, position: int, n_bytes: int) -> bytes:
        """Make one request; its body is only read where it is the part that was asked for, and no whole model."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo.id, self.name, revision=self.repo.commit, endpoint=constants.ENDPOINT)
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={position}-{position + n_bytes - 1}",
            "Accept-Encoding": "identity",
        }
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            wanted = f"bytes {position}-{position + n_bytes - 1}/{self.size}"
            if response.status_code != 206 or response.headers.get("content-range") != wanted:
                raise HubError(
                    f"{self.repo.id}: {self.label}: {host()} does not send parts of it: download it, and name the file"
                )
            part = b"".join(response.iter_bytes())
        if len(part) != n_bytes:
            raise HubError(f"{self.repo.id}: {self.label}: expected {n_bytes} bytes, found {len(part)}: try again")
        return part
