"""Commands on small models, and what they may leave behind when the system fails one of their calls."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lora_gguf.files.output import SUFFIX
from tests.calls import merge
from tests.contract import Hang, Hole, Trace, check_line, check_preserved
from tests.forked import Forge, Result, snapshot
from tests.test_merge import base_and_adapter
from tests.tiny import TINY, base_gguf

OLD = b"what was there before"
ERRORS = ("EIO", "ENOSPC", "EINTR", "EACCES", "EMFILE", "short")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def _merge(folder: Path) -> None:
    base_and_adapter(folder, "Q4_0", rows=32, cols=64)


def _tiny(folder: Path) -> None:
    base_gguf(folder, "llama")
    shutil.copytree(TINY / "llama" / "adapter", folder / "peft")


def _merged(folder: Path) -> None:
    _merge(folder)
    merge(folder / "base.gguf", [(folder / "adapter.gguf", 1.0)], folder / "tuned.gguf")


# name -> (what makes the inputs, the arguments, the outputs, whether something lies there before)
COMMANDS = {
    "merge": (_merge, "merge base.gguf adapter.gguf -o out.gguf -t 1 --force", ("out.gguf",), True),
    "merge anew": (_merge, "merge base.gguf adapter.gguf -o out.gguf -t 1", ("out.gguf",), False),
    "merge a folder": (_tiny, "merge llama.gguf peft -o out.gguf -t 1 --json --force", ("out.gguf",), True),
    "merge into shards": (
        _merge,
        "merge base.gguf adapter.gguf -o out.gguf -t 1 --split-max-size 1M --type F32",
        ("out.gguf",),
        False,
    ),
    "convert": (_tiny, "convert peft --base llama.gguf -o out.gguf --force", ("out.gguf",), True),
    "extract": (_merged, "extract base.gguf tuned.gguf -o out.gguf --rank 2 --force", ("out.gguf",), True),
    "verify": (_merged, "verify tuned.gguf --base base.gguf --lora adapter.gguf -t 1", (), False),
}  # fmt: skip


@dataclass
class Case:
    """A command that writes ``outputs`` in ``folder``; ``whole`` is what these hold after a run without faults.

    ``scratch`` is a folder in it where anything may lie, but for temporary files of ours.
    """

    forge: Forge
    folder: Path
    arguments: list[str]
    outputs: tuple[str, ...]
    replaces: bool
    inputs: dict
    codes: set[int] = field(default_factory=lambda: {7})
    whole: dict = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    scratch: str | None = None

    def reset(self) -> None:
        """Remove what earlier runs left, and put the old outputs in place."""
        tops = {Path(name).parts[0] for name in self.inputs}
        for path in self.folder.iterdir():
            if path.name not in tops:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in self.outputs if self.replaces else ():
            (self.folder / name).write_bytes(OLD)

    def run(self, fault=None, **options) -> Result:
        self.reset()
        return self.forge.run(*self.arguments, fault=fault, cwd=self.folder, **options)

    @property
    def before(self) -> dict:
        return {**self.inputs, **(dict.fromkeys(self.outputs, OLD) if self.replaces else {})}

    def check(self, number: int, what: str) -> None:
        """Run with a fault and raise ``Hole`` where the contract is broken."""
        self.judge(self.run((number, what)), what, number)

    def judge(self, result: Result, what: str, number: int = 0) -> None:
        allowed = {name: (content,) for name, content in self.whole.items()}
        if what == "SIGKILL":
            return self.check_killed(allowed, number)
        if result.code is None:
            raise Hang(f"{result.seconds:.0f} s")
        self.preserved(self.before, allowed)
        if result.code == 0:
            self.preserved({**self.inputs, **self.whole})
            if "Traceback" in result.err:
                raise Trace(result.err[-2000:])
            return None
        if what.startswith("SIG") and result.code == -getattr(signal, what) and not result.err:
            return None  # it came before the command line listened
        check_line(result)
        expected = {128 + getattr(signal, what)} if what.startswith("SIG") else self.codes
        if result.code not in expected:
            raise Trace(f"exit code {result.code}, expected {expected}: {result.err}")

    def preserved(self, expected: dict, allowed: dict | None = None) -> None:
        own = {
            name: content
            for name, content in snapshot(self.folder).items()
            if self.scratch and name.startswith(self.scratch + "/")
        }
        kept = {name: content for name, content in own.items() if not name.endswith((SUFFIX, ".incomplete"))}
        check_preserved(self.folder, {**expected, **kept}, allowed)

    def check_killed(self, allowed: dict, number: int) -> None:
        left = {
            name: content for name, content in snapshot(self.folder).items() if name.endswith((SUFFIX, ".incomplete"))
        }
        self.preserved({**self.before, **left}, allowed)
        if number % 5 == 0:
            for name in self.outputs if not self.replaces else ():
                (self.folder / name).unlink(missing_ok=True)
            again = self.forge.run(*self.arguments, cwd=self.folder)
            if again.code:
                raise Trace(f"the next run ended with {again.code}: {again.err}")
            self.preserved({**self.inputs, **self.whole})


def prepare(forge: Forge, folder: Path, name: str) -> Case:
    """The command ``name`` of ``COMMANDS`` in ``folder``."""
    make, arguments, outputs, replaces = COMMANDS[name]
    make(folder)
    return learn(Case(forge, folder, arguments.split(), outputs, replaces, snapshot(folder)))


def learn(case: Case) -> Case:
    """Run the command without a fault and note what it writes and what it calls."""
    case.reset()
    case.forge.warm(*case.arguments, cwd=case.folder)
    result = case.run()
    assert result.code == 0, result.err
    case.whole = {name: (case.folder / name).read_bytes() for name in case.outputs}
    case.calls = result.calls
    assert OLD not in case.whole.values()
    return case


def holes(case: Case, faults: Iterable[tuple[int, str]]) -> list[str]:
    """What went wrong in the runs with these faults, each the number of a call and what happens to it."""
    found = []
    for number, what in faults:
        try:
            case.check(number, what)
        except Hole as hole:
            found.append(f"{type(hole).__name__}: {what} at call {number} ({case.calls[number]}): {hole}")
    return found


def every_call(case: Case, *kinds: str) -> list[tuple[int, str]]:
    """Each call of the command once, the kinds of fault in turn."""
    return [(number, kinds[number % len(kinds)]) for number in range(len(case.calls))]
