"""A repository with an adapter for the local Hub, and every way in which a Hub and the way to it can fail."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from lora_gguf.errors import HubError, IntegrityError
from tests.hub import COMMIT, TOKEN, Handler, git_sha1

REPO = "someone/a-lora"
CONFIG = json.dumps({"peft_type": "LORA", "r": 8}).encode()
WEIGHTS = hashlib.sha512(b"weights").digest() * 1000
FILES = {
    "adapter_config.json": CONFIG,
    "adapter_model.safetensors": WEIGHTS,
    "README.md": b"read me",
    "optimizer.pt": b"big",
}
LISTING, CONFIG_FILE, BLOB = r"GET /api/models/", r"/resolve/.*adapter_config", r"GET /cdn/"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 64000\n"
HTML = b"<!DOCTYPE html><html><title>Please log in</title></html>"


def cache_of(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "cache"
    return {
        p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"
    }


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


def command_line(hub, tmp_path, *arguments) -> subprocess.Popen:
    """``lora-gguf`` in a process of its own, with the client's settings in its environment."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "home"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "lora_gguf", *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def redirect_to_file(handler: Handler) -> bool:
    headers = {
        "Location": "file:///etc/passwd",
        "X-Linked-ETag": f'"{hashlib.sha256(WEIGHTS).hexdigest()}"',
        "X-Repo-Commit": COMMIT,
    }
    handler.send_content(b"", headers, 302)
    return True


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
    "401 token": (
        (LISTING, answer(401, "", X_Error_Message="Invalid credentials in Authorization header"), 99), HubError, "did not accept the token",
    ),
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
    "a moved repository": (
        r"GET /api/models/someone/a-lora",
        redirect("{hub}/api/models/someone/new-name/revision/main"),
        1,
    ),
}
