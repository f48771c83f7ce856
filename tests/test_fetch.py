from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_gguf.errors import FileError, HubError, IntegrityError, MalformedError, UsageError
from lora_gguf.fetch import fetch, parse_reference
from tests.hub import COMMIT, TOKEN, Handler, Hub, git_sha1

REPO = "someone/a-lora"
CONFIG = json.dumps({"peft_type": "LORA", "r": 8}).encode()
WEIGHTS = hashlib.sha512(b"weights").digest() * 1000
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS, "README.md": b"read me", "optimizer.pt": b"big"}
LISTING, CONFIG_FILE, BLOB = r"GET /api/models/", r"/resolve/.*adapter_config", r"GET /cdn/"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 64000\n"
HTML = b"<!DOCTYPE html><html><title>Please log in</title></html>"


@pytest.fixture
def hub(local_hub):
    local_hub.repos[REPO] = dict(FILES)
    return local_hub


def cache_of(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "cache"
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"}


def answer(status: int, code: str = "", **headers) -> callable:
    def action(handler: Handler) -> bool:
        handler.send_error_code(status, code, {key.replace("_", "-"): value for key, value in headers.items()})
        return True

    return action


def content(body: bytes, headers: dict | None = None, length: int | None = None):
    def action(handler: Handler) -> bool:
        handler.send_content(body, headers, length=length)
        return True

    return action


def hang_up(handler: Handler) -> bool:
    handler.close_connection = True
    return True


def cut(n_bytes: int):
    """Send the answer's head and then ``n_bytes`` of the rest of the body, and hang up."""

    def action(handler: Handler) -> bool:
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}")
        handler.send_header("Content-Length", str(len(WEIGHTS) - start))
        handler.end_headers()
        handler.wfile.write(WEIGHTS[start : start + n_bytes])
        handler.close_connection = True
        return True

    return action


def stall(handler: Handler) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(WEIGHTS)))
    handler.end_headers()
    handler.hub.released.wait(5)
    return hang_up(handler)


def drip(handler: Handler) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(WEIGHTS)))
    handler.end_headers()
    for start in range(0, len(WEIGHTS), 8000):
        handler.wfile.write(WEIGHTS[start : start + 8000])
        handler.wfile.flush()
        handler.hub.released.wait(0.03)
    return True


def redirect(location: str):
    return lambda handler: answer(302, Location=location.format(hub=handler.hub.endpoint))(handler)


def wrong(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:]


