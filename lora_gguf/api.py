"""The library: the commands as functions, for programs. ``import lora_gguf`` offers them, and the command line calls
them.

Nothing here prints or exits. What goes wrong is a subclass of ``lora_gguf.LoraGgufError``, one line that says where,
what was expected, what was found and the way out; its ``details`` list the offenders, its ``exit_code`` is that of the
command. Arguments that make no sense are a ``UsageError``, raised before anything is downloaded or read.

Models are paths, or references to the Hub: ``OWNER/NAME``, ``OWNER/NAME:Q4_K_M``, ``hf://OWNER/NAME/FILE.gguf``.
Adapters are PEFT folders, adapter GGUFs or Hub ids (``OWNER/NAME@REVISION``); where several may be given, a name, a
pair of a name and the factor that multiplies its own scale, or a list of either. What is on the Hub is downloaded into
huggingface_hub's cache and checked; a report's ``inputs`` say where it lies.

``progress`` is called with (bytes done since the last call, bytes in all, file or tensor at work), first for downloads,
then for the work; in ``doctor`` the work is counted in samples. Where ``downloads`` is given, it is called for the
downloads instead. An exception that they raise ends the call, and leaves no file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gguf.adapters.adapter_file import AdapterFile
from lora_gguf.arguments import check_choice, check_flag, check_number, check_path, check_text, check_whole, refuse
from lora_gguf.errors import UsageError
from lora_gguf.files.imatrix import Imatrix, read_imatrix
from lora_gguf.files.output import check_target
from lora_gguf.hub import base_models
from lora_gguf.hub.base_models import Bases, bases_of
from lora_gguf.hub.downloads import fetch_adapter, fetch_adapters, fetch_imatrix, fetch_model
from lora_gguf.hub.references import Adapters, Name, scaled_names
from lora_gguf.mapping.reading import AsFound, Reading
from lora_gguf.merging.options import Policy, Resources, Writing, parse_growth
from lora_gguf.merging.provenance import imatrix_label
from lora_gguf.progress import Progress, by_file

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from lora_gguf.checks.checkup import DoctorReport
    from lora_gguf.checks.compared import CompareReport
    from lora_gguf.checks.inspection import Inspection
    from lora_gguf.commands.extract import Extraction
    from lora_gguf.commands.merge import MergeReport
    from lora_gguf.commands.push import PushReport
    from lora_gguf.commands.verify import VerifyReport
    from lora_gguf.mapping.accounts import Placement

MODEL = "a path, or a reference to the Hub"


def fetch(
    adapter: Name,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    output: Name | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the local folder (or GGUF) of ``adapter``, downloaded if need be, every file compared with its hash.

    ``output`` is a folder to copy the files to, in which ``force`` replaces files that differ. Raises ``HubError``,
    ``IntegrityError``, ``FileError``, ``UsageError``.
    """
    _check_fetch(adapter, subfolder, output, force)
    if revision is not None:
        check_text("revision", revision, "a branch, tag or commit")
    return fetch_adapter(adapter, revision, subfolder, output, force=force, progress=by_file(progress))


def bases(adapter: Name, *, subfolder: str | None = None) -> Bases:
    """Return the model that ``adapter`` was trained on, and its GGUFs on the Hub; nothing large is downloaded.

    Raises ``HubError``, ``FileError``, ``MalformedError`` where the adapter does not say.
    """
    _check_fetch(adapter, subfolder)
    return bases_of(adapter, subfolder)


