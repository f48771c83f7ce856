"""What is asked of models that are compared."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lora_gguf.arguments import check_flag, check_whole, refuse
from lora_gguf.errors import FileError, MalformedError, UsageError, printable

QUESTIONS = (
    "What should I eat for breakfast?",
    "How do I learn to swim?",
    "Tell me about the town where you live.",
    "Explain what a computer does.",
    "Write the first lines of a story about a dog.",
)
BEGINNINGS = (
    "The best way to learn a language is",
    "Once upon a time there was a",
    "The first thing that a program does",
    "In the year 1969 the people of",
    "My name is",
)


@dataclass(frozen=True)
class Prompts:
    """What is asked: ``texts`` (none: some general ones) to be answered by ``n_predict`` tokens at most.

    They are a user's messages where the base has a chat template, unless they are ``raw``.
    """

    texts: tuple[str, ...] = ()
    n_predict: int = 32
    raw: bool = False

    def __post_init__(self) -> None:
        for text in self.texts:
            if not (isinstance(text, str) and text.strip()):
                raise refuse("prompts", "texts", text)
        check_whole("n_predict", self.n_predict, 1)
        check_flag("raw", self.raw)


def read_prompts(path: str | os.PathLike) -> list[str]:
    r"""Return the prompts of a text file, one a line; a line in quotation marks is read as JSON, so that it may hold
    ``\n``.

    Raises ``FileError``, ``MalformedError``, ``UsageError`` where there is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FileError(
            f"{printable(path)}: {error.strerror}: expected a text file with a prompt on each line"
        ) from None
    except UnicodeDecodeError:
        raise MalformedError(f"{printable(path)}: expected text in UTF-8, with a prompt on each line") from None
    try:
        prompts = [json.loads(line) if line.startswith('"') else line for line in map(str.strip, lines) if line]
    except ValueError:
        raise MalformedError(f"{printable(path)}: a line begins with a quotation mark but is not JSON") from None
    if not prompts:
        raise UsageError(f"{printable(path)}: expected a prompt on each line, found none")
    return prompts
