"""The house rules that no linter knows: small modules and functions, few parameters, types, docstrings that begin with a
verb.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.common import ROOT

PACKAGE = ROOT / "lora_gguf"
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 7
TABLES = {"mapping/architectures.py", "mapping/towers.py", "mapping/module_paths.py", "quants/mixes.py"}
# what takes more parameters: the public calls, and the commands, whose parameters are their options
MANY_PARAMETERS = re.compile(r"api\.py|cli/\w+\.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef

# what is still longer, or takes more, than it should; entries only ever go
TOO_LONG = {"api.py", "cli/merge.py:merge"}


def _functions(tree: ast.AST, owner: str) -> Iterator[tuple[str, Function]]:
    """Yield every function of a module with its name, ``module:Class.function``."""
    for node in ast.iter_child_nodes(tree):
        name = f"{owner}{'.' if ':' in owner else ':'}{getattr(node, 'name', '')}"
        if isinstance(node, Function):
            yield name, node
        if isinstance(node, Function | ast.ClassDef):
            yield from _functions(node, name)
        else:
            yield from _functions(node, owner)


def _modules() -> dict[str, Path]:
    return {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


FUNCTIONS = dict(
    pair for module, path in _modules().items() for pair in _functions(ast.parse(path.read_text()), module)
)


def _parameters(function: Function) -> list[ast.arg]:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [parameter for parameter in named if parameter.arg not in ("self", "cls")]


def _is_annotated(function: Function) -> bool:
    given = function.args
    parameters = [*_parameters(function), *filter(None, [given.vararg, given.kwarg])]
    returns = function.returns is not None or function.name == "__init__"
    return returns and all(parameter.annotation is not None for parameter in parameters)


def test_functions_are_annotated():
    bare = [name for name, function in FUNCTIONS.items() if not _is_annotated(function)]
    assert len(bare) < 0.05 * len(FUNCTIONS), bare


@pytest.mark.parametrize("module", _modules())
def test_modules_are_small(module):
    assert module in TABLES | TOO_LONG or len(_modules()[module].read_text().splitlines()) <= MAX_MODULE_LINES


def _is_long(name: str, function: Function) -> bool:
    """Of the public calls and of the commands only what follows the docstring counts: the rest describes options."""
    first = function.body[1].lineno if MANY_PARAMETERS.match(name) and len(function.body) > 1 else function.lineno
    return function.end_lineno - first + 1 > MAX_FUNCTION_LINES


def test_functions_are_short():
    assert {name for name, function in FUNCTIONS.items() if _is_long(name, function)} <= TOO_LONG


def test_functions_take_few_parameters():
    found = {
        name
        for name, node in FUNCTIONS.items()
        if len(_parameters(node)) > MAX_PARAMETERS and not MANY_PARAMETERS.match(name)
    }
    assert not found


# a verb in the imperative, as a docstring begins
VERBS = re.findall(
    r"\w+",
    """
    Add Answer Ask Begin Build Call Carry Check Choose Clear Close Compare Compile Compute Convert Copy Count Cut
    Decide Decode Decorate Describe Do Download Drop Encode End Enter Estimate Extract Fetch Fill Find Fit Format
    Forget Give Group Hold Inspect Iterate Join Keep Leave Let List Load Look Lower Make Map Mark Measure Merge Move Name
    Negate Note Open Order Pack Parse Place Plan Prepare Print Put Raise Read Record Refuse Remove Rename Reorder
    Repeat Replace Report Reset Return Round Run Sample Save Say Search Send Set Settle Show Sort Split Start Stop
    Store Sum Sync Take Tell Test Try Turn Unpack Update Upload Use Verify Wait Walk Warn Widen Work Wrap Write Yield
    """,
)


def test_docstrings_begin_with_a_verb():
    """Those of public functions; a property is a noun, and may be described by one."""
    found = set()
    for name, node in FUNCTIONS.items():
        public = not any(part.startswith("_") for part in re.split(r"[:.]", name.partition(":")[2]))
        is_property = any(getattr(word, "id", "") in ("property", "cached_property") for word in node.decorator_list)
        words = (ast.get_docstring(node) or "").split()
        if public and not is_property and words and words[0].rstrip(":,.") not in VERBS:
            found.add(name)
    assert not found
