"""Every call of the system that a command makes fails once, by each error, and is met once by each signal."""

from __future__ import annotations

import pytest

from tests.faulty import COMMANDS, ERRORS, SIGNALS, Case, holes, learn, prepare
from tests.forked import Forge
from tests.hub import TOKEN
from tests.hub_faults import FILES, REPO


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    with Forge() as forge:
        yield {name: prepare(forge, tmp_path_factory.mktemp("case"), name) for name in COMMANDS}


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("what", [*ERRORS, *SIGNALS, "SIGKILL"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_once(cases, record_property, name, what):
    case = cases[name]
    record_property("runs", len(case.calls))
    assert holes(case, ((number, what) for number in range(len(case.calls)))) == []


@pytest.fixture(scope="module")
def fetching(hub_server, tmp_path_factory):
    """A download into a folder, from an empty cache."""
    hub_server.reset()
    hub_server.repos[REPO] = dict(FILES)
    folder = tmp_path_factory.mktemp("fetch")
    cache = {name: str(folder / "cache" / name) for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")}
    outputs = ("out/adapter_config.json", "out/adapter_model.safetensors")
    with Forge(
        {"HF_ENDPOINT": hub_server.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DOWNLOAD_TIMEOUT": "2", **cache}
    ) as forge:
        yield learn(Case(forge, folder, ["fetch", REPO, "-o", "out"], outputs, False, {}, {7, 8, 9}, scratch="cache"))


@pytest.mark.campaign("faults")
@pytest.mark.parametrize("what", ["EIO", "ENOSPC", "short", "SIGTERM", "SIGKILL"])
def test_every_call_of_a_download_once(fetching, record_property, what):
    record_property("runs", len(fetching.calls))
    assert holes(fetching, ((number, what) for number in range(len(fetching.calls)))) == []
