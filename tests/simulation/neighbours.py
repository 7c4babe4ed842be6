"""What a poisoned request costs its neighbours: so many streams at all times, then one request that harms its worker.

Everything but the delays of the network is fixed: steps of 10 ms that hold 2,048 tokens, the time constants of a real
deployment, a worker that is back 1.5 s after its death.
"""

from __future__ import annotations

from dataclasses import dataclass

from frontend.entries import NewRequest
from gpu_worker.oracle import expected
from protocol.columns import pack
from protocol.messages import SamplingParams
from protocol.times import Times
from tests.simulation.broken import ENDING, PROGRESS
from tests.simulation.clients import POISON, Client, Owed
from tests.simulation.mixes import Mix
from tests.simulation.worker_node import WorkerNode
from tests.simulation.world import World

STREAMS = 48
PROMPT, TOKENS = 20, 100
LOOK = 0.01  # seconds between two looks at the streams
ARRIVES = 2.0  # when the poisoned request comes
LONGEST = 120.0  # seconds until it must have failed


@dataclass(frozen=True)
class Cost:
    """Seconds are simulated ones."""

    median: float  # over the innocent streams, of the longest time that each waited for a token
    longest: float  # of them all
    deaths: dict[str, int]  # by worker
    found: float  # seconds until the poisoned request had failed


@dataclass
class Stream:
    """An innocent one, as it was last seen."""

    client: Client
    had: int  # tokens
    since: float  # when that was news


class Neighbours(World):
    """A deployment with innocent streams: when one ends, a new one begins."""

    def __init__(self, effect: str, workers: int, after: int = 0, streams: int = STREAMS, seed: int = 1) -> None:
        """The poisoned request harms its worker from its prompt on, or when it has had `after` tokens."""
        mix = Mix(
            f"{effect} after {after} tokens, {workers} workers",
            requests=0,
            frontends=1,
            workers=workers,
            slots=streams + 8,
            blocks=32 * (streams + 8),
            step_tokens=2048,
            step_time=(0.01, 0.01),
            worker_back=(1.5, 1.5),
            poison=effect,
            poison_from=PROMPT + after - 1,
        )
        self._deaths: dict[str, int] = {}
        self._stalls = [0.0] * streams  # by stream, or those that came one after another
        super().__init__(seed, mix, Times())
        self._streams = [self._begin(TOKENS - i) for i in range(streams)]

    def worker_died(self, node: WorkerNode) -> None:
        self._deaths[node.name] = self._deaths.get(node.name, 0) + 1
        super().worker_died(node)

    def cost(self) -> Cost:
        """Run until the poisoned request has failed and all others have ended. Raises Broken."""
        while self.clock.now < ARRIVES:
            self._look()
        self._stalls = [0.0] * len(self._streams)
        poisoned = self._ask(TOKENS, poisoned=True)
        while not poisoned.ended:
            self._look()
            if self.clock.now > ARRIVES + LONGEST:
                raise self.broken(PROGRESS, f"the poisoned request has not failed; deaths: {self._deaths}")
        found, stalls = self.clock.now - ARRIVES, sorted(self._stalls)
        error = poisoned.entry.error
        if error is None or error.code != "step_failed":
            raise self.broken(ENDING, f"the poisoned request ended with {error}")
        while self.clients.waiting:
            self._step()
        self._settle()
        return Cost(stalls[len(stalls) // 2], stalls[-1], self._deaths, found)

    def _begin(self, tokens: int = TOKENS) -> Stream:
        return Stream(self._ask(tokens), 0, self.clock.now)

    def _ask(self, tokens: int, poisoned: bool = False) -> Client:
        number = len(self.clients.all)
        prompt = [self.rng.randrange(97, 123) for _ in range(PROMPT)]
        if poisoned:
            prompt[-1] = POISON
        new = NewRequest(number.to_bytes(16, "little"), "oracle", pack(prompt), SamplingParams(max_tokens=tokens), [number])
        node = self.frontends["frontend-0"]
        client = Client(new, [Owed(expected(prompt, number, tokens, []), "length", "")], poisoned, node.submit(new), node, told=[0])
        self.clients._enter(client)
        return client

    def _look(self) -> None:
        """Let a little time pass. See how long each innocent stream has waited; another one begins where one has ended."""
        until = self.clock.now + LOOK
        while self.clock.next_time() <= until:
            self._step()
        self.clock.now = until
        self._check()
        for i, stream in enumerate(self._streams):
            had = len(stream.client.entry.choices[0].tokens)
            self._stalls[i] = max(self._stalls[i], until - stream.since)
            if stream.client.ended:
                self._streams[i] = self._begin()
            elif had > stream.had:
                stream.had, stream.since = had, until
