"""The packaged model on the CPU: every service is killed in turn, thrice, and no answer changes by a byte."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack, eventually, stack

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]

TOPICS = ("the sea", "a train", "bread", "winter", "a clock", "the moon", "tea", "a map")
STREAMS = 16
ROUNDS = 3


def chats() -> list[dict[str, Any]]:
    """Questions, greedy and seeded."""
    return [
        {
            "messages": [{"role": "user", "content": f"Write {2 + i % 3} sentences about {TOPICS[i % len(TOPICS)]}."}],
            "max_tokens": 30,
            "temperature": (0, 0.8)[i % 2],
            "seed": i,
            "ignore_eos": True,
        }
        for i in range(STREAMS)
    ]


class Chat:
    """One chat's stream. If its connection breaks it goes on where it was, at the same address, with `Last-Event-ID`."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.text = ""
        self.reasons: list[str] = []
        self.done = self.chunks = self.resumed = 0
        self.error: Any = None
        self._url, self._body = url, {**body, "stream": True}
        self._last_id = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(300)

    @property
    def flows(self) -> bool:
        """Whether it has some tokens, and more to come."""
        return self.chunks > 4 and not self.done

    def _run(self) -> None:
        while not self.done and self.error is None:
            try:
                self._read()
            except httpx.TransportError:
                time.sleep(0.1)

    def _read(self) -> None:
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._body, headers=headers, timeout=300) as response:
            if response.status_code != 200:
                if response.status_code != 503:
                    self.error = response.read()
                time.sleep(0.1)
                return
            self.resumed += bool(self._last_id)
            id = data = ""
            for line in response.iter_lines():
                if line.startswith("id: "):
                    id = line[4:]
                elif line.startswith("data: "):
                    data = line[6:]
                elif not line and data:  # an event counts once it is whole
                    self._event(data)
                    self._last_id, data = id or self._last_id, ""

    def _event(self, data: str) -> None:
        if data == "[DONE]":
            self.done += 1
            return
        event = json.loads(data)
        self.error = event.get("error")
        for choice in event.get("choices", ()):
            self.chunks += 1
            self.text += choice["delta"].get("content") or ""
            if choice["finish_reason"]:
                self.reasons.append(choice["finish_reason"])


class Chats:
    """All chats at once."""

    def __init__(self, url: str) -> None:
        self.seen = [Chat(url, body) for body in chats()]

    @property
    def flow(self) -> bool:
        """Whether most of them have some tokens, and more to come."""
        return sum(seen.flows for seen in self.seen) > STREAMS // 2

    @property
    def over(self) -> bool:
        """Whether most of them have ended."""
        return sum(seen.done for seen in self.seen) > STREAMS // 2

    @property
    def resumed(self) -> int:
        return sum(seen.resumed for seen in self.seen)

    def texts(self) -> list[tuple[str, list[str]]]:
        """What they have said, at the end."""
        for seen in self.seen:
            seen.join()
        assert all(seen.error is None and seen.done == 1 for seen in self.seen), [(seen.error, seen.done) for seen in self.seen]
        return [(seen.text, seen.reasons) for seen in self.seen]


def under_way(url: str) -> Chats:
    """Chats most of which flow at one time. If they were too quick for that they are asked again."""
    while True:
        asked = Chats(url)
        eventually(lambda asked=asked: asked.flow or asked.over, 120)
        if asked.flow:
            return asked
        asked.texts()


def at_rest(made: Stack) -> None:
    eventually(lambda: made.metrics().get('pagewire_blocks{name="scheduler-0",state="used"}') == 0, 60)


def killed(made: Stack, role: str, undisturbed: list[tuple[str, list[str]]]) -> None:
    """Kill a service under chats, which say what they say undisturbed.

    A frontend takes its connections with it, and nobody else does. If they have all gone to the other one, another is killed.
    """
    for _ in range(5):
        asked = under_way(made.url)
        pid = made.kill(role)
        assert asked.texts() == undisturbed, role
        eventually(lambda pid=pid: made.service(role).pid != pid)
        if role != "frontend":
            assert not asked.resumed, role
            return
        if asked.resumed:
            return
    raise AssertionError("no frontend that was killed had a connection")


def test_three_rounds_of_killing_each_service_change_no_answer() -> None:
    with stack() as made:
        made.up("--workers", "2", "--frontends", "2")
        undisturbed = Chats(made.url).texts()
        for _ in range(ROUNDS):
            for role in ("worker", "scheduler", "frontend"):
                killed(made, role, undisturbed)
            at_rest(made)
