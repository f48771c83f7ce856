"""Does the merged file do what the adapter does? llama.cpp answers with base, adapter at run time, and merged file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.adapters.adapter_file import AdapterFile
from lora_gguf.checks.closeness import Closeness
from lora_gguf.checks.compared import CompareReport, Spoken
from lora_gguf.checks.llama import Answer, Llama, Logprobs, check_installed
from lora_gguf.checks.prompts import BEGINNINGS, QUESTIONS, Prompts
from lora_gguf.commands.convert import convert
from lora_gguf.errors import MismatchError, UnsupportedError, printable
from lora_gguf.files.base import Base
from lora_gguf.files.under_way import temporary_folder
from lora_gguf.mapping.sources import is_gguf
from lora_gguf.progress import Progress

NOT_AT_RUN_TIME = (
    "llama.cpp cannot apply this adapter at run time, so nothing can be compared: 'lora-gguf verify' proves what the "
    "merged file holds"
)


def compare(
    base: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    merged: str | os.PathLike[str],
    prompts: Prompts = Prompts(),
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Let llama.cpp answer ``prompts`` with ``base``, with ``adapters`` (paths, each with the factor of its scale) at
    run time, and with ``merged``, and measure how near base and merged file are on the adapter's own words.

    ``progress`` is called with (answers done since the last call, answers in all, which model). Raises
    ``UnsupportedError`` where llama.cpp is not installed, or cannot apply such an adapter.
    """
    check_installed("compare")
    with Base(base) as model, Base(merged) as other:
        check_kin(model, other)
        before, after = model.paths[0], other.paths[0]
        chat = bool(model.get("tokenizer.chat_template")) and not prompts.raw
    spoken = [Spoken(prompt) for prompt in prompts.texts or (QUESTIONS if chat else BEGINNINGS)]
    report = CompareReport(printable(before.name), printable(after.name), spoken)

    def done(what: str) -> None:
        if progress:
            progress(1, 3 * len(spoken), what)

    with run_time_adapters(adapters, before) as loras:
        llama = Llama(before, loras, threads=threads)
        words = []
        for part in spoken:
            words.append(spoken_words(llama, llama.prompt_tokens(part.prompt, chat=chat), prompts.n_predict))
            part.answers["adapter"] = words[-1].answer.text.strip()
            done("adapter")
        del llama
    plain: list[list[Logprobs]] = []
    for name, path in (("base", before), ("merged", after)):
        llama = Llama(path, threads=threads)
        for k, (part, said) in enumerate(zip(spoken, words, strict=True)):
            part.answers[name] = llama.answer(said.asked, prompts.n_predict).text.strip()
            heard = listen(llama, said.asked, said.answer)
            if name == "base":
                plain.append(heard)
                weigh(part.again, said.answer, said.again, heard)
            weigh(getattr(part, name), said.answer, heard, plain[k])
            done(name)
        del llama
    return report


@dataclass(frozen=True)
class Words:
    """What the adapter at run time says after ``asked``, and what it says ``again`` at each of these words."""

    asked: list[int]
    answer: Answer
    again: list[Logprobs]


def spoken_words(llama: Llama, asked: list[int], n_predict: int) -> Words:
    """Let the adapter answer, then ask it at each of its own words after it has read them all at once."""
    answer = llama.answer(asked, n_predict)
    llama.next_logprobs([*asked, *answer.tokens], anew=True)
    backwards = [llama.next_logprobs([*asked, *answer.tokens[:k]]) for k in reversed(range(len(answer.logprobs)))]
    return Words(asked, answer, backwards[::-1])


def listen(llama: Llama, asked: list[int], answer: Answer) -> list[Logprobs]:
    """Return what ``llama`` would say at each word of an answer."""
    return [llama.next_logprobs([*asked, *answer.tokens[:k]]) for k in range(len(answer.logprobs))]


def weigh(closeness: Closeness, answer: Answer, heard: Sequence[Logprobs], plain: Sequence[Logprobs]) -> None:
    """Add the words of an answer as another model ``heard`` them, the base hearing ``plain``."""
    for told in zip(answer.logprobs, heard, plain, strict=True):
        closeness.add(*told)


def check_kin(base: Base, merged: Base) -> None:
    """Raise ``MismatchError`` where one file cannot have been made of the other; a merge may add tokens."""
    theirs, ours = printable(base.architecture), printable(merged.architecture)
    n_theirs, n_ours = (model.length("tokenizer.ggml.tokens") for model in (base, merged))
    if ours != theirs or n_ours < n_theirs:
        raise MismatchError(
            f"{merged.label}: {ours} of {n_ours} tokens, not made of {base.label}, {theirs} of {n_theirs} tokens: give "
            "its own base"
        )


@contextmanager
def run_time_adapters(
    adapters: Sequence[tuple[str | os.PathLike[str], float]], base: Path
) -> Iterator[list[tuple[Path, float]]]:
    """Yield the adapters as GGUFs that llama.cpp loads beside ``base``; PEFT's are converted for the time."""
    with temporary_folder() as folder:
        yield [(_as_gguf(path, base, folder / f"{i}.gguf"), scale) for i, (path, scale) in enumerate(adapters)]


def _as_gguf(path: str | os.PathLike[str], base: Path, target: Path) -> Path:
    if is_gguf(path):
        return Path(path)
    try:
        placement = convert(path, AdapterFile(target), base)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error} ({NOT_AT_RUN_TIME})", error.details) from None
    if shared := [pair.name for pair in placement.pairs if pair.shared]:
        raise UnsupportedError(f"{printable(path)}: it adapts {shared[0]}, which the head shares ({NOT_AT_RUN_TIME})")
    return target