def fetch_base(
    adapter: Name,
    quant: str | None = None,
    *,
    subfolder: str | None = None,
    output: Name | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the local GGUF of the model that ``adapter`` was trained on, downloaded if need be.

    ``quant`` is such as Q4_K_M, which is also what is taken without it; ``output`` a folder, or a path that ends in
    ``.gguf``, to copy it to. Raises ``UsageError`` where there is no such quantization, and the errors of ``bases``.
    """
    _check_fetch(adapter, subfolder, output, force)
    if quant is not None:
        check_text("quant", quant, "a quantization such as Q4_K_M")
    model = base_models.base_model_of(adapter, subfolder)
    return base_models.fetch_base(model, quant, output, force=force, progress=by_file(progress))


def inspect(source: Name) -> Inspection:
    """Return what a GGUF or an adapter is, from its header: a ``ModelInspection`` or an ``AdapterInspection``.

    On the Hub nothing but headers is transferred. Raises ``FileError``, ``MalformedError``, ``HubError``.
    """
    from lora_gguf.commands.inspect import inspect as work

    check_path("source", source, MODEL)
    return work(source)


def doctor(
    base: Name,
    adapters: Adapters,
    *,
    tied: str = "separate",
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
    expert_a_axis: str | None = None,
    layout_of: str | None = None,
    base_config: Name | None = None,
    again: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    downloads: Progress | None = None,
) -> DoctorReport:
    """Tell whether ``merge`` with the same arguments will work, what it costs (bytes, seconds), and what is kept by
    each rounding.

    A merge that would be refused is told by the report's ``refusal`` and not raised. Of a base on the Hub only the
    header and some rows are transferred. The estimates come from merging a sample of each tensor's rows; nothing is
    written.
    """
    check_path("base", base, MODEL)
    named = scaled_names(adapters)
    reading = Reading(tied, allow_unused, expert_b_layout, base_config, expert_a_axis, layout_of, again)
    resources = Resources(threads)
    local = fetch_adapters(named, by_file(downloads or progress))
    from lora_gguf.commands.doctor import doctor as work

    return work(base, local, reading, resources.threads, progress)


def convert(
    adapter: Name,
    out: Name,
    base: Name | None = None,
    *,
    to: str = "gguf",
    base_config: Name | None = None,
    outtype: str = "auto",
    rank: int | None = None,
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
    expert_a_axis: str | None = None,
    layout_of: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    downloads: Progress | None = None,
) -> Placement:
    """Write ``adapter`` as an adapter GGUF to ``out``, for llama.cpp's --lora; return what became of each of its
    tensors.

    The layout is that of ``base``, or of the ``config.json`` in ``base_config``, or without either of that of the model
    that the adapter names, from the Hub. ``outtype`` is auto (the smallest that is exact), f32, f16, bf16
    or q8_0. With ``to`` peft it is the way back: an adapter GGUF becomes a folder that PEFT loads.
    What is not low rank is refused (``UnsupportedError``), or approximated at ``rank``. Raises
    ``MismatchError`` where the adapter does not fit the base.
    """
    check_choice("to", to, ("gguf", "peft"))
    if base is not None:
        check_path("base", base, MODEL)
    [named] = scaled_names([adapter])
    output = AdapterFile(out, outtype, rank, force)
    reading = Reading("refuse", allow_unused, expert_b_layout, base_config, expert_a_axis, layout_of)
    files = by_file(downloads or progress)
    [(folder, _)] = fetch_adapters([named], files)
    if to == "peft":
        if base is None:
            raise UsageError("--to peft wants the base: give --base BASE.gguf, the model that the adapter is for")
        from lora_gguf.commands.unconvert import unconvert

        return unconvert(folder, out, fetch_model(base, files), reading, force=force)
    model = None if base is None else fetch_model(base, files)
    if model is None and base_config is None:
        reading = replace(reading, base_config=base_models.base_config_of(folder, files))
    from lora_gguf.commands.convert import convert as work

    return work(folder, output, model, reading, progress)


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
    expert_a_axis: str | None = None,
    layout_of: str | None = None,
    base_config: Name | None = None,
    mmproj: Name | None = None,
    again: bool = False,
    max_growth: float | str = 0.0,
    min_retention: float = 0.0,
    max_bytes: int | None = None,
    keep_split: bool = False,
    shard: str | None = None,
    modelfile: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    force: bool = False,
    skip_existing: bool = False,
    progress: Progress | None = None,
    downloads: Progress | None = None,
) -> MergeReport:
    """Write ``base`` with ``adapters`` added to ``out``, a file or a folder; None only plans.

    ``report.whole.kept`` is the share of the update that acts in the merged file (1: all of it), ``report.written`` the
    paths. ``rounding`` is auto, dither, nearest or fresh; ``type`` that of the adapted tensors, ``quantize`` a mix such
    as Q4_K_M for all tensors of a base in F16, BF16 or F32; ``max_growth`` a share of the base's size; ``max_bytes``
    the size of a shard, and ``shard`` N/COUNT one of them alone; ``again`` lets an adapter in that the base already
    holds; ``memory`` is in bytes, for the rows in work. The same arguments give the same file, whatever the memory and
    the number of threads. ``imatrix`` None takes the one in the base's repository on the Hub, if there is one, and the
    word none takes none. ``mmproj`` is the model's, into which the adapters' vision and audio part goes: it is written
    too, as mmproj-NAME.gguf, in its own types. ``executor``, one of ``concurrent.futures``, does the work: its workers
    see the files under the same paths, and ``threads`` (default: 1) and ``memory`` are those of each of its tasks.
    ``skip_existing`` leaves an output that the same merge made before: ``report.skipped``.

    Raises ``MismatchError`` (the adapter does not fit), ``UnsupportedError``, ``NumericError`` (NaN, or less than
    ``min_retention`` is kept), ``FileError`` (no space, ``out`` exists and ``force`` is not given), ``HubError``,
    ``ExecutorError`` (the executor gives up), … Then ``out`` is what it was.
    """
    check_path("base", base, MODEL)
    named = scaled_names(adapters)
    reading = Reading(tied, allow_unused, expert_b_layout, base_config, expert_a_axis, layout_of, again, mmproj)
    resources = Resources(threads, memory, executor)
    writing = None if out is None else Writing(out, max_bytes, keep_split, shard, modelfile, force, skip_existing)
    growth, measured = parse_growth(str(max_growth)), _importance(imatrix)
    policy = Policy(rounding, seed, _upper(type), _upper(quantize), measured, growth, min_retention)
    if writing and writing.one_file:
        check_target(writing.one_file, force=force, inputs=[base, *([] if mmproj is None else [mmproj])])
    files = by_file(downloads or progress)
    model, local = fetch_model(base, files), fetch_adapters(named, files)
    reading = replace(reading, mmproj=mmproj and fetch_model(mmproj, files))
    found = fetch_imatrix(base, files) if imatrix is None else None
    if found:
        policy = replace(policy, imatrix=read_imatrix(found))
    from lora_gguf.commands.merge import merge as work

    report = work(model, local, writing, policy, reading, resources, progress)
    if found:
        report.plan.warnings.append(f"{found.name}: the importance matrix beside the base is used; --imatrix none: not")
    return report


def verify(
    merged: Name,
    base: Name,
    adapters: Adapters,
    *,
    tied: str | None = None,
    allow_unused: str | None = None,
    expert_b_layout: str | None = None,
    expert_a_axis: str | None = None,
    layout_of: str | None = None,
    base_config: Name | None = None,
    imatrix: Name | Imatrix | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    downloads: Progress | None = None,
) -> VerifyReport:
    """Tell whether ``merged`` holds ``base`` plus ``adapters`` within rounding: ``report.verdict`` is right,
    wrong with the causes in ``report.findings``, or unproved, with what is ``report.missing``.

    ``tied`` None is what the merged file shows; ``imatrix`` None the one in the base's repository on the Hub, where the
    file says that it was made with it. Raises ``MismatchError`` where the adapters do not fit the base at all.
    """
    check_path("merged", merged, MODEL)
    check_path("base", base, MODEL)
    named = scaled_names(adapters)
    as_read = Reading if tied else AsFound
    reading = as_read(tied or "separate", allow_unused, expert_b_layout, base_config, expert_a_axis, layout_of)
    resources = Resources(threads)
    measured = Policy(imatrix=_importance(imatrix)).imatrix
    files = by_file(downloads or progress)
    models = fetch_model(merged, files), fetch_model(base, files)
    local = fetch_adapters(named, files)
    if imatrix is None and (label := imatrix_label(models[0])):
        found = fetch_imatrix(base, files)
        measured = read_imatrix(found) if found and found.name == label else None
    from lora_gguf.commands.verify import verify as work

    return work(*models, local, reading, measured, resources.threads, progress)


def compare(
    base: Name,
    adapters: Adapters,
    merged: Name,
    prompts: Sequence[str] = (),
    *,
    n_predict: int = 32,
    raw: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    downloads: Progress | None = None,
) -> CompareReport:
    """Let llama.cpp (the package xllamacpp) answer ``prompts`` with ``base``, with ``adapters`` at run time, and with
    ``merged``: ``report.ok`` unless the merged file does not do as the adapter, which ``report.verdict`` tells.

    Prompts are a user's messages where the base has a chat template and they are not ``raw``; without any some general
    ones are asked. The work is counted in answers. Raises ``UnsupportedError`` where llama.cpp is not installed or
    cannot apply such an adapter.
    """
    check_path("base", base, MODEL)
    check_path("merged", merged, MODEL)
    named = scaled_names(adapters)
    from lora_gguf.checks.llama import check_installed
    from lora_gguf.checks.prompts import Prompts

    asked, resources = Prompts(tuple(prompts), n_predict, raw), Resources(threads)
    check_installed("compare")
    files = by_file(downloads or progress)
    models = fetch_model(base, files), fetch_model(merged, files)
    local = fetch_adapters(named, files)
    from lora_gguf.commands.compare import compare as work

    return work(models[0], local, models[1], asked, threads=resources.threads, progress=progress)


def push(
    merged: Name,
    repo: str,
    *,
    public: bool = False,
    kept: float | None = None,
    expected_loss: float | None = None,
    bars: bool = False,
) -> PushReport:
    """Upload the GGUF ``merged`` (of a split one all shards) to the repository ``repo`` on the Hub, which is made where
    there is none, with a Modelfile and a model card.

    A new repository is private unless ``public``. ``kept`` and ``expected_loss``, of a ``MergeReport``, stand in the
    card. ``bars`` lets huggingface_hub show its own. Raises ``HubError``, ``FileError``, ``MalformedError``; nothing is
    committed then.
    """
    check_path("merged", merged)
    check_text("repo", repo, "OWNER/NAME")
    check_flag("public", public)
    for name, value in (("kept", kept), ("expected_loss", expected_loss)):
        if value is not None:
            check_number(name, value)
    from lora_gguf.commands.card import Told
    from lora_gguf.commands.push import push as work
    from lora_gguf.files.base import Base
    from lora_gguf.hub.uploads import make_repo

    with Base(merged):  # refused here, before a repository is made
        pass
    return work(merged, make_repo(repo, public=public), Told(kept, expected_loss), bars=bars)


def extract(
    base: Name,
    tuned: Name,
    out: Name,
    rank: int | str = 32,
    *,
    outtype: str = "f16",
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    downloads: Progress | None = None,
) -> Extraction:
    """Write the adapter of ``rank`` that turns the GGUF ``base`` into ``tuned`` to ``out``, as nearly as that rank can.

    The rank ``auto`` is for each tensor the least that keeps 99% of its difference's energy, 256 at most.
    Raises ``MismatchError`` where the two are not of one model.
    """
    check_path("base", base, MODEL)
    check_path("tuned", tuned, MODEL)
    if isinstance(rank, str) and rank != "auto":
        raise refuse("rank", "a whole number from 1, or auto", rank)
    if rank != "auto":
        check_whole("rank", rank, 1)
    output = AdapterFile(out, outtype, None if rank == "auto" else int(rank), force)
    resources = Resources(threads)
    files = by_file(downloads or progress)
    before, after = fetch_model(base, files), fetch_model(tuned, files)
    from lora_gguf.commands.extract import extract as work

    return work(before, after, output, resources.threads, progress)


def _check_fetch(adapter: Name, subfolder: str | None, output: Name | None = None, force: bool = False) -> None:
    check_path("adapter", adapter, MODEL)
    if subfolder is not None:
        check_text("subfolder", subfolder, "a folder within the repository")
    if output is not None:
        check_path("output", output)
    check_flag("force", force)


def _importance(imatrix: Name | Imatrix | None) -> Imatrix | None:
    if not isinstance(imatrix, (str, os.PathLike)):
        return imatrix
    if os.fspath(imatrix) == "none":
        return None
    check_path("imatrix", imatrix)
    return read_imatrix(imatrix)


def _upper(name: str | None) -> str | None:
    """Return the name of a type as llama.cpp's tools take it, in any case."""
    return name.upper() if isinstance(name, str) else name
