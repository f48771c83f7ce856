"""Count the classes that llama.cpp's converter registers: those that are merged, and those refused by name and why.

    python -m tests.class_census               the classes of fixtures/llama-cpp-classes.json
    python -m tests.class_census LLAMA_CPP     those of a tree of llama.cpp, which are written there first

The file holds the names of llama-cpp-python 0.3.36's sdist (vendor/llama.cpp): class -> GGUF architecture, of text
models and of towers.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_gguf.mapping.architectures import ARCHITECTURES, REFUSED
from lora_gguf.mapping.towers import REFUSED as REFUSED_TOWERS
from lora_gguf.mapping.towers import TOWERS
from tests.common import FIXTURES

CLASSES = FIXTURES / "llama-cpp-classes.json"
SOURCE = "llama-cpp-python 0.3.36 (sdist), vendor/llama.cpp"


def registered(tree: Path) -> dict[str, dict[str, str]]:
    """Return kind (text, towers) -> class -> architecture, from the converter's source."""
    bases, names, archs = {}, {}, {}
    for path in sorted((tree / "conversion").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
                names[node.name] = list(names_of(node))
                archs[node.name] = next(arch_of(node), None)
    called = dict(re.findall(r"MODEL_ARCH\.(\w+)\s*:\s*\"([^\"]+)\"", constants(tree)))
    found: dict[str, dict[str, str]] = {"text": {}, "towers": {}}
    for name in bases:
        line = list(ancestors(name, bases))
        kind = "towers" if "MmprojModel" in line else "text"
        arch = next((archs[owner] for owner in line if archs.get(owner)), None)
        for one in names[name]:
            found[kind][one] = called.get(arch or "", arch or "clip")
    return {kind: dict(sorted(classes.items())) for kind, classes in found.items()}


def constants(tree: Path) -> str:
    return (tree / "gguf-py" / "gguf" / "constants.py").read_text()


def names_of(node: ast.ClassDef) -> Iterator[str]:
    """Yield the names under which a class is registered."""
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register":
            yield from (arg.value for arg in call.args if isinstance(arg, ast.Constant))


def arch_of(node: ast.ClassDef) -> Iterator[str]:
    """Yield what a class says that its architecture is."""
    for line in node.body:
        named = isinstance(line, ast.Assign) and "model_arch" in [ast.unparse(target) for target in line.targets]
        if named and isinstance(line.value, ast.Attribute):
            yield line.value.attr


def ancestors(name: str, bases: dict[str, list[str]]) -> Iterator[str]:
    yield name
    for base in bases.get(name, ()):
        yield from ancestors(base, bases)


def judged(classes: dict[str, str]) -> dict[str, list[str]]:
    """Return outcome -> classes: merged, the reason of a refusal, or unknown."""
    known = {name for row in ARCHITECTURES.values() for name in row.hf}
    found: dict[str, list[str]] = {}
    for name in classes:
        outcome = "merged" if name in known else f"refused: {REFUSED[name]}" if name in REFUSED else "unknown"
        found.setdefault(outcome, []).append(name)
    return found


def judged_towers(classes: Iterable[str]) -> dict[str, list[str]]:
    """Return outcome -> classes with a tower, as ``judged``: merged where any of a class's towers is."""
    known = {name.partition(" ")[0] for row in TOWERS.values() for name in row.hf}
    refused = {name: why for names, why in REFUSED_TOWERS.values() for name in names}
    found: dict[str, list[str]] = {}
    for name in classes:
        outcome = "merged" if name in known else f"refused: {refused[name]}" if name in refused else "unknown"
        found.setdefault(outcome, []).append(name)
    return found


def main() -> int:
    if len(sys.argv) > 1:
        CLASSES.write_text(json.dumps({"source": SOURCE, **registered(Path(sys.argv[1]))}, indent=1) + "\n")
    census = json.loads(CLASSES.read_text())
    print(census["source"])
    outcomes = {"text classes": judged(census["text"]), "classes with a tower": judged_towers(census["towers"])}
    for kind, found in outcomes.items():
        print(f"{len(census['text' if kind == 'text classes' else 'towers'])} {kind}")
        for outcome, names in found.items():
            print(f"  {len(names)} {outcome}" + ("" if outcome == "merged" else f": {', '.join(names)}"))
    return 1 if any("unknown" in found for found in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
