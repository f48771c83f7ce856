"""Too little memory ends in one line and exit code 7, and leaves nothing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from lora_gguf.errors import FileError
from lora_gguf.merging import limits
from tests.common import FIXTURES, ROOT, smollm2_path

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="nothing tells what is taken")


@pytest.mark.parametrize(
    ("n_kilobytes", "n_threads"), [(500_000, 8), (500_000, 2), (600_000, 8), (800_000, 8), (600_000, 2)]
)
def test_few_addresses(tmp_path, n_kilobytes, n_threads):
    command = [sys.executable, "-m", "lora_gguf", "merge", str(smollm2_path()), str(FIXTURES / "perl-adapter"), "-q"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.gguf"), "-t", str(n_threads)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (n_kilobytes << 10, n_kilobytes << 10)),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, FileError.exit_code), done.stderr
    assert os.listdir(tmp_path) == (["out.gguf"] if done.returncode == 0 else [])
    if done.returncode:
        assert done.stderr.startswith("lora-gguf: error: out of memory") and done.stderr.count("\n") == 1


def test_what_fits_is_said(monkeypatch):
    monkeypatch.setattr(limits, "addresses_left", lambda: 320 << 20)
    limits.check_address_space(3)
    with pytest.raises(FileError, match="use --threads 3"):
        limits.check_address_space(4)
    monkeypatch.setattr(limits, "addresses_left", lambda: 10)
    with pytest.raises(FileError, match="too little for 1 threads: raise it"):
        limits.check_address_space(1)


def test_without_a_limit_there_is_none():
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        assert limits.addresses_left() is None
