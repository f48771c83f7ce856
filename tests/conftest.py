from __future__ import annotations

import time
from collections import Counter

import pytest

from lora_gguf import progress
from tests.contract import Corruption, Hang, Trace
from tests.faulty import prepare
from tests.forked import Forge
from tests.hub import GGUF_FILES, GGUF_REPO, TOKEN, running_hub

progress.SILENT = 600.0, 600.0  # on a busy machine a test that asks for one line of stderr must not find two
CAMPAIGN: Counter[str] = Counter()
HOLES = {Corruption: "silent corruptions", Hang: "hangs", Trace: "tracebacks"}


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if marker := item.get_closest_marker("campaign"):
            item.user_properties.append(("campaign", marker.args[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call):
    report = yield
    if call.excinfo:
        text = str(call.excinfo.value)
        kinds = [
            name
            for kind, name in HOLES.items()
            if isinstance(call.excinfo.value, kind) or f"'{kind.__name__}: " in text
        ]
        report.user_properties += [("hole", name) for name in kinds]
    return report


def pytest_runtest_logreport(report) -> None:
    """Count the campaign's cases by class; a test that stands for several says how many by ``record_property``."""
    found = dict(report.user_properties)
    if report.when == "call" and "campaign" in found and not report.skipped:
        CAMPAIGN[found["campaign"]] += found.get("runs", 1)
        CAMPAIGN["failed"] += report.failed
        CAMPAIGN.update(value for name, value in report.user_properties if name == "hole")


def pytest_terminal_summary(terminalreporter) -> None:
    classes = [f"{count:,} {name}" for name, count in CAMPAIGN.items() if name not in (*HOLES.values(), "failed")]
    if classes:
        holes = [f"{CAMPAIGN[name]} {name}" for name in HOLES.values()]
        terminalreporter.write_line(f"campaign: {', '.join(classes)}")
        terminalreporter.write_line(f"          {CAMPAIGN['failed']} failed: {', '.join(holes)}")


@pytest.fixture(scope="module")
def forge():
    with Forge() as forge:
        yield forge


@pytest.fixture(scope="module")
def case(forge, tmp_path_factory):
    """A merge that is known to succeed, its files in ``case.folder``."""
    return prepare(forge, tmp_path_factory.mktemp("case"), "merge a folder")


@pytest.fixture(scope="session")
def hub_server():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def local_hub(hub_server, monkeypatch, tmp_path):
    """An empty Hub on 127.0.0.1 that huggingface_hub talks to; its cache is ``tmp_path / "cache"``, and it never
    sleeps.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session()
    hub_server.reset()
    settings = {
        "ENDPOINT": hub_server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,  # the local Hub has no store of that kind
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.3,
        "HF_HUB_ETAG_TIMEOUT": 0.3,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / "xdg"))
    hub_server.slept = []
    monkeypatch.setattr(time, "sleep", hub_server.slept.append)
    yield hub_server
    hub_server.released.set()


@pytest.fixture
def gguf_hub(local_hub):
    """The Hub with one repository of GGUFs, quantized in several ways."""
    local_hub.repos[GGUF_REPO] = dict(GGUF_FILES)
    return local_hub
