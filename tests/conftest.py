from __future__ import annotations

import time

import pytest

from tests.hub import TOKEN, running_hub


@pytest.fixture(scope="session")
def hub_server():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def local_hub(hub_server, monkeypatch, tmp_path):
    """An empty Hub on 127.0.0.1 that huggingface_hub talks to; its cache is ``tmp_path / "cache"``, and it never sleeps."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session()
    hub_server.reset()
    settings = {
        "ENDPOINT": hub_server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub_server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": True,
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
