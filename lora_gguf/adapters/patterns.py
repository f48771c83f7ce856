"""PEFT's ``rank_pattern`` and ``alpha_pattern``: regular expressions from an untrusted file, matched within a time.

PEFT asks ``re.match(rf"(.*\\.)?({key})$", module)``; Python's engine backtracks, and a key of 15 characters can keep it
busy for minutes. The ``regex`` package asks the same here: from the end backwards, which decides most keys at the first
characters, and with a limit of time. Keys that are plain names are looked up, so that tens of thousands of them cost no
more than one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from lora_gguf.errors import LoraGgufError, MalformedError, UnsupportedError, printable

MAX_KEY = 10_000
MAX_REPEAT = 200
# keys of one map that are expressions
MAX_EXPRESSIONS = 1000
# processor time of one match, and of all matches of one map
MAX_SECONDS, MAX_SECONDS_OF_MAP = 0.2, 60.0
LITERAL = re.compile(r"[\w.\-]*")
_ITEM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:?|(?:[*+?]|\{\d*,?\d*\})\+|\{\d*,?\d*\}|.", re.DOTALL)


def first_match(keys: Iterable[str], module: str) -> str | None:
    """Return the first of ``keys`` that matches ``module`` (``model.layers.0.self_attn.q_proj``) as in PEFT.

    The keys of one map are sorted once, so pass the same object for every module.
    """
    return _index_of(keys).first(module)


def all_matches(keys: Iterable[str], module: str) -> list[str]:
    """Return all of ``keys`` that match ``module``, in their order; as ``first_match``."""
    index = _index_of(keys)
    return [index.order[i] for i in index.matching(module)]


def _index_of(keys: Iterable[str]) -> _Index:
    global _latest  # noqa: PLW0603
    index = _latest  # which another thread's merge may change
    if keys is not index.keys:
        index = _latest = _Index(keys)
    return index


class _Index:
    """The keys of one map: literals in dictionaries by length and place of their dots, expressions in a list."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys, self.order = keys, list(keys)
        self.seconds_left = MAX_SECONDS_OF_MAP
        self.literals: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        expressions = {}
        for i, key in enumerate(self.order):
            if LITERAL.fullmatch(key):
                dots = tuple(at for at, c in enumerate(key) if c == ".")
                self.literals.setdefault(len(key), {}).setdefault(dots, {})[key] = i
            else:
                expressions[key] = i
        shapes = max(map(len, self.literals.values()), default=0)
        if max(shapes, len(expressions)) > MAX_EXPRESSIONS:
            raise self.too_many()
        self.expressions = [(i, matcher(key)) for key, i in expressions.items()]

    def too_many(self) -> LoraGgufError:
        """Return the error for keys that would take too long."""
        return UnsupportedError(f"{len(self.order)} patterns are too many to match: write plain module names instead")

    def first(self, module: str) -> str | None:
        """Return the first key that matches ``module``."""
        found = next(self.matching(module), None)
        return None if found is None else self.order[found]

    def matching(self, module: str) -> Iterator[int]:
        """Yield the places of the keys that match ``module``, in order; no expression is tried before its turn."""
        literals = sorted({*self.matching_literals(module)})
        for i, matches in self.expressions:
            while literals and literals[0] < i:
                yield literals.pop(0)
            if self.in_time(matches, module):
                yield i
        yield from literals

    def in_time(self, matches: Callable[[str], bool], module: str) -> bool:
        """Return what an expression tells, unless all of the map's take too long."""
        start = time.process_time()
        found = matches(module)
        self.seconds_left -= time.process_time() - start
        if self.seconds_left < 0:
            raise self.too_many()
        return found

    def matching_literals(self, module: str) -> Iterable[int]:
        """Yield the places of the literals that match the end of a path, from a dot on; the key's own dots are wild."""
        for start in [0, *(at + 1 for at, c in enumerate(module) if c == ".")]:
            tail = module[start:]
            for dots, keys in self.literals.get(len(tail), {}).items():
                letters = list(tail)
                for at in dots:
                    letters[at] = "."
                if (i := keys.get("".join(letters))) is not None:
                    yield i


_latest = _Index(())


@lru_cache(maxsize=4096)
def matcher(key: str) -> Callable[[str], bool]:
    """Return what tells whether ``key`` matches a module path. Raises for a key that isn't a usable expression."""
    _check(key)
    import regex

    expression = regex.compile(rf"(?r)\A(.*\.)?({key})$", regex.VERSION0)

    def matches(module: str) -> bool:
        try:
            return expression.search(module, timeout=MAX_SECONDS) is not None
        except TimeoutError:
            raise _refusal(key, f"it takes too long to match {printable(module, 60)}") from None

    return matches


def _refusal(key: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"pattern {printable(key, 60)!r}: {why}: write plain module names instead")


def _check(key: str) -> None:
    """Raise unless ``key`` is an expression to Python, of what both engines understand alike."""
    if len(key) > MAX_KEY:
        raise _refusal(key, f"expected at most {MAX_KEY} characters, found {len(key)}")
    _compile(key, rf"(.*\.)?({key})$")
    for item in _ITEM.findall(key):
        _check_item(key, item)
    _compile(key, key)  # a bracket that closes one of PEFT's is none


def _compile(key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, OverflowError) as error:
        raise MalformedError(f"pattern {printable(key, 60)!r}: not a regular expression: {error}") from None
    except RecursionError:
        raise _refusal(key, "it is nested too deeply") from None


def _check_item(key: str, item: str) -> None:
    if item == "(?" or (len(item) > 1 and item[-1] == "+" and item[0] in "*+?{"):
        raise _refusal(key, "flags, look-around, named groups and possessive ones are not supported")
    if item[0] == "\\" and item[1] in "bB123456789":
        raise _refusal(key, "word boundaries and back references are not supported")
    counts = [int(count) for count in re.findall(r"\d+", item)]
    if item[0] == "{" and not counts:
        raise _refusal(key, "a brace that is no repetition is not supported")
    if item[0] == "{" and max(counts) > MAX_REPEAT:
        raise _refusal(key, "it repeats too much")
    if item[0] == "[" and "[" in re.sub(r"\\.", "", item[1:]):
        raise _refusal(key, "a bracket within brackets is not supported")
