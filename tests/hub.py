"""A small Hub on 127.0.0.1 for the real client: listing, resolve with HEAD and GET, a CDN at another origin, and
faults.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_CanaryNeverToBeSeen"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GGUF_REPO = "maker/Tiny-1B-GGUF"
GGUF_FILES = {
    "Tiny-1B-Q4_K_M.gguf": b"GGUF" + b"4" * 400,
    "Tiny-1B-Q8_0.gguf": b"GGUF" + b"8" * 800,
    "BF16/Tiny-1B-BF16-00001-of-00002.gguf": b"GGUF" + b"1" * 900,
    "BF16/Tiny-1B-BF16-00002-of-00002.gguf": b"GGUF" + b"2" * 900,
    "F16/Tiny-1B-F16-00001-of-00002.gguf": b"GGUF" + b"a part is missing",
    "mmproj-Tiny-F16.gguf": b"GGUFm",
    "imatrix.gguf": b"GGUFi",
    "README.md": b"",
}
Fault = Callable[["Handler"], bool]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, *_args) -> None:
        """A client that hangs up is no failure of the test."""


class Hub:
    """Repositories by id and files by name; ``faults`` are (pattern of ``METHOD path``, times left, what to do
    instead).
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, list[str]] = {}
        self.downloads: dict[str, int] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # what was uploaded, by sha256
        self.messages: list[str] = []  # of the commits
        self.lfs_suffixes = (".safetensors", ".bin", ".gguf", ".model")
        self.commit, self.revisions = COMMIT, {"main": COMMIT, "v1": COMMIT, "feature/x": COMMIT}
        self.listing_changes: dict = {}
        self.faults: list[list] = []
        self.log: list[tuple[str, str, dict]] = []
        self.n_sent = 0  # bytes of all bodies
        self.released = threading.Event()
        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self.servers[1].server_port}"

    def fault(self, pattern: str, action: Fault, times: int = 1 << 30) -> None:
        """Let ``action`` answer the first ``times`` requests whose ``METHOD path`` matches ``pattern``; it may decline
        with False.
        """
        self.faults.append([re.compile(pattern), times, action])

    def reset(self) -> None:
        for state in (
            self.repos,
            self.tags,
            self.downloads,
            self.faults,
            self.log,
            self.listing_changes,
            self.private,
            self.objects,
            self.messages,
        ):
            state.clear()
        self.commit = self.revisions["main"] = COMMIT
        self.n_sent = 0
        self.released.set()
        self.released = threading.Event()

    def close(self) -> None:
        self.released.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def is_lfs(self, name: str) -> bool:
        return name.endswith(self.lfs_suffixes)

    def listing(self, repo_id: str) -> dict:
        files = self.repos[repo_id]
        siblings = [self.sibling(name, content) for name, content in files.items()]
        model = {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "sha": self.commit,
            "private": self.private.get(repo_id, False),
            "gated": False,
        }
        model |= {"tags": self.tags.get(repo_id, []), "downloads": self.downloads.get(repo_id, 0), "likes": 0}
        return {**model, "siblings": siblings, **self.listing_changes}

    def sibling(self, name: str, content: bytes) -> dict:
        entry = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
        if self.is_lfs(name):
            entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def requests(self, pattern: str) -> list[dict]:
        """The headers of the requests so far whose ``METHOD path`` matches ``pattern``."""
        return [headers for method, path, headers in self.log if re.search(pattern, f"{method} {path}")]


