"""PEFT's ``rank_pattern`` and ``alpha_pattern``: regular expressions from an untrusted file, matched in linear time.

PEFT asks ``re.match(rf"(.*\\.)?({key})$", module)``; Python's engine backtracks, and a key of 15 characters can keep it
busy for minutes. Here a key with more than one repetition or choice is parsed by Python's own parser and run as a set
of states (K. Thompson, Regular Expression Search Algorithm, 1968): the same matches, in time proportional to key length
x module length. Keys that are plain names are looked up, so that tens of thousands of them cost no more than one.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable

from lora_gguf.errors import MalformedError, UnsupportedError, printable

if sys.version_info >= (3, 11):
    from re import _constants as sre
    from re import _parser as sre_parser
else:
    import sre_constants as sre
    import sre_parse as sre_parser

MAX_KEY = 10_000
MAX_STATES = 20_000
MAX_STEPS = 2000
MAX_NAME = 200
# keys of one map that are expressions, and of these such as need an automaton
MAX_EXPRESSIONS = 1000
MAX_AUTOMATA = 100
LITERAL = re.compile(r"[\w.\-]*")
CATEGORIES = {
    sre.CATEGORY_DIGIT: str.isdigit,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
}
NEGATED = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
}
CHARACTERS = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)
ANCHORS = {sre.AT_BEGINNING: "begin", sre.AT_BEGINNING_STRING: "begin", sre.AT_END: "end", sre.AT_END_STRING: "end"}


def first_match(keys: Iterable[str], module: str) -> str | None:
    """The first of ``keys`` that matches ``module`` (a path such as ``model.layers.0.self_attn.q_proj``) as in PEFT.

    The keys of one map are sorted once, so pass the same object for every module.
    """
    global _latest  # noqa: PLW0603
    if keys is not _latest.keys:
        _latest = _Index(keys)
    return _latest.first(module)


class _Index:
    """The keys of one map: literals in dictionaries by length and place of their dots, expressions in a list."""

    def __init__(self, keys: Iterable[str]):
        self.keys, self.order = keys, list(keys)
        self.literals: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        expressions = {}
        for i, key in enumerate(self.order):
            if LITERAL.fullmatch(key):
                dots = tuple(at for at, c in enumerate(key) if c == ".")
                self.literals.setdefault(len(key), {}).setdefault(dots, {})[key] = i
            else:
                expressions[key] = i
        self.check_count(max(map(len, self.literals.values()), default=0), MAX_EXPRESSIONS)
        self.check_count(len(expressions), MAX_EXPRESSIONS)
        self.expressions: list[tuple[int, Callable[[str], bool]]] = []
        n_automata = 0
        for key, i in expressions.items():
            self.expressions.append((i, matcher(key)))
            n_automata += not isinstance(self.expressions[-1][1], _Simple)
            self.check_count(n_automata, MAX_AUTOMATA)

    def check_count(self, count: int, limit: int) -> None:
        if count > limit:
            raise UnsupportedError(
                f"{len(self.order)} patterns are too many to match: write plain module names instead"
            )

    def first(self, module: str) -> str | None:
        best = min(self.matching_literals(module), default=len(self.order))
        for i, matches in self.expressions:
            if i > best:
                break
            if matches(module):
                return self.order[i]
        return self.order[best] if best < len(self.order) else None

    def matching_literals(self, module: str) -> Iterable[int]:
        """A key matches the end of a path, from a dot on; only the key's own dots are wild."""
        for start in [0, *(at + 1 for at, c in enumerate(module) if c == ".")]:
            tail = module[start:]
            for dots, keys in self.literals.get(len(tail), {}).items():
                letters = list(tail)
                for at in dots:
                    letters[at] = "."
                if (i := keys.get("".join(letters))) is not None:
                    yield i


_latest = _Index(())
_matchers: dict[str, Callable[[str], bool]] = {}


def matcher(key: str) -> Callable[[str], bool]:
    """A function that tells whether ``key`` matches a module path. Raises for a key that isn't a usable regex."""
    if key not in _matchers:
        _matchers[key] = _Simple(key) if _is_simple(key) else _Automaton(key).matches
    return _matchers[key]


def _parse(key: str):
    """PEFT's expression for ``key`` as Python parses it. Raises ``MalformedError`` for what is no expression."""
    if len(key) > MAX_KEY:
        raise _refusal(key, f"expected at most {MAX_KEY} characters, found {len(key)}")
    try:
        return sre_parser.parse(rf"(.*\.)?({key})$")
    except (re.error, OverflowError) as error:
        raise MalformedError(f"pattern {printable(key, 60)!r}: not a regular expression: {error}") from None
    except RecursionError:
        raise _refusal(key, "it is nested too deeply") from None


def _refusal(key: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"pattern {printable(key, 60)!r}: {why}: write plain module names instead")


def _is_simple(key: str) -> bool:
    """Whether the key, within PEFT's expression, is of characters, with at most one that repeats or one choice."""
    parsed = _parse(key)
    return len(parsed) == 3 and parsed[1][0] is sre.SUBPATTERN and _n_repeats(parsed[1:2]) <= 1


