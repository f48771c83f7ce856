"""The modules' order, and what each command may import."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.common import ROOT

PACKAGE = ROOT / "lora_gguf"
# nothing here may know of what comes after it: files, kernels, adapters, the plan, the merge, what judges it, the command line
LAYERS = ("errors", "gguf_reader", "gguf_writer", "quants", "rounding", "lora", "adapter", "names", "placement", "plan", "merge", "verify", "cli")


def _imports(source) -> set[str]:
    """The package's modules that are imported when ``source`` is, by their first name below the package."""
    found = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_gguf"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found - {"__version__"}


def _graph() -> dict[str, set[str]]:
    graph = {path.stem: _imports(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    graph["quants"] = set().union(*map(_imports, (PACKAGE / "quants").glob("*.py"))) - {"quants"}
    return graph


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
    code = f"import sys; from lora_gguf.cli import _run; _run({arguments}); assert not {{'numba', 'gguf', 'torch'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20).returncode == 0