@lru_cache(32)
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(32)
def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub():
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_args) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        for fault in self.hub.faults:
            pattern, times, action = fault
            if times > 0 and pattern.search(f"{self.command} {path}"):
                fault[1] -= 1
                if action(self):
                    return
        self.serve(path)

    def serve(self, path: str) -> None:
        if self.command in ("POST", "PUT"):
            return self.serve_upload(path)
        if path == "/api/models":
            return self.serve_search(parse_qs(urlsplit(self.path).query).get("filter", []))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.serve_listing(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            return self.serve_file(match[1], match[3])
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self.send_content(self.hub.repos[match[1]][match[2]])
        self.send_error_code(404, "RepoNotFound")

    def serve_upload(self, path: str) -> None:
        """What a client sends to make a repository and to commit files to it: large ones go to the CDN first."""
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self.hub.objects[match[1]] = self.body
            return self.send_content(b"")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send_error_code(401)
        if path == "/api/repos/create":
            return self.make_repo(json.loads(self.body))
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(self.body)["files"]
            return self.send_json({"files": [self.upload_mode(match[1], file["path"]) for file in files]})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self.send_json(
                {"transfer": "basic", "objects": list(map(self.upload_of, json.loads(self.body)["objects"]))}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self.commit(match[1], [json.loads(line) for line in self.body.splitlines()])
        return self.send_error_code(404)

    def make_repo(self, wanted: dict) -> None:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if repo_id in self.hub.repos:
            return self.send_json({"url": f"{self.hub.endpoint}/{repo_id}"}, 409)
        self.hub.repos[repo_id] = {}
        self.hub.private[repo_id] = wanted.get("visibility") == "private" or wanted.get("private") is True
        return self.send_json({"url": f"{self.hub.endpoint}/{repo_id}"})

    def upload_mode(self, repo_id: str, name: str) -> dict:
        content = self.hub.repos[repo_id].get(name)
        large = self.hub.is_lfs(name)
        oid = None if content is None else sha256(content) if large else git_sha1(content)
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def upload_of(self, wanted: dict) -> dict:
        """Where an object goes; nowhere if it is here."""
        here = wanted["oid"] in self.hub.objects
        action = {"upload": {"href": f"{self.hub.cdn}/lfs/{wanted['oid']}"}}
        return {"oid": wanted["oid"], "size": wanted["size"], **({} if here else {"actions": action})}

    def commit(self, repo_id: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo_id][value["path"]] = self.hub.objects[value["oid"]]
            else:
                self.hub.repos[repo_id][value["path"]] = base64.b64decode(value["content"])
        self.hub.commit = self.hub.revisions["main"] = git_sha1(self.body)
        self.send_json(
            {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{self.hub.commit}", "commitOid": self.hub.commit}
        )

    def send_json(self, data: dict, status: int = 200) -> None:
        self.send_content(json.dumps(data).encode(), {"Content-Type": "application/json"}, status)

    def serve_search(self, tags: list[str]) -> None:
        found = [repo_id for repo_id in self.hub.repos if set(tags) <= set(self.hub.tags.get(repo_id, []))]
        models = [{**self.hub.listing(repo_id), "siblings": None} for repo_id in found]
        self.send_content(json.dumps(models).encode(), {"Content-Type": "application/json"})

    def serve_listing(self, repo_id: str, revision: str) -> None:
        if repo_id not in self.hub.repos:
            return self.send_error_code(401, "RepoNotFound")
        if revision not in self.hub.revisions and revision != self.hub.commit:
            return self.send_error_code(404, "RevisionNotFound")
        self.send_content(json.dumps(self.hub.listing(repo_id)).encode(), {"Content-Type": "application/json"})

    def serve_file(self, repo_id: str, name: str) -> None:
        if name not in self.hub.repos.get(repo_id, {}):
            return self.send_error_code(404, "EntryNotFound", {"X-Repo-Commit": self.hub.commit})
        content = self.hub.repos[repo_id][name]
        if not self.hub.is_lfs(name):
            return self.send_content(content, {"ETag": f'"{git_sha1(content)}"', "X-Repo-Commit": self.hub.commit})
        headers = {
            "Location": f"{self.hub.cdn}/cdn/{repo_id}/{name}",
            "X-Linked-ETag": f'"{sha256(content)}"',
            "X-Linked-Size": str(len(content)),
            "X-Repo-Commit": self.hub.commit,
        }
        self.send_content(b"", headers, 302)

    def send_error_code(self, status: int, code: str = "", headers: dict | None = None) -> None:
        self.send_content(b"", {**({"X-Error-Code": code} if code else {}), **(headers or {})}, status)

    def send_content(
        self, content: bytes, headers: dict | None = None, status: int = 200, length: int | None = None
    ) -> None:
        """Answer with ``content`` (of it the range asked for), announcing ``length`` bytes where that is to be a
        lie.
        """
        headers = dict(headers or {})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            status, start, end = 206, int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.hub.n_sent += len(content)
            self.wfile.write(content)
            self.wfile.flush()
        if length is not None and length > len(content):
            self.close_connection = True