def _n_repeats(items) -> float:
    """In how many places a parsed expression repeats a character or has a choice; infinity for all that is more."""
    return sum(_n_repeats_of(op, value) for op, value in items)


def _n_repeats_of(op, value) -> float:
    if op in CHARACTERS or (op is sre.AT and value in ANCHORS):
        return 0
    if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        return 1 if len(value[2]) == 1 and value[2][0][0] in CHARACTERS and value[0] <= MAX_NAME else math.inf
    if op is sre.SUBPATTERN and not (value[1] or value[2]):
        return _n_repeats(value[3])
    if op is sre.BRANCH:
        return 1 + sum(map(_n_repeats, value[1]))
    return math.inf


class _Simple:
    """An expression with one repetition or choice at most: Python's engine backtracks over it in quadratic time."""

    def __init__(self, key: str):
        self.expression = re.compile(rf"(.*\.)?({key})$")

    def __call__(self, module: str) -> bool:
        return bool(self.expression.match(module))


class _Automaton:
    """States are numbers; ``edges[s]`` lists (test of a character, next), ``empty[s]`` (condition or None, next)."""

    def __init__(self, key: str):
        self.key, self.edges, self.empty = key, [], []
        parsed = _parse(key)
        self.start = self.state()
        self.steps: dict[tuple[frozenset, str, bool], frozenset] = {}
        try:
            self.accept = self.sequence(parsed, self.start)
        except RecursionError:
            raise self.refuse("it is nested too deeply") from None

    def refuse(self, why: str) -> UnsupportedError:
        return _refusal(self.key, why)

    def state(self) -> int:
        if len(self.edges) >= MAX_STATES:
            raise self.refuse("it repeats too much")
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1

    def link(self, at: int, to: int, condition: str | None = None) -> None:
        self.empty[at].append((condition, to))

    def sequence(self, items, at: int) -> int:
        for op, value in items:
            at = self.item(op, value, at)
        return at

    def item(self, op, value, at: int) -> int:
        """Add one parsed item after state ``at``; return the state behind it."""
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self.repeat(*value, at)
        if op is sre.SUBPATTERN:
            if value[1] or value[2]:
                raise self.refuse("flags within it are not supported")
            return self.sequence(value[3], at)
        if op is sre.BRANCH:
            end = self.state()
            for branch in value[1]:
                self.link(self.sequence(branch, at), end)
            return end
        end = self.state()
        if op is sre.AT:
            self.link(at, end, self.anchor(value))
        else:
            self.edges[at].append((self.character(op, value), end))
        return end

    def repeat(self, low: int, high, items, at: int) -> int:
        for _ in range(low):
            at = self.sequence(items, at)
        if high is sre.MAXREPEAT:
            loop = self.state()
            self.link(at, loop)
            self.link(self.sequence(items, loop), loop)
            return loop
        end = self.state()
        self.link(at, end)
        for _ in range(high - low):
            at = self.sequence(items, at)
            self.link(at, end)
        return end

    def anchor(self, value) -> str:
        if value not in ANCHORS:
            raise self.refuse("word boundaries are not supported")
        return ANCHORS[value]

    def character(self, op, value) -> Callable[[str], bool]:
        if op is sre.LITERAL:
            return chr(value).__eq__
        if op is sre.NOT_LITERAL:
            return chr(value).__ne__
        if op is sre.ANY:
            return lambda c: c != "\n"
        if op is sre.IN:
            negated = value[0][0] is sre.NEGATE
            tests = [self.member(*item) for item in value[negated:]]
            return lambda c: any(test(c) for test in tests) is not negated
        raise self.refuse("look-around, back references and atomic groups are not supported")

    def member(self, op, value) -> Callable[[str], bool]:
        if op is sre.RANGE:
            return lambda c: value[0] <= ord(c) <= value[1]
        if op is sre.CATEGORY:
            test = CATEGORIES[NEGATED.get(value, value)]
            return test if value in CATEGORIES else lambda c: not test(c)
        return self.character(op, value)

    def closure(self, states: Iterable[int], at_begin: bool, at_end: bool) -> frozenset:
        """``states`` and all that they lead to without a character."""
        reached, todo = set(states), list(states)
        while todo:
            for condition, to in self.empty[todo.pop()]:
                holds = condition is None or (at_begin if condition == "begin" else at_end)
                if holds and to not in reached:
                    reached.add(to)
                    todo.append(to)
        return frozenset(reached)

    def matches(self, module: str) -> bool:
        states = self.closure([self.start], True, not module)
        for i, c in enumerate(module):
            states = self.step(states, c, i + 1 == len(module))
            if not states:
                return False
        return self.accept in states

    def step(self, states: frozenset, c: str, at_end: bool) -> frozenset:
        """The states after ``states`` and a character; remembered, for the modules of a model are much alike."""
        key = (states, c, at_end)
        if key not in self.steps:
            if len(self.steps) >= MAX_STEPS:
                self.steps.clear()
            following = {to for s in states for test, to in self.edges[s] if test(c)}
            self.steps[key] = self.closure(following, False, at_end)
        return self.steps[key]
