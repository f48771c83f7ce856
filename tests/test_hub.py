from __future__ import annotations

import hashlib
import os

import pytest

from lora_gguf.errors import HubError, IntegrityError
from lora_gguf.hub.downloads import fetch_adapter as fetch
from tests.hub import COMMIT, TOKEN
from tests.hub_faults import BLOB, CONFIG, FAILURES, FILES, RECOVERIES, REPO, WEIGHTS, cache_of, cut, wrong


@pytest.fixture
def hub(local_hub):
    local_hub.repos[REPO] = dict(FILES)
    return local_hub


@pytest.mark.campaign("Hub failures")
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_and_leaves_nothing_behind(hub, tmp_path, capfd, name):
    (pattern, action, times), error, part = FAILURES[name]
    hub.fault(pattern, action, times)
    with pytest.raises(error) as caught:
        fetch(REPO)
    message = str(caught.value)
    assert (part in message and message.startswith(REPO)) or ("127.0.0.1" in message and part in message)
    assert message.isprintable() and len(message) < 500 and TOKEN not in message + repr(caught.value)
    assert caught.value.__cause__ is None and not caught.value.details
    assert capfd.readouterr() == ("", "")
    files = cache_of(tmp_path)
    assert not [path for path in files if path.endswith(".incomplete")]
    assert all(
        content in FILES.values() for path, content in files.items() if "/blobs/" in path or "/snapshots/" in path
    )
    assert TOKEN.encode() not in b"".join(files.values())
    assert sorted(os.listdir(tmp_path)) in ([], ["cache"])
    assert sum(hub.slept) < 60 and len(hub.log) < 30


@pytest.mark.campaign("Hub failures")
@pytest.mark.parametrize("name", RECOVERIES)
def test_what_passes_is_tried_again(hub, capfd, name):
    hub.repos["someone/new-name"] = dict(FILES)
    hub.fault(*RECOVERIES[name])
    folder = fetch(REPO)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert capfd.readouterr() == ("", "")


def test_a_dropped_download_is_resumed_and_not_begun_again(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.fault(BLOB, cut(1000), 2)
    fetch(REPO)
    assert [headers.get("range") for headers in hub.requests(BLOB)] == [None, "bytes=1000-", "bytes=2000-"]


def test_the_second_fetch_downloads_nothing(hub):
    assert fetch(REPO) == fetch(REPO)
    assert len(hub.requests("/resolve/.*json")) == 2 and len(hub.requests(BLOB)) == 1


def test_the_token_goes_to_the_hub_but_never_to_the_cdn(hub):
    fetch(REPO)
    assert {headers.get("authorization") for headers in hub.requests("/api/|/resolve/")} == {f"Bearer {TOKEN}"}
    assert [headers.get("authorization") for headers in hub.requests(BLOB)] == [None]


def test_all_files_come_from_the_one_commit_that_the_revision_stood_for(hub):
    fetch(f"{REPO}@v1")
    assert hub.requests(rf"GET /api/models/{REPO}/revision/v1$")
    assert len(hub.requests(f"/resolve/{COMMIT}/")) == len(hub.requests("/resolve/")) == 3


def test_corruption_in_the_cache_is_found_and_the_next_run_repairs_it(hub):
    weights = fetch(REPO) / "adapter_model.safetensors"
    weights.resolve().write_bytes(wrong(WEIGHTS))
    with pytest.raises(IntegrityError, match="removed from the cache"):
        fetch(REPO)
    assert (fetch(REPO) / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_offline_mode_uses_the_cache_and_only_the_cache(hub, monkeypatch):
    from huggingface_hub import constants

    online = fetch(f"{REPO}@v1")
    n_requests = len(hub.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(f"{REPO}@v1") == fetch(REPO, revision=COMMIT) == online
    for source in (REPO, "someone/else", f"{REPO}@v2", f"{REPO}@{'f' * 40}"):
        with pytest.raises(HubError, match="not in the cache, and offline mode is on"):
            fetch(source)
    assert len(hub.log) == n_requests


def test_offline_mode_checks_hashes_too(hub, monkeypatch):
    from huggingface_hub import constants

    (fetch(REPO) / "adapter_model.safetensors").resolve().write_bytes(wrong(WEIGHTS))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(IntegrityError, match="adapter_model.safetensors: expected the hash"):
        fetch(REPO)
    with pytest.raises(HubError, match="no weights"):
        fetch(REPO)


def test_no_server_at_all(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(HubError, match="cannot connect to 127.0.0.1:9 .*HF_HUB_OFFLINE=1") as caught:
        fetch(REPO)
    assert "secret" not in str(caught.value)


def test_progress_reaches_the_whole_size(hub):
    seen = []
    fetch(REPO, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("adapter_model.safetensors", len(WEIGHTS), len(WEIGHTS))
    assert ("adapter_config.json", len(CONFIG), len(CONFIG)) in seen


def test_the_partial_files_of_a_killed_run_are_removed_but_not_those_of_a_running_one(hub, tmp_path):
    from filelock import FileLock

    etag = hashlib.sha256(WEIGHTS).hexdigest()
    blobs, locks = (tmp_path / "cache" / part / "models--someone--a-lora" for part in (".", ".locks"))
    stale = blobs / "blobs" / f"{etag}.0123abcd.incomplete"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"part")
    fetch(REPO)
    assert not stale.exists()
    stale.write_bytes(b"part")
    with FileLock(locks / f"{etag}.lock"):
        fetch(REPO)
        assert stale.exists()
