"""A headless Chromium, spoken to over its debugging protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """One tab.

    Attributes:
        said: What the console and the log said, and every request for something not in the page.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._count, self._events = socket, 0, []
        self.said: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        self._events.append(message["method"])
        params = message["params"]
        if message["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.said.append(json.dumps(params))
        if message["method"] == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        if message["method"] == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith("data:") and url != self.url:
                self.said.append(f"requested {url}")

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        self.url = file.resolve().as_uri()
        look = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=look)
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._events.clear()
        self.send("Page.navigate", url=self.url)
        while "Page.loadEventFired" not in self._events:
            self._note(json.loads(self._socket.recv(timeout=120)))

    def value(self, script: str) -> Any:
        """What a script gives."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    def screenshot(self, to: Path) -> None:
        """All of the page, as PNG."""
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=self._whole())
        to.write_bytes(base64.b64decode(taken["data"]))

    def _whole(self) -> dict[str, Any]:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a new browser; the test is skipped where there is none."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    client = pytest.importorskip("websockets.sync.client", reason="needs the package websockets")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command = [program, *options, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "DevTools listening on" in line)
        port = said.split("://")[1].split("/")[0]
        with client.connect(_page_address(port), max_size=None, open_timeout=60) as socket:
            yield Page(socket)
    finally:
        process.kill()
        process.wait()


def _page_address(address: str) -> str:
    """Of the first tab."""
    with urllib.request.urlopen(f"http://{address}/json/list") as answer:
        tabs = json.load(answer)
    return next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
