"""PEFT's ``rank_pattern`` and ``alpha_pattern``: regular expressions from an untrusted file, matched in linear time.

PEFT asks ``re.match(rf"(.*\\.)?({key})$", module)``; Python's engine backtracks, and a key of 15 characters can keep it
busy for minutes. Here the key is parsed by Python's own parser and run as a set of states (K. Thompson, Regular
Expression Search Algorithm, 1968): the same matches, in time proportional to key length x module length.
"""

from __future__ import annotations

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
BEGIN, END = "begin", "end"


def first_match(keys: Iterable[str], module: str) -> str | None:
    """The first of ``keys`` that matches ``module`` (a path such as ``model.layers.0.self_attn.q_proj``) as in PEFT."""
    return next((key for key in keys if matcher(key)(module)), None)


_matchers: dict[str, Callable[[str], bool]] = {}


def matcher(key: str) -> Callable[[str], bool]:
    """A function that tells whether ``key`` matches a module path. Raises for a key that isn't a usable regex."""
    if key not in _matchers:
        _matchers[key] = _literal(key) if re.fullmatch(r"[\w.\-]*", key) else _Automaton(key).matches
    return _matchers[key]


def _literal(key: str) -> Callable[[str], bool]:
    """A key without operators: only its dots are wild, and there is nothing to backtrack into."""
    expression = re.compile(key.replace("-", r"\-") + r"\Z")

    def matches(module: str) -> bool:
        start = len(module) - len(key)
        return start >= 0 and (start == 0 or module[start - 1] == ".") and bool(expression.match(module, start))

    return matches


class _Automaton:
    """States are numbers; ``edges[s]`` lists (test of a character, next), ``empty[s]`` (condition or None, next)."""

    def __init__(self, key: str):
        self.key, self.edges, self.empty = key, [], []
        if len(key) > MAX_KEY:
            raise self.refuse(f"expected at most {MAX_KEY} characters, found {len(key)}")
        try:
            parsed = sre_parser.parse(rf"(.*\.)?({key})$")
            self.start = self.state()
            self.accept = self.sequence(parsed, self.start)
        except (re.error, OverflowError) as error:
            raise MalformedError(f"pattern {printable(key, 60)!r}: not a regular expression: {error}") from None
        except RecursionError:
            raise self.refuse("it is nested too deeply") from None

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"pattern {printable(self.key, 60)!r}: {why}: write plain module names instead")

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
        names = {sre.AT_BEGINNING: BEGIN, sre.AT_BEGINNING_STRING: BEGIN, sre.AT_END: END, sre.AT_END_STRING: END}
        if value not in names:
            raise self.refuse("word boundaries are not supported")
        return names[value]

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

    def closure(self, states: Iterable[int], at_begin: bool, at_end: bool) -> set[int]:
        """``states`` and all that they lead to without a character."""
        reached, todo = set(states), list(states)
        while todo:
            for condition, to in self.empty[todo.pop()]:
                holds = condition is None or (at_begin if condition is BEGIN else at_end)
                if holds and to not in reached:
                    reached.add(to)
                    todo.append(to)
        return reached

    def matches(self, module: str) -> bool:
        states = self.closure([self.start], True, not module)
        for i, c in enumerate(module):
            following = {to for s in states for test, to in self.edges[s] if test(c)}
            states = self.closure(following, False, i + 1 == len(module))
            if not states:
                return False
        return self.accept in states
