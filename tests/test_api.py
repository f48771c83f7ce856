"""The library as a program uses it: what the command line takes, nothing printed, errors raised."""

from __future__ import annotations

import inspect as signatures
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_gguf
from lora_gguf import api
from lora_gguf.cli import app
from tests.common import DEMO_ADAPTER, ROOT, smollm2_path
from tests.test_merge import base_and_adapter

COMMANDS = ("fetch", "convert", "merge", "extract", "inspect", "verify", "doctor")


@pytest.fixture
def files(tmp_path):
    """A small base and its adapter, on a Hub too."""
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    return base, adapter


def test_importing_costs_nothing():
    code = "import sys, lora_gguf; dir(lora_gguf); assert not {'numpy', 'numba', 'huggingface_hub', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_everything_that_is_promised_is_there():
    assert set(lora_gguf.__all__) <= set(dir(lora_gguf)) and set(COMMANDS) <= set(dir(lora_gguf))
    for name in lora_gguf.__all__:
        assert getattr(lora_gguf, name) is not None
    assert lora_gguf.merge is api.merge and issubclass(lora_gguf.HubError, lora_gguf.LoraGgufError)
    with pytest.raises(AttributeError, match="mrge"):
        lora_gguf.mrge  # noqa: B018


def test_type_checkers_see_what_is_there():
    source = (ROOT / "lora_gguf" / "__init__.py").read_text()
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__")]
    seen = set(re.findall(r"\b(\w+)(?=,|\)|\n)", re.sub(r"from [\w.]+ import", "", block)))
    assert set(lora_gguf.__all__) - {"__version__"} <= seen
    assert (ROOT / "lora_gguf" / "py.typed").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_it_is_typed_and_documented(name):
    function = getattr(lora_gguf, name)
    signature = signatures.signature(function)
    assert function.__doc__ and signature.return_annotation is not signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())


# options of a command -> the parameter that does the same
OTHER_NAMES = {
    "adapter": "adapters", "lora": "adapters", "scale": "adapters", "model": "base", "output": "out", "split_max_size": "max_bytes",
    "dry_run": "out", "source": "source", "report": None, "plot": None, "as_json": None, "quiet": None, "context": None, "verbose": None,
    "push": None, "dask": "executor",
}  # fmt: skip


@pytest.mark.parametrize("name", ["merge", "verify", "doctor", "convert", "extract"])
def test_it_takes_what_the_command_takes(name):
    command = next(
        entry.callback for entry in app.registered_commands if (entry.name or entry.callback.__name__) == name
    )
    parameters = set(signatures.signature(getattr(lora_gguf, name)).parameters)
    for option in signatures.signature(command).parameters:
        same = option if option in parameters else OTHER_NAMES.get(option, option)
        assert same is None or same in parameters or (name in ("verify", "doctor") and option == "force"), option


@pytest.mark.parametrize("form", ["name", "path", "pair", "list", "pairs"])
def test_the_forms_of_adapters(files, tmp_path, form):
    base, adapter = files
    adapters = {
        "name": str(adapter), "path": adapter, "pair": (adapter, 1), "list": [adapter], "pairs": [(str(adapter), 0.25), (adapter, 0.75)],
    }[form]  # fmt: skip
    report = lora_gguf.merge(str(base), adapters, tmp_path / "out.gguf", rounding="dither", seed=3)
    assert report.written == [tmp_path / "out.gguf"] and 0.5 < report.whole.kept < 1.5
    assert lora_gguf.verify(tmp_path / "out.gguf", base, adapter).ok


@pytest.mark.parametrize(
    ("adapters", "error"), [([], "UsageError"), ([3], "UsageError"), ("./no", "FileError"), (Path("no"), "FileError")]
)
def test_what_is_wrong_is_raised(files, tmp_path, adapters, error):
    with pytest.raises(getattr(lora_gguf, error)):
        lora_gguf.merge(files[0], adapters, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_nothing_is_printed_and_progress_is_told(files, tmp_path, capfd):
    base, adapter = files
    calls: list[tuple[int, int, str]] = []
    tell = lambda *call: calls.append(call)  # noqa: E731
    lora_gguf.merge(base, adapter, tmp_path / "merged.gguf", progress=tell, type="q8_0", max_growth="1%")
    assert sum(call[0] for call in calls) == calls[-1][1] and calls[-1][2].endswith(".weight")
    calls.clear()
    assert lora_gguf.doctor(base, adapter, progress=tell).ok and sum(call[0] for call in calls) == calls[-1][1]
    lora_gguf.extract(base, tmp_path / "merged.gguf", tmp_path / "extracted.gguf", 4)
    lora_gguf.inspect(tmp_path / "extracted.gguf")
    placement = lora_gguf.convert(DEMO_ADAPTER, tmp_path / "demo.gguf", smollm2_path())
    assert len(placement.pairs) == 210
    assert capfd.readouterr() == ("", "")


def test_from_the_hub(files, tmp_path, local_hub, capfd):
    base, adapter = files
    local_hub.repos["someone/base"] = {"base-Q4_0.gguf": base.read_bytes()}
    local_hub.repos["someone/adapter"] = {"adapter.gguf": adapter.read_bytes()}
    calls: list[tuple[int, int, str]] = []
    adapters = [("hf://someone/adapter/adapter.gguf", 0.5)]
    report = lora_gguf.merge(
        "someone/base:Q4_0", adapters, tmp_path / "out.gguf", progress=lambda *call: calls.append(call)
    )
    assert report.written and {"base-Q4_0.gguf", "adapter.gguf"} <= {call[2] for call in calls}
    downloaded = sum(call[0] for call in calls if call[2].endswith(".gguf"))
    assert downloaded == base.stat().st_size + adapter.stat().st_size
    assert lora_gguf.fetch(adapters[0][0]).read_bytes() == adapter.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_a_callback_that_raises_leaves_nothing(files, tmp_path):
    def stop(*_call) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_gguf.merge(*files, tmp_path / "out.gguf", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.gguf", "base.gguf"]


def test_the_readme_s_service(files, tmp_path, capfd):
    readme = (ROOT / "docs" / "python.md").read_text()
    code = re.search(r"# From Python.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    space: dict = {}
    exec(compile(code, "python.md", "exec"), space)
    told: list[tuple] = []
    found = space["tune"](str(files[0]), str(files[1]), str(tmp_path / "out.gguf"), lambda *call: told.append(call))
    assert found["holds"] and found["file"] == str(tmp_path / "out.gguf") and 0.5 < found["kept"] < 1.5 and told
    refused = space["tune"](str(files[0]), str(DEMO_ADAPTER), str(tmp_path / "other.gguf"))
    assert refused["code"] == lora_gguf.MismatchError.exit_code and refused["error"]
    assert capfd.readouterr() == ("", "") and not (tmp_path / "other.gguf").exists()
