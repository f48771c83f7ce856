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
# nothing here may know of what comes after it: files, kernels, adapters, the plan, the merge, what judges it, the command line
LAYERS = (
    "errors",
    "files.gguf_reader",
    "files.gguf_writer",
    "quants",
    "rounding",
    "adapters.lora",
    "adapters.adapter",
    "mapping.names",
    "mapping.placement",
    "plan",
    "commands.merge",
    "commands.verify",
    "cli",
)


def _modules() -> dict[str, Path]:
    """Every module by its dotted name below the package; the packages themselves too."""
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def _imports(source: Path, modules) -> set[str]:
    """The package's modules that are imported when ``source`` is."""
    found = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_gguf"):
            parent = node.module.removeprefix("lora_gguf").removeprefix(".")
            named = {f"{parent}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= (named & set(modules)) or {parent}
    return found - {""}


def _graph() -> dict[str, set[str]]:
    """Who imports whom. ``quants`` is one node: its families fill the dict of the package that they import."""
    modules = _modules()
    graph = {name: _imports(path, modules) for name, path in modules.items()}
    family = {name for name in graph if name.startswith("quants.")}
    graph["quants"] = set().union(*(graph.pop(name) for name in family), graph["quants"]) - family - {"quants"}
    return {name: {"quants" if other in family else other for other in others} for name, others in graph.items()}


def test_a_module_imports_only_from_rows_above_it():
    graph = _graph()
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError where there is no order
    assert set(order) == set(graph)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer):
    graph = _graph()
    reached, ahead = set(), {layer}
    while ahead:
        reached |= ahead
        ahead = set().union(*(graph[name] for name in ahead)) - reached
    assert not reached & set(LAYERS[LAYERS.index(layer) + 1 :])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"], ["merge", "no.gguf", "./no"]])
def test_no_numba_where_no_kernel_runs(arguments):
    code = f"import sys; from lora_gguf.cli import execute; execute({arguments})\n"
    code += "assert not {'numba', 'gguf', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20).returncode == 0