PLAIN_HEADERS = {"ETag": f'"{git_sha1(CONFIG)}"', "X-Repo-Commit": COMMIT}
# name: (pattern, action, times), error, part of its message
FAILURES = {
    "weights of the right size, wrong bytes": ((BLOB, content(wrong(WEIGHTS)), 99), IntegrityError, "expected the hash"),
    "config of the right size, wrong bytes": (
        (CONFIG_FILE, content(wrong(CONFIG), PLAIN_HEADERS), 99), IntegrityError, "expected the hash",
    ),
    "short body": ((BLOB, content(WEIGHTS[:-1]), 99), IntegrityError, "ended early"),
    "long body": ((BLOB, content(WEIGHTS + b"x"), 99), IntegrityError, "ended early or late"),
    "empty body": ((BLOB, content(b""), 99), IntegrityError, "ended early"),
    "HTML page for the weights": ((BLOB, content(HTML), 99), IntegrityError, "ended early"),
    "HTML page of the right size": (
        (BLOB, content(HTML.ljust(len(WEIGHTS))), 99), IntegrityError, "an HTML page instead",
    ),
    "LFS pointer for the weights": ((BLOB, content(POINTER), 99), IntegrityError, "ended early"),
    "always dropped before the first byte": ((BLOB, hang_up, 99), HubError, "keeps breaking the connection"),
    "always dropped in the middle": ((BLOB, content(WEIGHTS[:9], length=len(WEIGHTS)), 99), HubError, "keeps breaking the connection"),
    "stalls": ((BLOB, stall, 99), HubError, "did not answer in time"),
    "listing stalls": ((LISTING, stall, 99), HubError, "did not answer in time"),
    "listing dropped": ((LISTING, hang_up, 99), HubError, "keeps breaking the connection"),
    "401 token": ((LISTING, answer(401, "", X_Error_Message="Invalid credentials in Authorization header"), 99), HubError, "did not accept the token"),
    "401 gated": ((r"/resolve/", answer(401, "GatedRepo"), 99), HubError, f"/{REPO}, then log in"),
    "403 gated": ((r"/resolve/", answer(403, "GatedRepo"), 99), HubError, f"/{REPO}, then log in"),
    "403": ((r"/resolve/", answer(403, X_Error_Message=f"your token {TOKEN} may not"), 99), HubError, "HTTP 403"),
    "403 disabled": ((LISTING, answer(403, X_Error_Message="Access to this resource is disabled."), 99), HubError, "disabled"),
    "404 repository": ((LISTING, answer(404, "RepoNotFound"), 99), HubError, "no such repository"),
    "404 revision": ((LISTING, answer(404, "RevisionNotFound"), 99), HubError, "no revision 'main'"),
    "404 file": ((CONFIG_FILE, answer(404, "EntryNotFound"), 99), HubError, "no file adapter_config.json"),
    "404 on the CDN": ((BLOB, answer(404), 99), HubError, "HTTP 404"),
    "410": ((LISTING, answer(410), 99), HubError, "HTTP 410"),
    "416": ((BLOB, answer(416), 99), HubError, "HTTP 416"),
    "429 always": ((LISTING, answer(429), 99), HubError, "slow down"),
    "429 and hours to wait": ((LISTING, answer(429, Retry_After="100000"), 99), HubError, "wait 100000 seconds"),
    "429 and hours to wait, on a file": ((CONFIG_FILE, answer(429, Retry_After="100000"), 99), HubError, "wait 100000 seconds"),
    "429 and hours to wait, on the CDN": ((BLOB, answer(429, Retry_After="100000"), 99), HubError, "wait 100000 seconds"),
    "429 by rate limit": ((LISTING, answer(429, RateLimit='"api";r=0;t=4000'), 99), HubError, "wait 4000 seconds"),
    "500 always": ((LISTING, answer(500), 99), HubError, "HTTP 500: it has trouble"),
    "503 on a file": ((CONFIG_FILE, answer(503), 99), HubError, "HTTP 503: it has trouble"),
    "502 on the CDN": ((BLOB, answer(502), 99), HubError, "HTTP 502: it has trouble"),
    "HTML page for the listing": ((LISTING, content(HTML), 99), HubError, "something else than JSON"),
    "HTML page for a file": ((CONFIG_FILE, content(HTML), 99), HubError, "does not answer as a Hub does"),
    "JSON that is no listing": ((LISTING, content(b"[1]"), 99), HubError, "the client failed"),
    "redirect loop": ((r"/resolve/", redirect("{hub}/someone/a-lora/resolve/main/x"), 99), HubError, "redirects without end"),
    "redirect to a file": ((r"/resolve/.*safetensors", lambda h: redirect_to_file(h), 99), HubError, "not http"),
    "ETag that leaves the cache": (
        (CONFIG_FILE, content(CONFIG, {"ETag": '"../../../../evil"', "X-Repo-Commit": COMMIT}), 99), HubError, "expected a hash",
    ),
    "commit that leaves the cache": (
        (CONFIG_FILE, content(CONFIG, {"ETag": '"aa"', "X-Repo-Commit": "../../evil"}), 99), HubError, "expected a hash",
    ),
}  # fmt: skip


def redirect_to_file(handler: Handler) -> bool:
    headers = {"Location": "file:///etc/passwd", "X-Linked-ETag": f'"{hashlib.sha256(WEIGHTS).hexdigest()}"', "X-Repo-Commit": COMMIT}
    handler.send_content(b"", headers, 302)
    return True


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_line_and_leaves_nothing_behind(hub, tmp_path, capfd, name):
    (pattern, action, times), error, part = FAILURES[name]
    hub.fault(pattern, action, times)
    with pytest.raises(error) as caught:
        fetch(REPO)
    message = str(caught.value)
    assert part in message and message.startswith(REPO) or "127.0.0.1" in message and part in message
    assert message.isprintable() and len(message) < 500 and TOKEN not in message + repr(caught.value)
    assert caught.value.__cause__ is None and not caught.value.details
    assert capfd.readouterr() == ("", "")
    files = cache_of(tmp_path)
    assert not [path for path in files if path.endswith(".incomplete")]
    assert all(content in FILES.values() for path, content in files.items() if "/blobs/" in path or "/snapshots/" in path)
    assert TOKEN.encode() not in b"".join(files.values())
    assert sorted(os.listdir(tmp_path)) in ([], ["cache"])
    assert sum(hub.slept) < 60 and len(hub.log) < 30


