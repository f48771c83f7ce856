"""The model card of a merged file, from what its metadata say of how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.errors import printable
from lora_gguf.files.base import Base
from lora_gguf.merging.loss import loss_text
from lora_gguf.merging.provenance import PREFIX, repos_of
from lora_gguf.text import share_text, size_text

MARK = "<!-- This card was made by lora-gguf; a later push makes it anew unless this line is taken out. -->"


@dataclass(frozen=True)
class Told:
    """What a merge has told of its file: the share of the adapters that it keeps, and the share of their effect that is
    expected to be lost; None where it has not.
    """

    kept: float | None = None
    expected_loss: float | None = None


def card(model: Base, repo_id: str, told: Told = Told()) -> str:
    """Return the card of the merged file ``model`` for the repository ``repo_id``, in Markdown."""
    name = repo_id.rpartition("/")[2]
    made = f"{name} is one GGUF with {_adapters(model) or 'all that it needs'} merged in." if _adapters(model) else ""
    parts = [
        _front(model),
        MARK,
        f"# {name}",
        made,
        _run(model, repo_id),
        _files(model),
        _made(model, told),
        _check(model),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _own(model: Base, key: str, default: object = "") -> object:
    return model.get(PREFIX + key, default)


def _front(model: Base) -> str:
    """Return the metadata that the Hub reads, as YAML."""
    licence = model.get("general.license")
    entries: dict[str, object] = {
        "base_model": parents(model),
        "license": licence if isinstance(licence, str) and re.fullmatch(r"[\w.-]+", licence, re.ASCII) else None,
        "language": [word for word in model.get("general.languages") or [] if re.fullmatch(r"[a-z]{2,3}", str(word))],
        "library_name": "gguf",
        "pipeline_tag": "text-generation" if model.get("tokenizer.chat_template") else None,
        "tags": ["lora-gguf", "lora", "llama-cpp", "ollama"],
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items() if value]
    return "\n".join(["---", *lines, "---"])


def parents(model: Base) -> list[str]:
    """Return the repositories on the Hub that the file names as its base and its adapters."""
    return list(dict.fromkeys(filter(None, repos_of(model))))


def _run(model: Base, repo_id: str) -> str:
    first = model.paths[0].name
    lines = [f"llama-cli -hf {repo_id} --hf-file {printable(first)}"]
    if len(model.paths) == 1:
        lines += [
            f"ollama run hf.co/{repo_id}",
            f"hf download {repo_id} --local-dir . && ollama create {repo_id.rpartition('/')[2].lower()} -f Modelfile",
        ]
    return "\n".join(["## Run it", "", *(f"    {line}" for line in lines)])


def _files(model: Base) -> str:
    rows = [f"| {_cell(path.name)} | {size_text(path.stat().st_size)} |" for path in model.paths]
    return "\n".join(["## Files", "", "| file | size |", "|---|---|", *rows])


def _adapters(model: Base) -> str:
    names, scales = _own(model, "adapter.names", []), _own(model, "adapter.scales", [])
    return ", ".join(
        f"{_cell(name)}" + ("" if scale == 1 else f" at scale {scale:g}")
        for name, scale in zip(_list(names), _list(scales), strict=False)
    )


def _list(value: object) -> Sequence:
    return value if isinstance(value, list) else []


def _made(model: Base, told: Told) -> str:
    """Return how the file was made, as a table; nothing for a file that does not say."""
    if not _own(model, "version"):
        return ""
    loss = told.expected_loss
    lost = "" if loss is None else f"{loss_text(loss)} (expected, within a factor of 2)"
    facts = {
        "base": ", ".join(parents(model)[:1]) or model.get("general.basename") or model.get("general.name"),
        "sha256 of the base": ", ".join(map(str, _list(_own(model, "base.sha256")))),
        "adapters": _adapters(model),
        "kept of the adapters": "" if told.kept is None else f"{share_text(told.kept)} (1 is all)",
        "lost of their effect": lost,
        "rounding": f"{_own(model, 'rounding')}, seed {_own(model, 'seed')}",
        "importance matrix": _own(model, "imatrix"),
        "licence of the base": model.get("general.license"),
        "made by": f"lora-gguf {_own(model, 'version')}",
    }
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
    return "\n".join(["## How it was made", "", "| | |", "|---|---|", *rows])


def _check(model: Base) -> str:
    names = [printable(name) for name in _list(_own(model, "adapter.names", []))]
    if not names:
        return ""
    scales = [f":{scale:g}" if scale != 1 else "" for scale in _list(_own(model, "adapter.scales", []))]
    loras = " ".join(f"--lora {name}{scale}" for name, scale in zip(names, scales, strict=False))
    first = printable(Path(model.paths[0]).name)
    return "\n".join(
        [
            "## Check it",
            "",
            "This proves, tensor by tensor, that the file holds its base and the adapters:",
            "",
            f"    lora-gguf verify {first} --base BASE.gguf {loras}",
        ]
    )


def _cell(value: object) -> str:
    """Return ``value`` as it can stand in a cell of a table."""
    return re.sub(r"([|<>`*_\[\]\\])", r"\\\1", printable(value, 200))
