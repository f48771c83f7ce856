"""A hundred merges and fifty conversions killed at a random moment: the output is what it was or whole, inputs are as
they were.
"""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time

import pytest

from lora_gguf.files.output import SUFFIX
from tests.common import DEMO_ADAPTER, smollm2_path

COMMANDS = {"merge": (smollm2_path(), DEMO_ADAPTER), "convert": (DEMO_ADAPTER, "--base", smollm2_path())}


def command(kind, out):
    return [sys.executable, "-m", "lora_gguf", kind, *map(str, COMMANDS[kind]), "-o", str(out), "--force"]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Kind of command -> (digest of what it writes, seconds that it takes)."""
    found = {}
    for kind in COMMANDS:
        out = tmp_path_factory.mktemp(kind) / "out.gguf"
        subprocess.run(command(kind, out), check=True, capture_output=True)
        start = time.monotonic()
        subprocess.run(command(kind, out), check=True, capture_output=True)
        found[kind] = digest(out), time.monotonic() - start
    return found


@pytest.mark.campaign("kill -9")
@pytest.mark.parametrize(("kind", "seed"), [*(("merge", i) for i in range(100)), *(("convert", i) for i in range(50))])
def test_kill_9(tmp_path, whole, kind, seed):
    out, inputs = tmp_path / "out.gguf", digest(smollm2_path())
    old = b"what was there before" if seed % 2 else None
    if old:
        out.write_bytes(old)
    complete, seconds = whole[kind]
    process = subprocess.Popen(command(kind, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(0.05, seconds))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if out.exists():
        assert out.read_bytes() == old or digest(out) == complete
    else:
        assert old is None
    assert digest(smollm2_path()) == inputs
    if seed % 10 == 0:
        subprocess.run(command(kind, out), check=True, capture_output=True)
        assert digest(out) == complete and not [p for p in tmp_path.iterdir() if p.name.endswith(SUFFIX)]


@pytest.mark.campaign("signals")
@pytest.mark.parametrize("seed", range(100))
def test_signals(tmp_path, whole, seed):
    sent = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[seed % 3]
    process = subprocess.Popen(command("merge", tmp_path / "out.gguf"), stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, whole["merge"][1] / 4))
    process.send_signal(sent)
    _, error = process.communicate(timeout=10)
    if process.returncode == 0:  # it was done
        assert digest(tmp_path / "out.gguf") == whole["merge"][0]
    else:
        assert process.returncode == 128 + sent and error.endswith("no output is half written\n"), error
        assert "Traceback" not in error and not list(tmp_path.iterdir())
