"""The plan that an idle device waits for is handed over, and sent, before those that follow it in the pipeline are made."""

from __future__ import annotations

from pathlib import Path

from protocol.codec import decode, decode_header
from protocol.columns import pack
from protocol.counters import Counters
from protocol.listener import FRONTENDS, WORKERS, Route
from protocol.messages import Choice, Geometry, Hello, Message, Plan, Ready, Result, Resumed, SamplingParams, Submit, Tokens
from protocol.sessions import Dialer
from protocol.times import Times
from scheduler_svc.core import Core
from scheduler_svc.settings import SchedulerSettings
from tests.scheduler_svc.play import Stage


def test_each_plan_is_handed_over_before_the_next_is_made() -> None:
    stage = Stage(depth=3)
    worker = stage.worker()
    stage.frontend().submit([1, 2, 3], stage.now, max_tokens=10, stop=False)
    stage.deliver()
    in_flight: list[int] = []
    room: list[bool] = []

    def made_one(more: bool) -> None:
        session, plan, _ = stage.engine.out.pop()
        assert isinstance(plan, Plan)
        in_flight.append(len(stage.engine.workers[session].in_flight))
        room.append(more)
        worker.plans.append(plan)

    assert stage.engine.schedule(stage.now, made_one)
    assert in_flight == [1, 2, 3]
    assert room == [True, True, False]
    assert [plan.step for plan in worker.plans] == [1, 2, 3]
    stage.run()


class Sessions:
    """A core with a worker and a frontend at the other ends of its links; what it sends is kept, by turns of transmitting."""

    def __init__(self, depth: int) -> None:
        self.now = 100.0
        numbers = iter(range(1, 1000))
        settings = SchedulerSettings(Path("."), times=Times(), depth=depth)
        self.core = Core(settings, lambda: next(numbers), lambda counter: counter + 1, lambda key: None, self.now)
        self.dialers: dict[Route, Dialer] = {}
        self.sent: list[list[Message]] = []
        while self.core.state != "active":
            self.now += Times().resync
            self.turn()

    def open(self, route: Route, hello: Hello) -> None:
        dialer = self.dialers[route] = Dialer(hello, 1, 1, Times(), Counters(), self.now)
        dialer.tick(self.now)
        self.deliver(route)
        self.turn()
        assert dialer.session

    def say(self, route: Route, message: Message) -> None:
        if isinstance(message, Ready):
            self.dialers[route].geometry = message.geometry  # plans are checked against it
        self.dialers[route].send(message, self.now)
        self.deliver(route)

    def deliver(self, route: Route) -> None:
        out = self.dialers[route].out[0]
        while out:
            self.core.receive(route, out.popleft()[1], self.now)

    def turn(self) -> list[list[Message]]:
        """One turn; plans and tokens in it, as they were transmitted together."""
        self.sent = []
        self.core.turn(self.now, self.transmit)
        self.transmit()
        return self.sent

    def transmit(self) -> None:
        bodies = []
        while self.core.out:
            route, frames = self.core.out.popleft()
            if len(frames) == 2 and decode_header(frames).session:
                bodies.append(decode(frames[1]))
            self.dialers[route].receive(0, 0, frames, self.now)
        self.sent.append([body for body in bodies if isinstance(body, Plan | Tokens)])


def test_a_core_has_each_plan_sent_before_it_makes_the_next_and_the_last_with_the_turn() -> None:
    sessions = Sessions(depth=3)
    worker, frontend = (WORKERS, b"w"), (FRONTENDS, b"f")
    sessions.open(worker, Hello("worker", "w", 1, 1))
    sessions.say(worker, Ready("m", b"f", Geometry(4, 64, 0, 8, 128, 32, 50), "none", tokenizer=bytes(16)))
    sessions.open(frontend, Hello("frontend", "f", 2, 1))
    sessions.say(frontend, Resumed(0))
    sessions.say(frontend, Submit(bytes(16), 1, "m", pack([1, 2, 3]), SamplingParams(10), [Choice(0, 1)]))
    first = sessions.turn()
    assert [[message.step for message in sent if isinstance(message, Plan)] for sent in first] == [[1], [2], [3]]

    sessions.say(worker, Result(1, pack([1]), pack([7]), bytes(1), seconds=0.001))
    (steady,) = sessions.turn()  # no plan may follow: it wakes ZeroMQ no more often than the tokens do
    assert sorted(type(message).__name__ for message in steady) == ["Plan", "Tokens"]
