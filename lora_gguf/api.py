"""The library: the commands as functions, for programs. ``import lora_gguf`` offers them.

Nothing here prints or exits. What goes wrong is a subclass of ``lora_gguf.LoraGgufError``, one line that says where,
what was expected, what was found and the way out; its ``details`` list the offenders, its ``exit_code`` is that of the
command.

Models are paths, or references to the Hub: ``OWNER/NAME``, ``OWNER/NAME:Q4_K_M``, ``hf://OWNER/NAME/FILE.gguf``.
Adapters are PEFT folders, adapter GGUFs or Hub ids (``OWNER/NAME@REVISION``); where several may be given, a name, a
pair of a name and the factor that multiplies its own scale, or a list of either. What is on the Hub is downloaded into
huggingface_hub's cache and checked.

``progress`` is called with (bytes done since the last call, bytes in all, file or tensor at work), first for downloads,
then for the work; in ``doctor`` the work is counted in samples. An exception that it raises ends the call, and leaves
no file.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_gguf.checks.checkup import DoctorReport
from lora_gguf.checks.inspection import Inspection
from lora_gguf.commands import convert as _convert
from lora_gguf.commands import doctor as _doctor
from lora_gguf.commands import extract as _extract
from lora_gguf.commands import inspect as _inspect
from lora_gguf.commands import merge as _merge
from lora_gguf.commands import verify as _verify
from lora_gguf.files.imatrix import Imatrix, read_imatrix
from lora_gguf.hub import adapters as _fetch
from lora_gguf.hub.inputs import Adapters, Name, local_adapters, local_model, scaled_names
from lora_gguf.mapping.accounts import Placement
from lora_gguf.merging.growth import parse_growth
from lora_gguf.merging.plan import Policy
from lora_gguf.progress import Progress, by_file


def fetch(
    adapter: Name,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    output: Name | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The local folder (or GGUF) of ``adapter``, downloaded if need be, every file compared with its hash.

    ``output`` is a folder to copy the files to, in which ``force`` replaces files that differ. Raises ``HubError``,
    ``IntegrityError``, ``FileError``, ``UsageError``.
    """
    return _fetch.fetch(adapter, revision, subfolder, output, force=force, progress=by_file(progress))


def inspect(source: Name) -> Inspection:
    """What a GGUF or an adapter is, from its header: a ``ModelInspection`` or an ``AdapterInspection``.

    On the Hub nothing but headers is transferred. Raises ``FileError``, ``MalformedError``, ``HubError``.
    """
    return _inspect.inspect(source)


