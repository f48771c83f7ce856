"""Checks that quick tests and ``make chaos`` share: mutants of files against the judges of their formats."""

from __future__ import annotations

import time
from pathlib import Path

import safetensors

from lora_gguf.errors import IntegrityError, LoraGgufError, MalformedError, UnsupportedError
from lora_gguf.files.gguf_reader import GgufReader
from lora_gguf.files.weights import read_weights
from tests.ggml_judge import Judge
from tests.mutants import bin_mutants, gguf_mutants, safetensors_mutants


def read_gguf(path, content: bytes | None = None) -> dict:
    """What our reader says of a file, in the judge's terms."""
    if content is not None:
        path.write_bytes(content)
    with GgufReader(path) as reader:
        return {
            "version": reader.version,
            "alignment": reader.alignment,
            "data": reader.data_position,
            "keys": [[key.encode("utf-8", "surrogateescape").hex(), entry.type] for key, entry in reader.kv.items()],
            "tensors": [_tensor(info) for info in reader.tensors.values()],
        }


def agreed(ours: dict, theirs: dict) -> bool:
    """Equal in everything; where there are no tensors, libggml does not align the place where their data would
    start.
    """
    return {**ours, "data": 0} == {**theirs, "data": 0} and (ours["data"] == theirs["data"] or not ours["tensors"])


def _tensor(info) -> list:
    dims = [*reversed(info.shape), 1, 1, 1, 1][:4]
    return [info.name.encode().hex(), info.type.id, *dims, info.offset, info.n_bytes]


def check_gguf_mutants(path: Path, judge: Judge, count: int, seed: int) -> int:
    """Assert that libggml accepts every mutant that we accept, and reads the same; return how many these were."""
    n_accepted = 0
    for content in gguf_mutants(count, seed):
        ours = refusal_or(lambda: read_gguf(path, content))
        if ours is not None:
            theirs = judge.describe(content)
            assert theirs is not None and agreed(ours, theirs), content
            n_accepted += 1
    return n_accepted


def check_safetensors_mutants(path: Path, count: int, seed: int) -> int:
    """As for GGUF, with the safetensors library as the judge."""
    n_accepted = 0
    for content in safetensors_mutants(count, seed):
        path.write_bytes(content)
        ours = refusal_or(lambda: read_weights(path))
        if ours is not None:
            theirs = dict(safetensors.deserialize(content))
            assert ours.keys() == theirs.keys() and all(
                list(ours[name].shape) == theirs[name]["shape"] for name in ours
            ), content
            assert all(
                len(t["data"]) == ours[n].nbytes // (2 if t["dtype"] in ("BF16",) else 1) for n, t in theirs.items()
            ), content
            n_accepted += 1
    return n_accepted


def check_bin_mutants(path: Path, count: int, seed: int) -> int:
    """Assert that a mutant of a PyTorch file is refused, or read as no more than the file can hold."""
    n_accepted = 0
    for content in bin_mutants(count, seed):
        path.write_bytes(content)
        ours = refusal_or(lambda: read_weights(path))
        if ours is not None:
            assert sum(array.nbytes for array in ours.values()) <= 8 * len(content), content
            n_accepted += 1
    return n_accepted


def refusal_or(call):
    """The result of ``call``; None where it refuses its input as it should: soon, and in one line."""
    started = time.process_time()
    try:
        return call()
    except LoraGgufError as error:
        assert isinstance(error, (MalformedError, UnsupportedError, IntegrityError)) and str(error).isprintable()
        return None
    finally:
        assert time.process_time() - started < 2
