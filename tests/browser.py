"""A real browser, Chromium, driven through its DevTools pipe: what a page asks of the network, complains of, and looks
like.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
# the browser reads commands from descriptor 3 and answers on 4
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One page in a Chromium of its own, whose profile is the empty folder ``profile``. Use as a context manager.

    ``events`` are all that the page reported so far: (method, parameters).
    """

    def __init__(self, profile: Path):
        self.events: list[tuple[str, dict]] = []
        self._n, self._rest = 0, b""
        commands, self._in = os.pipe()
        self._out, replies = os.pipe()
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, replies)]
        launcher = [sys.executable, "-c", LAUNCH, *map(str, ends), *arguments]
        self._process = subprocess.Popen(launcher, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (commands, replies, *ends):
            os.close(end)

    def __enter__(self) -> Browser:
        self._session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Emulation.setScrollbarsHidden", hidden=True)
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")
        return self

    def __exit__(self, *_exc) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)

    def __call__(self, method: str, **parameters) -> dict:
        """Send a DevTools command and wait for its answer."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": parameters} | (
            {"sessionId": self._session} if self._session else {}
        )
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self._n:
                assert "error" not in found, found
                return found["result"]
            if "method" in found:
                self.events.append((found["method"], found["params"]))

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            chunk = os.read(self._out, 1 << 20)
            assert chunk, "the browser closed its pipe"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path | str, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Show ``page``, a file or an address, and wait until it says that it is drawn (``body[data-drawn]``)."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        deadline = time.monotonic() + 60
        while self.value("document.body?.dataset.drawn") != "yes":
            assert time.monotonic() < deadline, self.events
            time.sleep(0.05)

    def value(self, expression: str):
        """What a JavaScript expression is in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        content = self("Page.captureScreenshot", captureBeyondViewport=True, clip=self._whole())["data"]
        path.write_bytes(base64.b64decode(content))

    def _whole(self) -> dict:
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        return [found["request"]["url"] for method, found in self.events if method == "Network.requestWillBeSent"]

    def complaints(self) -> list[dict]:
        """What it logged as errors or warnings, and exceptions."""
        logged = [found["entry"] for method, found in self.events if method == "Log.entryAdded"]
        console = [
            found
            for method, found in self.events
            if method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning")
        ]
        return logged + console + [found for method, found in self.events if method == "Runtime.exceptionThrown"]
