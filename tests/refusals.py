"""Every file of the corpora as a user meets it: named on the command line of a merge or a conversion."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests import gguf_corpus, test_adapter_corpus, test_torch_reader, test_weights
from tests.contract import Hole, Trace, check_preserved, check_refusal
from tests.faulty import OLD, Case
from tests.forked import snapshot

CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}).encode()
MERGE = ("merge", "llama.gguf", "bad", "-o", "out.gguf", "--force", "-t", "1")
CONVERT = ("convert", "bad", "--base", "llama.gguf", "-o", "out.gguf", "--force")


def _base(folder: Path, content: bytes) -> tuple:
    (folder / "bad.gguf").write_bytes(content)
    return ("merge", "bad.gguf", "peft", "-o", "out.gguf", "--force", "-t", "1")


def _adapter_gguf(folder: Path, content: bytes) -> tuple:
    (folder / "bad.gguf").write_bytes(content)
    return ("merge", "llama.gguf", "bad.gguf", "-o", "out.gguf", "--force", "-t", "1")


def _imatrix(folder: Path, content: bytes) -> tuple:
    (folder / "bad.gguf").write_bytes(content)
    return ("merge", "llama.gguf", "peft", "--imatrix", "bad.gguf", "-o", "out.gguf", "--force", "-t", "1")


def _directory(folder: Path, config: bytes, name: str, weights: bytes) -> None:
    (folder / "bad").mkdir()
    (folder / "bad" / "adapter_config.json").write_bytes(config)
    (folder / "bad" / name).write_bytes(weights)


def _weights(folder: Path, content: bytes) -> tuple:
    _directory(folder, CONFIG, "adapter_model.safetensors", content)
    return MERGE


def _index(folder: Path, content: bytes) -> tuple:
    _directory(folder, CONFIG, "adapter_model.safetensors.index.json", content)
    return MERGE


def _bin(folder: Path, content: bytes) -> tuple:
    _directory(folder, CONFIG, "adapter_model.bin", content)
    return CONVERT


def _config(folder: Path, content: bytes) -> tuple:
    _directory(folder, content, "adapter_model.safetensors", safetensors.numpy.save(test_adapter_corpus.tensors()))
    return CONVERT


def _base_config(folder: Path, content: bytes) -> tuple:
    (folder / "config.json").write_bytes(content)
    return ("convert", "peft", "--base-config", "config.json", "-o", "out.gguf", "--force")


def _tensors(folder: Path, content: tuple) -> tuple:
    return _weights(
        folder, safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in content[0].items()})
    )


GGUF = {**gguf_corpus.REFUSED, **gguf_corpus.STRICTER, **gguf_corpus.ACCEPTED}
JSON = {
    **test_adapter_corpus.NO_JSON,
    **test_adapter_corpus.WRONG_FIELDS,
    **test_adapter_corpus.UNSUPPORTED_FIELDS,
    **test_adapter_corpus.READ,
}
SAFETENSORS = {**test_weights.REFUSED, **test_weights.STRICTER, **test_weights.UNSUPPORTED, **test_weights.ACCEPTED}
# what the file is -> (what puts it in place and gives the arguments, the corpus)
CORPORA: dict[str, tuple[Callable, dict]] = {
    "base": (_base, GGUF),
    "adapter GGUF": (_adapter_gguf, GGUF),
    "imatrix": (_imatrix, GGUF),
    "safetensors": (_weights, SAFETENSORS),
    "index": (_index, JSON),
    "bin": (_bin, test_torch_reader.HOSTILE),
    "configuration": (_config, JSON),
    "configuration of the base": (_base_config, JSON),
    "tensors": (_tensors, test_adapter_corpus.WEIGHTS),
}


def check(case: Case, put: Callable, content) -> None:
    """Raise ``Hole`` unless the file is refused as the contract says, or merged into a whole output."""
    case.reset()
    arguments = put(case.folder, content)
    before = snapshot(case.folder)
    result = case.forge.run(*arguments, cwd=case.folder)
    if result.code == 0:
        if "Traceback" in result.err or (case.folder / "out.gguf").read_bytes() == OLD:
            raise Trace(result.err)
        return
    check_refusal(result, quick=len(content) < 1_000_000)
    check_preserved(case.folder, before)


def holes(case: Case, corpus: str, every: int = 1) -> Iterator[str]:
    """What went wrong with the files of a corpus, or with one in ``every``."""
    put, files = CORPORA[corpus]
    for name in list(files)[::every]:
        try:
            check(case, put, files[name])
        except Hole as hole:
            yield f"{type(hole).__name__}: {corpus}: {name}: {hole}"
