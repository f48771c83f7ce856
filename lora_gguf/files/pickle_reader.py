"""Pickles as data: an interpreter of the few opcodes that ``torch.save`` writes, with an allow-list of names.

Python's own unpickler is not used: with every name blocked it still takes 2 GB for nine bytes. Here the memo is a
dict, each opcode consumes input, nothing is imported or called but the inert builders that the caller lists, and keys
are strings or whole numbers, so that no hash, comparison or repr walks what the file has nested.
The opcodes are those of https://docs.python.org/3/library/pickletools.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_gguf.errors import MalformedError, printable

MAX_OPS = 5_000_000
MAX_STACK = 10_000


@dataclass(frozen=True, eq=False)
class Builder:
    """What may stand in for a function: called with the arguments as a tuple."""

    build: Callable


class Refusal(Exception):
    """Why a pickle is not read; ``load`` turns it into a ``MalformedError``. Builders may raise it."""


class _Mark:
    pass


MARK = _Mark()


def load(raw: bytes, names: dict[str, object], persistent: Callable, label: str) -> Any:
    """Return the object that the pickle ``raw`` describes, of dicts, lists, tuples, strings, numbers and what builders
    make.

    ``names`` holds all that it may name, by ``"module name"``; ``persistent`` makes an object of a persistent id.
    Raises ``MalformedError``, naming ``label``, for all else: an opcode or a name without a place here, a damaged file.
    """
    machine = _Machine(raw, names, persistent)
    try:
        return machine.run()
    except Refusal as refusal:
        reason = str(refusal)
    except UnicodeDecodeError:
        reason = "text that is not UTF-8"
    except IndexError:
        reason = "it pops what it never pushed"
    raise MalformedError(
        f"{label}: {reason} (byte {machine.at} of its pickle): not read; ask for the adapter as .safetensors"
    )


def set_item(target: dict, key: object, value: object) -> None:
    """Set ``target[key]``. Refused: a key that is there, or one whose hash could walk the whole pickle."""
    if type(key) not in (str, int):
        raise Refusal(f"a key of type {type(key).__name__}")
    if key in target:
        raise Refusal("a key that occurs twice")
    target[key] = value


class _Machine:
    """``stack`` holds objects and marks; ``at`` is the position of the next byte."""

    def __init__(self, raw: bytes, names: dict[str, object], persistent: Callable) -> None:
        self.raw, self.at = raw, 0
        self.names, self.persistent = names, persistent
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def run(self) -> Any:
        if not self.raw.startswith(b"\x80"):
            raise Refusal("the pickle does not start with its protocol")
        for _ in range(MAX_OPS):
            opcode = self.take(1)
            operation = OPERATIONS.get(opcode)
            if operation is None:
                raise Refusal(f"opcode {opcode!r} has no place in a file of tensors")
            if operation is _stop:
                return self.result()
            operation(self)
        raise Refusal(f"more than {MAX_OPS} opcodes")

    def result(self) -> Any:
        value = self.pop()
        if self.stack:
            raise Refusal(f"{len(self.stack)} objects left over")
        return value

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.raw) - self.at:
            raise Refusal("the pickle ends early")
        self.at += n_bytes
        return self.raw[self.at - n_bytes : self.at]

    def number(self, layout: str) -> int:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))[0]

    def line(self) -> str:
        end = self.raw.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise Refusal("a name without an end")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def push(self, value: object) -> None:
        if len(self.stack) >= MAX_STACK:
            raise Refusal(f"more than {MAX_STACK} objects at once")
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise Refusal("a mark where a value belongs")
        return value

    def peek(self) -> Any:
        if self.stack[-1] is MARK:
            raise Refusal("a mark where a value belongs")
        return self.stack[-1]

    def pop_to_mark(self) -> list:
        start = len(self.stack) - 1
        while self.stack[start] is not MARK:
            start -= 1
            if start < 0:
                raise Refusal("a mark is missing")
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise Refusal(f"a {kind.__name__} is missing")
        return self.stack[-1]


def _stop(machine: _Machine) -> None:
    """The end; the loop returns."""


def _protocol(machine: _Machine) -> None:
    version = machine.number("B")
    if not 2 <= version <= 5:
        raise Refusal(f"pickle protocol {version}")


def _frame(machine: _Machine) -> None:
    n_bytes = machine.number("Q")
    if n_bytes > len(machine.raw) - machine.at:
        raise Refusal("the pickle ends early")


def _text(layout: str) -> Callable:
    return lambda machine: machine.push(machine.take(machine.number(layout)).decode("utf-8", "surrogatepass"))


def _number(layout: str) -> Callable:
    return lambda machine: machine.push(machine.number(layout))


def _long(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.number("B")), "little", signed=True))


def _double(machine: _Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0])


def _constant(make: Callable) -> Callable:
    return lambda machine: machine.push(make())


def _tuple(length: int) -> Callable:
    def operation(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(length)]
        machine.push(tuple(reversed(values)))

    return operation


def _memo_put(layout: str) -> Callable:
    def operation(machine: _Machine) -> None:
        machine.memo[machine.number(layout)] = machine.peek()

    return operation


def _memo_get(layout: str) -> Callable:
    def operation(machine: _Machine) -> None:
        index = machine.number(layout)
        if index not in machine.memo:
            raise Refusal(f"nothing was stored as {index}")
        machine.push(machine.memo[index])

    return operation


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.peek()


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _appends(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.top(list).extend(values)


def _set_one(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    set_item(machine.top(dict), key, value)


def _set_many(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    target = machine.top(dict)
    if len(values) % 2:
        raise Refusal("a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        set_item(target, key, value)


def _name(machine: _Machine, module: object, name: object) -> None:
    if type(module) is not str or type(name) is not str:
        raise Refusal("a name that is not text")
    if f"{module} {name}" not in machine.names:
        raise Refusal(f"it asks for {printable(module[:80], 60)}.{printable(name[:80], 60)}, which no adapter needs")
    machine.push(machine.names[f"{module} {name}"])


def _global(machine: _Machine) -> None:
    module = machine.line()
    _name(machine, module, machine.line())


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    _name(machine, module, name)


def _reduce(machine: _Machine) -> None:
    args, function = machine.pop(), machine.pop()
    if type(function) is not Builder or type(args) is not tuple:
        raise Refusal("a call of something that is no tensor or dict")
    machine.push(function.build(args))


def _build(machine: _Machine) -> None:
    """Attributes of a dict (``_metadata`` of a state dict): dropped."""
    state = machine.pop()
    if type(state) is not dict or type(machine.peek()) is not dict:
        raise Refusal("attributes of something that is no dict")


def _persistent_id(machine: _Machine) -> None:
    machine.push(machine.persistent(machine.pop()))


OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b".": _stop,
    b"(": _constant(lambda: MARK),
    b"N": _constant(lambda: None),
    b"\x88": _constant(lambda: True),
    b"\x89": _constant(lambda: False),
    b"}": _constant(dict),
    b"]": _constant(list),
    b")": _constant(tuple),
    b"K": _number("B"),
    b"M": _number("H"),
    b"J": _number("i"),
    b"\x8a": _long,
    b"G": _double,
    b"X": _text("I"),
    b"\x8c": _text("B"),
    b"\x8d": _text("Q"),
    b"t": lambda machine: machine.push(tuple(machine.pop_to_mark())),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"a": _append,
    b"e": _appends,
    b"s": _set_one,
    b"u": _set_many,
    b"q": _memo_put("B"),
    b"r": _memo_put("I"),
    b"\x94": _memoize,
    b"h": _memo_get("B"),
    b"j": _memo_get("I"),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": _build,
    b"Q": _persistent_id,
}
