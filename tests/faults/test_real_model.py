"""The packaged model on the CPU: every service is killed in turn, thrice, and no answer changes by a byte."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tests.e2e.stack import Stack, Streamed, eventually, stack, stream_completion

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]

TOPICS = ("the sea", "a train", "bread", "winter", "a clock", "the moon", "tea", "a map")
STREAMS = 16
ROUNDS = 3


def chats() -> list[dict[str, Any]]:
    """Questions, greedy and seeded."""
    return [
        {
            "messages": [{"role": "user", "content": f"Write {2 + i % 3} sentences about {TOPICS[i % len(TOPICS)]}."}],
            "max_tokens": 36,
            "temperature": (0, 0.8)[i % 2],
            "seed": i,
            "ignore_eos": True,
        }
        for i in range(STREAMS)
    ]


class Chats:
    """All chats at once."""

    def __init__(self, url: str) -> None:
        self.seen = [Streamed() for _ in range(STREAMS)]
        self._threads = [
            threading.Thread(target=stream_completion, args=(url, body, "/v1/chat/completions", 300.0, self.seen[i]), daemon=True)
            for i, body in enumerate(chats())
        ]
        for thread in self._threads:
            thread.start()

    def flow(self) -> None:
        """Wait until most of them have some tokens."""
        eventually(lambda: sum(seen.chunks > 4 for seen in self.seen) > STREAMS * 3 // 4, 120)
        assert any(thread.is_alive() for thread in self._threads), "the streams were over before the fault"

    def texts(self) -> list[tuple[str, list[str]]]:
        """What they have said, at the end."""
        for thread in self._threads:
            thread.join(300)
        assert all(seen.error is None and seen.done == 1 for seen in self.seen), self.seen
        return [(seen.texts[0], seen.reasons[0]) for seen in self.seen]


def at_rest(made: Stack) -> None:
    eventually(lambda: made.metrics().get('pagewire_blocks{name="scheduler-0",state="used"}') == 0, 60)


def test_three_rounds_of_killing_each_service_change_no_answer() -> None:
    with stack() as made:
        made.up("--workers", "2", "--frontends", "2")
        undisturbed = Chats(made.url).texts()
        for _ in range(ROUNDS):
            for role in ("worker", "scheduler"):
                asked = Chats(made.url)
                asked.flow()
                pid = made.kill(role)
                assert asked.texts() == undisturbed, role
                eventually(lambda pid=pid, role=role: made.service(role).pid != pid)
            at_rest(made)
            # A frontend takes its connections with it: what is asked next is answered by the others, and the same.
            pid = made.kill("frontend")
            assert Chats(made.url).texts() == undisturbed
            eventually(lambda pid=pid: made.service("frontend").pid != pid)
            time.sleep(0.5)
