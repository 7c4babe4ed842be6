"""Take the pictures of the live page that the documentation shows: `python -m tests.tools.page_screenshots`.

A stack of two workers with the packaged model, under load; in the dark pictures a worker has just been killed.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import httpx

from tests.e2e.stack import Stack, eventually, stack
from tests.pagewire.browser import Browser, browser

DOCS = Path(__file__).parents[2] / "docs"
ROW = "tr[data-name='worker-0']"
STREAMS = 10
PROMPT = "The three services of an inference server are"


def load(url: str, client: int, stop: threading.Event) -> None:
    """Ask one thing after another, with a beginning that all clients have in common."""
    number = 0
    while not stop.is_set():
        number += 1
        prompt = "Once upon a time there was a server, and it had a name. " * 4 + f"Client {client}, chapter {number}. " * 6
        body = {"prompt": prompt, "max_tokens": 80, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            for _ in answer.iter_lines():
                if stop.is_set():
                    return


def take(running: Stack, window: Browser) -> None:
    """Light, then dark with a worker killed, wide and narrow."""
    window.command("goog/cdp/execute", cmd="Emulation.setScrollbarsHidden", params={"hidden": True})
    window.media("light", 1280, 900)
    window.open(running.admin)
    eventually(lambda: window.run("return document.querySelectorAll('#services .ready').length") >= 5)
    eventually(lambda: window.run("return history.length") > 0 and window.text("#ttft") != "–", 120)
    window.run("document.querySelector('#prompt').value = arguments[0]; document.querySelector('#max-tokens').value = 200", PROMPT)
    window.run("document.querySelector('#send').click()")
    eventually(lambda: window.run("return document.querySelectorAll('#latencies rect').length") > 20, 60)
    window.picture(DOCS / "page-light.png")
    running.kill("worker")
    eventually(lambda: window.run("return document.querySelector(arguments[0])?.className", ROW) == "gone")
    window.media("dark", 1280, 900)
    window.picture(DOCS / "page-dark.png")
    window.media("dark", 390, 844)
    window.picture(DOCS / "page-phone.png")


def main() -> None:
    """All of it."""
    stop = threading.Event()
    with stack() as running, tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
        running.up("--workers", "2", "--num-gpu-blocks", "320", "--threads", "1")
        clients = [threading.Thread(target=load, args=(running.url, i, stop)) for i in range(STREAMS)]
        try:
            for client in clients:
                client.start()
            take(running, window)
        finally:
            stop.set()
            for client in clients:
                client.join(30)


if __name__ == "__main__":
    main()
