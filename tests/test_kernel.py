"""``kernel``: a cache of compiled kernels that is damaged, or cannot be written, costs a compilation and nothing
else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from lora_gguf.kernels import internals
from tests.common import ROOT
from tests.test_merge import base_and_adapter

SOURCE = """
from lora_gguf.kernels.decorators import kernel

@kernel
def doubled(n):
    return 2 * n

assert doubled(21) == 42
print(sum(doubled.stats.cache_hits.values()))
"""
DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "other bytes": lambda path: path.write_bytes(b"\xcd" * 500),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A program with one kernel, and beside it ``cache``, where the kernel is compiled."""
    path = tmp_path_factory.mktemp("kernels") / "doubled.py"
    path.write_text(SOURCE)
    assert hits(path, path.with_name("cache")) == 0 and hits(path, path.with_name("cache")) == 1
    return path


def hits(script, cache) -> int:
    """How many kernels came from ``cache``; the result is right and nothing is said."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LORA_GGUF_CACHE": str(cache)}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return int(run.stdout)


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_made_anew(script, tmp_path, name, suffix):
    cache = shutil.copytree(script.with_name("cache"), tmp_path / "cache")
    (file,) = cache.rglob(f"*{suffix}")
    DAMAGES[name](file)
    assert hits(script, cache) == 0
    assert hits(script, cache) == (name != "a folder")


@pytest.mark.campaign("faults")
def test_a_cache_that_is_no_folder(script, tmp_path):
    (tmp_path / "file").touch()
    assert hits(script, tmp_path / "file") == hits(script, tmp_path / "file") == 0


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ("del numba.core.caching.Cache._load_overload", "_load_overload"),
        ("sys.modules['numba.core.runtime'] = None", "numba.core.runtime"),
        ("del numba.core.typing.templates.infer_global", "infer_global"),
        ("sys.modules['numba'] = None", "numba"),
    ],
)
def test_another_numba_is_refused_in_one_line(tmp_path, change, missing):
    base, adapter, _ = base_and_adapter(tmp_path, "Q4_0")
    code = (
        f"import sys, numba, numba.core.caching, numba.core.typing.templates; {change}; "
        f"from lora_gguf.cli import execute; sys.exit(execute(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "merge", base, adapter, "-o", tmp_path / "out.gguf"]
    run = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 4 and missing in last and "numba>=0.60,<0.69" in last and "Traceback" not in run.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_the_tried_versions_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    first, last = internals.TRIED.split(" to ")
    assert f'"numba>={first},<0.{int(last.split(".")[1]) + 1}"' in text