RECOVERIES = {
    "dropped once before the first byte": (BLOB, hang_up, 1),
    "dropped twice": (BLOB, cut(1000), 2),
    "dropped at the last byte": (BLOB, cut(len(WEIGHTS) - 1), 1),
    "stalls once": (BLOB, stall, 1),
    "slow but steady": (BLOB, drip, 1),
    "500 twice": (LISTING, answer(500), 2),
    "500 once on a file": (r"HEAD .*adapter_config", answer(500), 1),
    "429 and a second to wait": (LISTING, answer(429, Retry_After="1"), 2),
    "429 on the CDN": (BLOB, answer(429, Retry_After="2"), 1),
    "listing dropped once": (LISTING, hang_up, 1),
    "a moved repository": (r"GET /api/models/someone/a-lora", redirect("{hub}/api/models/someone/new-name/revision/main"), 1),
}


@pytest.mark.parametrize("name", RECOVERIES)
def test_what_passes_is_tried_again(hub, tmp_path, capfd, name):
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


EVIL_NAMES = [
    "../../evil/adapter_config.json", "/tmp/adapter_config.json", "..\\adapter_config.json", "adapter_config.json\0", "a" * 300,
    "ADAPTER_CONFIG.JSON", "C:adapter_config.json", "\x1b[2Jadapter_config.json", "./adapter_config.json", "", "//adapter_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_file_names_from_a_repository_never_leave_the_folder(hub, tmp_path, name):
    hub.listing_changes["siblings"] = [hub.sibling(n, b"evil") for n in (name, name.replace("config.json", "model.safetensors"))]
    with pytest.raises(HubError) as caught:
        fetch(REPO, output=tmp_path / "out")
    assert str(caught.value).isprintable()
    hub.listing_changes["siblings"] += [hub.sibling(*item) for item in FILES.items()]
    fetch(REPO, output=tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]
    assert b"evil" not in cache_of(tmp_path).values()


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.bin", "a\\b.bin", ".bin", "sub/x.bin", "x.py", "a\x1b.bin", "", "..", 5, None])
def test_shard_names_of_an_index_never_leave_the_folder(hub, shard):
    files = hub.repos[REPO]
    del files["adapter_model.safetensors"]
    files["adapter_model.safetensors.index.json"] = json.dumps({"weight_map": {"a": shard}}).encode()
    with pytest.raises(MalformedError) as caught:
        fetch(REPO)
    assert str(caught.value).isprintable()


def test_sharded_and_pickled_weights_and_tokenizer_files(hub):
    files = hub.repos[REPO]
    del files["adapter_model.safetensors"]
    files.update({"adapter_model.bin": b"PK\x03\x04", "tokenizer.json": b"{}", "added_tokens.json": b"{}", "tokenizer.py": b""})
    assert {p.name for p in fetch(REPO).iterdir()} == {"adapter_config.json", "adapter_model.bin", "tokenizer.json", "added_tokens.json"}
    del files["adapter_model.bin"]
    index = {"weight_map": {"x": "adapter_model-2.safetensors", "y": "adapter_model-1.safetensors", "z": "adapter_model-1.safetensors"}}
    files["adapter_model.safetensors.index.json"] = json.dumps(index).encode()
    files["adapter_model-1.safetensors"] = b"one"
    with pytest.raises(HubError, match="adapter_model-2.safetensors, which is not there"):
        fetch(REPO)
    files["adapter_model-2.safetensors"] = b"two"
    assert {"adapter_model-1.safetensors", "adapter_model-2.safetensors"} <= {p.name for p in fetch(REPO).iterdir()}


MISSING = {
    "no weights": ({"adapter_config.json": CONFIG}, "but no weights"),
    "other folders": ({"last/adapter_config.json": CONFIG, "best/adapter_config.json": CONFIG}, "in best, last: choose one with --subfolder"),
    "GGUF": ({"x-q4.gguf": b""}, "GGUF files: download x-q4.gguf"),
    "whole model": ({"config.json": b"{}", "model.safetensors": b""}, "a whole model"),
    "something else": ({"README.md": b""}, "not a PEFT adapter"),
    "nothing": ({}, "not a PEFT adapter"),
    "an LFS pointer in place of weights": ({**FILES, "adapter_model.safetensors": POINTER}, "a Git LFS pointer"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_repository_without_an_adapter_is_explained(hub, monkeypatch, name):
    hub.repos[REPO], part = MISSING[name]
    monkeypatch.setattr(hub, "lfs_suffixes", ())
    with pytest.raises(HubError, match=part):
        fetch(REPO)


def test_subfolders(hub):
    hub.repos[REPO] = {f"runs/last/{name}": body for name, body in FILES.items()}
    by_option, by_address = fetch(REPO, subfolder="runs/last/"), fetch(f"https://huggingface.co/{REPO}/tree/main/runs/last")
    assert by_option == by_address and (by_option / "adapter_model.safetensors").read_bytes() == WEIGHTS
    for subfolder in ("..", "runs/../..", "a\\..\\b", "a//b", "x\n"):
        with pytest.raises(UsageError, match="within the repository"):
            fetch(REPO, subfolder=subfolder)


def test_output_copies_once_and_never_replaces_another_file(hub, tmp_path):
    out = tmp_path / "deep" / "out"
    assert fetch(REPO, output=out) == fetch(REPO, output=out) == out
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {n: FILES[n] for n in ("adapter_config.json", "adapter_model.safetensors")}
    (out / "adapter_config.json").write_bytes(b"mine")
    with pytest.raises(FileError, match="exists already"):
        fetch(REPO, output=out)
    assert (out / "adapter_config.json").read_bytes() == b"mine"


def test_a_path_that_exists_wins(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / REPO / "sub").mkdir(parents=True)
    assert fetch(REPO) == Path(REPO) and fetch(REPO, subfolder="sub") == Path(REPO) / "sub"
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    assert fetch("adapter.gguf") == Path("adapter.gguf") and fetch(tmp_path / REPO) == tmp_path / REPO
    assert not hub.log
    for call, error in (
        (lambda: fetch(REPO, revision="main"), UsageError),
        (lambda: fetch(REPO, output="o"), UsageError),
        (lambda: fetch(REPO, subfolder="none"), FileError),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("source", ["./a/b", "../a/b", "/a/b", "~/a", "name", "a/b/c", "a\\b", "", "a/", "x/y\0", "~a/b", "a//b", "@/b@c/d"])
def test_what_cannot_be_a_repository_is_a_missing_path(hub, source):
    with pytest.raises((FileError, HubError)) as caught:
        fetch(source)
    assert not hub.log and str(caught.value).isprintable()


@pytest.mark.parametrize("source", ["so..me/repo", "a b/c", "é/x", "a/b@../x", "a/b@x\\y", "a/b@.", f"a/{'b' * 96}", "a/b@x\x1b[2J"])
def test_names_that_no_hub_has_are_refused_before_any_request(hub, source):
    with pytest.raises((HubError, FileError)) as caught:
        fetch(source)
    assert not hub.log and str(caught.value).isprintable()


def test_references():
    commit = "https://huggingface.co/o/n/tree/v1"
    assert parse_reference("o/n", None, None) == ("o/n", None, "")
    assert parse_reference("o/n@refs/pr/1", None, "/a/") == ("o/n", "refs/pr/1", "a")
    assert parse_reference("hf://o/n@v1", None, None) == parse_reference(commit, "v1", None) == ("o/n", "v1", "")
    with pytest.raises(UsageError, match="give one"):
        parse_reference("o/n@v1", "v2", None)


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


def command_line(hub, tmp_path, *arguments) -> subprocess.Popen:
    """``lora-gguf`` in a process of its own, with the client's settings in its environment."""
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    return subprocess.Popen([sys.executable, "-m", "lora_gguf", *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_run_ended_by_a_signal_leaves_no_partial_file_once_the_next_one_is_done(hub: Hub, tmp_path, sent):
    hub.fault(BLOB, stall, 1)
    process = command_line(hub, tmp_path, "fetch", REPO)
    deadline = time.monotonic() + 20
    while not hub.requests(BLOB) and time.monotonic() < deadline:
        hub.released.wait(0.02)
    process.send_signal(sent)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert output == b"" and errors.count(b"\n") == (sent != signal.SIGKILL) and TOKEN.encode() not in errors
    orphans = [path for path in cache_of(tmp_path) if path.endswith(".incomplete")]
    assert bool(orphans) is (sent == signal.SIGKILL)
    fetch(REPO)
    assert not [path for path in cache_of(tmp_path) if path.endswith(".incomplete")]


def test_the_command_prints_the_folder_and_nothing_else(hub, tmp_path):
    process = command_line(hub, tmp_path, "fetch", f"{REPO}@v1", "-o", str(tmp_path / "out"))
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output.decode(), errors) == (0, f"{tmp_path / 'out'}\n", b"")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written


@pytest.mark.parametrize("code", [8, 9])
def test_the_command_ends_with_one_line_and_its_code(hub, tmp_path, code):
    hub.fault(BLOB, *((answer(403, "GatedRepo", X_Error_Message=f"token {TOKEN}"), 9) if code == 8 else (content(wrong(WEIGHTS)), 9)))
    process = command_line(hub, tmp_path, "fetch", REPO)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (code, b"")
    assert errors.startswith(f"lora-gguf: error: {REPO}: ".encode()) and errors.count(b"\n") == 1 and TOKEN.encode() not in errors
