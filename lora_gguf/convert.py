"""Path 1: an adapter directory becomes an adapter GGUF that llama.cpp loads with --lora."""

from __future__ import annotations

import os
from pathlib import Path

from lora_gguf import hparams
from lora_gguf.adapter import Adapter, read_adapter
from lora_gguf.adapter_config import read_json
from lora_gguf.errors import UnsupportedError, UsageError
from lora_gguf.gguf_reader import GgufReader
from lora_gguf.lora import OUT_TYPES, write_adapter_gguf
from lora_gguf.placement import Placement, gguf_pairs


def convert(
    directory: str | os.PathLike,
    out: str | os.PathLike,
    base: str | os.PathLike | None = None,
    base_config: str | os.PathLike | None = None,
    outtype: str = "f32",
    *,
    force: bool = False,
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
) -> Placement:
    """Write the PEFT adapter in ``directory`` as a GGUF to ``out`` and return the account of its tensors.

    The layout follows the header of ``base``, a GGUF, and ``base_config``, a ``config.json`` or the folder that holds it,
    where the GGUF does not say or is not given. ``outtype`` is one of ``OUT_TYPES``; F32, the default, is exact.
    """
    if outtype not in OUT_TYPES:
        raise UsageError(f"--outtype {outtype}: expected one of {', '.join(OUT_TYPES)}")
    adapter = read_adapter(directory, expert_b_layout)
    model = base_model(base, base_config)
    placement = gguf_pairs(adapter, model, updates=True, allow_unused=allow_unused)
    check_low_rank(placement, adapter)
    inputs = [adapter.directory, *([base] if base else [])]
    write_adapter_gguf(out, placement.pairs, model.architecture, outtype, metadata(adapter), force=force, inputs=inputs)
    return placement


def check_low_rank(placement: Placement, adapter: Adapter) -> None:
    """Turn updates that are low rank after all into pairs; raise ``UnsupportedError`` that lists the others."""
    others = []
    for update in placement.updates:
        pair = update.as_pair()
        placement.pairs += [pair] if pair else []
        others += [] if pair else [f"{update.name}: {update.kind}"]
    placement.updates = []
    if others:
        raise UnsupportedError(
            f"{adapter.label}: {others[0]}: an adapter GGUF holds low-rank updates only: merge it into the base instead", others
        )


def base_model(base: str | os.PathLike | None, base_config: str | os.PathLike | None) -> hparams.Hparams:
    """The base's dimensions, from its GGUF and its ``config.json``."""
    config = None
    if base_config is not None:
        path = Path(base_config)
        config = read_json(path / "config.json" if path.is_dir() else path)
    if base is not None:
        with GgufReader(base) as reader:
            return hparams.from_base(reader, config)
    if config is None:
        raise UsageError("the layout depends on the base: give --base BASE.gguf or --base-config DIR")
    return hparams.from_config(config)


def metadata(adapter: Adapter) -> list[tuple[str, object, str]]:
    """Further keys of the file: what it is called and what it was trained on."""
    found: list[tuple[str, object, str]] = [("general.name", adapter.label, "str")]
    if adapter.invocation_tokens:
        found.append(("adapter.alora.invocation_tokens", adapter.invocation_tokens, "u32"))
    if adapter.base_model:
        found += [
            ("general.base_model.count", 1, "u32"),
            ("general.base_model.0.name", adapter.base_model.rpartition("/")[2], "str"),
        ]
    return found
