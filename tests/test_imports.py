"""The modules' order, and what each command may import."""

import ast
import subprocess
import sys

import pytest

from tests.common import ROOT

# a module imports only from rows above it
ORDER = """errors progress ggml kernel input_file gguf_reader output gguf_writer base quants rounding refit patterns lora updates
stacking tensor_file pickle_reader torch_reader weights hashes hub_errors hub fetch quantizations kinds adapter_config adapter
transforms architectures hparams names accounts factoring support vocabulary heads placement convert sources imatrix importance
mixes requantize plan layout chunks growth retention merge extract comparison findings diagnosis verify tables cli
__main__""".split()


def _imports(source) -> set[str]:
    """Names of the package's top-level modules that are imported when ``source`` is."""
    found = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_gguf"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_every_module_has_its_row():
    modules = {path.stem for path in (ROOT / "lora_gguf").glob("*.py")} - {"__init__"} | {"quants"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", [name for name in ORDER if name != "quants"])
def test_imports_only_from_above(module):
    above = set(ORDER[: ORDER.index(module)]) | {"__version__"}
    assert _imports(ROOT / "lora_gguf" / f"{module}.py") <= above


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["merge", "--help"], ["merge", "no.gguf", "./no"]])
def test_no_numba_where_no_kernel_runs(arguments):
    code = f"import sys; from lora_gguf.cli import _run; _run({arguments}); assert not {{'numba', 'gguf', 'torch'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20).returncode == 0
