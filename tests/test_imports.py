"""The modules' order, and what each command may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.common import ROOT

PACKAGE = ROOT / "lora_gguf"
# the rooms from the ground up: a module imports from its own room and from those before it
ROOMS = [
    "errors",
    "arguments",
    "progress",
    "text",
    "kernels",
    "quants",
    "files",
    "adapters",
    "hub",
    "mapping",
    "merging",
    "checks",
    "commands",
    "api",
    "report",
    "cli",
    "__init__",
    "__main__",
]


def _modules() -> dict[str, Path]:
    """Every module by its dotted name below the package; the rooms themselves too."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def _imports(source: Path, modules, *, inside: bool) -> set[str]:
    """The package's modules that ``source`` imports: when it is imported itself, and those ``inside`` its functions too."""
    tree = ast.parse(source.read_text())
    found = set()
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_gguf"):
            parent = node.module.removeprefix("lora_gguf").removeprefix(".")
            named = {f"{parent}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= (named & set(modules)) or {parent}
    return found - {""}


def _room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_its_place():
    assert {_room(name) for name in _modules()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_module_imports_only_from_rooms_below_it(room):
    modules, below = _modules(), ROOMS[: ROOMS.index(room) + 1]
    wrong = {
        f"{name} imports {other}"
        for name, path in modules.items()
        if _room(name) == room
        for other in _imports(path, modules, inside=True)
        if _room(other) not in below
    }
    assert not wrong


def test_no_circles_within_a_room():
    modules = _modules()
    TopologicalSorter({name: _imports(path, modules, inside=False) for name, path in modules.items()}).prepare()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"], ["merge", "no.gguf", "./no"]])
def test_no_numba_where_no_kernel_runs(arguments):
    code = f"import sys; from lora_gguf.cli import execute; execute({arguments})\n"
    code += "assert not {'numba', 'gguf', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20).returncode == 0
