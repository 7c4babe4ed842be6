"""Headless Chromium, driven through ChromeDriver's own HTTP protocol (W3C WebDriver)."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.pagewire.processes import PATIENCE

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


def missing() -> str:
    """Which program is not installed; empty if none is missing."""
    return next((name for name in ("chromium", "chromedriver") if shutil.which(name) is None), "")


class Browser:
    """One window."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._session = session

    def command(self, path: str, **body: Any) -> Any:
        answer = self._client.post(f"/session/{self._session}/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def open(self, url: str) -> None:
        self.command("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function's body returns."""
        return self.command("execute/sync", script=script, args=list(arguments))

    def text(self, selector: str) -> str:
        """The text of the first element found; empty if there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def errors(self) -> list[str]:
        """What the page's scripts have failed with since the last call."""
        return [entry["message"] for entry in self.command("se/log", type="browser") if entry["source"] == "javascript"]

    def media(self, scheme: str, width: int, height: int) -> None:
        """Dark or light, and the size of the window in CSS pixels."""
        emulate = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.command("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=emulate)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        shot = self.command("goog/cdp/execute", cmd="Page.captureScreenshot", params={"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A window, for as long as the block lasts; its profile lies in `folder`."""
    log = folder / "chromedriver.log"
    with log.open("wb") as file:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=file, stderr=subprocess.STDOUT)
    try:
        port = None
        while port is None:
            assert driver.poll() is None, log.read_text()
            time.sleep(0.05)
            port = re.search(r"successfully on port (\d+)", log.read_text())
        with httpx.Client(base_url=f"http://127.0.0.1:{port[1]}", timeout=PATIENCE, trust_env=False) as client:
            options = {"args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"], "binary": shutil.which("chromium")}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            assert answer.status_code == 200, answer.text
            session = answer.json()["value"]["sessionId"]
            try:
                yield Browser(client, session)
            finally:
                client.delete(f"/session/{session}")
    finally:
        driver.terminate()
        driver.wait(PATIENCE)
