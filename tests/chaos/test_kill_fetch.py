"""Fifty fetches killed at a random moment: the output folder has whole files or none, and the next run leaves no part
behind.
"""

from __future__ import annotations

import random
import signal

import pytest

from tests.hub_faults import BLOB, CONFIG_FILE, FILES, REPO, cache_of, command_line, drip


@pytest.mark.campaign("kill -9")
@pytest.mark.parametrize("seed", range(50))
def test_kill_9(local_hub, tmp_path, seed):
    local_hub.repos[REPO] = dict(FILES)
    local_hub.fault(BLOB, drip, 1)
    local_hub.fault(CONFIG_FILE, lambda handler: handler.hub.released.wait(0.1), 1)
    out = tmp_path / "out"
    process = command_line(local_hub, tmp_path, "fetch", REPO, "-o", str(out))
    local_hub.released.wait(0.3 + random.Random(seed).uniform(0, 1.2))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    for path in out.glob("*.*"):
        assert path.name not in FILES or path.read_bytes() == FILES[path.name]
    again = command_line(local_hub, tmp_path, "fetch", REPO, "-o", str(out))
    assert again.communicate(timeout=30)[1] == b"" and again.returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        n: FILES[n] for n in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert not [path for path in cache_of(tmp_path) if path.endswith((".incomplete", ".lora-gguf-tmp"))]