def doctor(
    base: Name,
    adapters: Adapters,
    *,
    tied: str = "separate",
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
    base_config: Name | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DoctorReport:
    """Whether ``merge`` with the same arguments will work, what it costs (bytes, seconds), and what is kept by each
    rounding.

    A merge that would be refused is told by the report's ``refusal`` and not raised. Of a base on the Hub only the
    header and some rows are transferred. The estimates come from merging a sample of each tensor's rows; nothing is
    written.
    """
    local = local_adapters(scaled_names(adapters), by_file(progress))
    return _doctor.doctor(
        base,
        local,
        tied=tied,
        allow_unused=allow_unused,
        expert_b_layout=expert_b_layout,
        base_config=base_config,
        threads=threads,
        progress=progress,
    )


def convert(
    adapter: Name,
    out: Name,
    base: Name | None = None,
    *,
    base_config: Name | None = None,
    outtype: str = "f32",
    rank: int | None = None,
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Placement:
    """Write ``adapter`` as an adapter GGUF to ``out``, for llama.cpp's --lora; returns what became of each of its
    tensors.

    The layout is that of ``base``, or of the ``config.json`` in ``base_config``. ``outtype`` is f32 (exact), f16, bf16
    or q8_0. What is not low rank is refused (``UnsupportedError``), or approximated at ``rank``. Raises
    ``MismatchError`` where the adapter does not fit the base.
    """
    downloads = by_file(progress)
    return _convert.convert(
        _fetch.fetch(adapter, progress=downloads),
        out,
        base and local_model(base, downloads),
        base_config,
        outtype,
        force=force,
        allow_unused=allow_unused,
        expert_b_layout=expert_b_layout,
        rank=rank,
        progress=progress,
    )


def merge(
    base: Name,
    adapters: Adapters,
    out: Name | None,
    *,
    rounding: str = "auto",
    seed: int = 0,
    type: str | None = None,
    quantize: str | None = None,
    imatrix: Name | Imatrix | None = None,
    tied: str = "separate",
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
    base_config: Name | None = None,
    max_growth: float | str = 0.0,
    min_retention: float = 0.0,
    max_bytes: int | None = None,
    keep_split: bool = False,
    shard: str | None = None,
    modelfile: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> _merge.MergeReport:
    """Write ``base`` with ``adapters`` added to ``out``, a file or a folder; None only plans.

    ``report.whole.kept`` is the share of the update that acts in the merged file (1: all of it), ``report.written`` the
    paths. ``rounding`` is auto, dither, nearest or fresh; ``type`` that of the adapted tensors, ``quantize`` a mix such
    as Q4_K_M for all tensors of a base in F16, BF16 or F32; ``max_growth`` a share of the base's size; ``max_bytes``
    the size of a shard, and ``shard`` N/COUNT one of them alone; ``memory`` is in bytes, for the rows in work. The same
    arguments give the same file, whatever the memory and the number of threads.

    Raises ``MismatchError`` (the adapter does not fit), ``UnsupportedError``, ``NumericError`` (NaN, or less than
    ``min_retention`` is kept), ``FileError`` (no space, ``out`` exists and ``force`` is not given), ``HubError``, …
    Then ``out`` is what it was.
    """
    downloads = by_file(progress)
    policy = Policy(rounding, seed, type and type.upper(), quantize and quantize.upper(), importance(imatrix))
    return _merge.merge(
        local_model(base, downloads),
        local_adapters(scaled_names(adapters), downloads),
        out,
        policy,
        tied=tied,
        allow_unused=allow_unused,
        expert_b_layout=expert_b_layout,
        base_config=base_config,
        max_growth=parse_growth(str(max_growth)),
        min_retention=min_retention,
        max_bytes=max_bytes,
        shards=keep_split,
        shard=shard,
        modelfile=modelfile,
        memory=memory,
        threads=threads,
        force=force,
        progress=progress,
    )


def verify(
    merged: Name,
    base: Name,
    adapters: Adapters,
    *,
    expert_b_layout: str | None = None,
    base_config: Name | None = None,
    imatrix: Name | Imatrix | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> _verify.VerifyReport:
    """Whether ``merged`` holds ``base`` plus ``adapters`` within rounding: ``report.ok``, else ``report.findings`` with
    the causes.

    Raises ``MismatchError`` where the adapters do not fit the base at all.
    """
    downloads = by_file(progress)
    return _verify.verify(
        local_model(merged, downloads),
        local_model(base, downloads),
        local_adapters(scaled_names(adapters), downloads),
        expert_b_layout=expert_b_layout,
        base_config=base_config,
        imatrix=importance(imatrix),
        threads=threads,
        progress=progress,
    )


def extract(
    base: Name,
    tuned: Name,
    out: Name,
    rank: int = 32,
    *,
    outtype: str = "f16",
    force: bool = False,
    progress: Progress | None = None,
) -> _extract.Extraction:
    """Write the adapter of ``rank`` that turns the GGUF ``base`` into ``tuned`` to ``out``, as nearly as that rank can.

    Raises ``MismatchError`` where the two are not of one model.
    """
    downloads = by_file(progress)
    models = [local_model(source, downloads) for source in (base, tuned)]
    return _extract.extract(*models, out, rank, outtype, force=force, progress=progress)


def importance(imatrix: Name | Imatrix | None) -> Imatrix | None:
    return read_imatrix(imatrix) if isinstance(imatrix, (str, os.PathLike)) else imatrix
