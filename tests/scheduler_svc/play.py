"""An engine with workers and frontends to play with."""

from __future__ import annotations

from pathlib import Path

from protocol.columns import unpack
from protocol.counters import Counters
from protocol.messages import Geometry, Plan, PromptScores, Resumed, Tokens
from protocol.times import Times
from scheduler_svc.engine import Engine
from scheduler_svc.settings import SchedulerSettings
from tests.scheduler_svc.fake_frontend import FakeFrontend
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.formulas import VOCABULARY
from tests.scheduler_svc.wire import through

PROMPT = list(range(1, 19))  # 18 tokens: 4 blocks of 4, and 2 tokens


class Stage:
    """An engine with workers and frontends; `turn` moves everything by one step."""

    def __init__(self, **settings: object) -> None:
        self.now = 100.0
        self.counters = Counters()
        self.settings = SchedulerSettings(Path("."), **{"times": Times(), "depth": 2, **settings})  # type: ignore[arg-type]
        self.engine = Engine(self.settings, self.counters, lambda session: self.frontends[session].unacked)
        self.engine.hash_key = b"k" * 16
        self.workers: dict[int, FakeWorker] = {}
        self.frontends: dict[int, FakeFrontend] = {}
        self.sessions = 0
        self.plans: list[Plan] = []

    def session(self) -> int:
        self.sessions += 1
        return self.sessions

    def worker(self, ready: bool = True, **more: object) -> FakeWorker:
        names = ("block_size", "blocks", "host_blocks", "slots", "max_model_len", "max_step_tokens")
        sizes = dict(zip(names, (4, 64, 0, 8, 128, 32), strict=True))
        sizes.update({k: more.pop(k) for k in names if k in more})
        worker = FakeWorker(self.engine, Geometry(**sizes, vocab_size=VOCABULARY), self.session(), **more)  # type: ignore[arg-type]
        self.workers[worker.session] = worker
        worker.open(self.now)
        if ready:
            worker.ready(self.now)
        return worker

    def frontend(self, **more: object) -> FakeFrontend:
        frontend = FakeFrontend(self.engine, self.session(), **more)  # type: ignore[arg-type]
        self.frontends[frontend.session] = frontend
        frontend.open(self.now)
        frontend.send(Resumed(0), self.now)
        return frontend

    def reopen(self, peer: FakeWorker | FakeFrontend, **more: int) -> None:
        """The peer's session is over; the same process opens another."""
        group = self.workers if isinstance(peer, FakeWorker) else self.frontends
        group.pop(peer.session, None)
        peer.session = self.session()
        group[peer.session] = peer  # type: ignore[assignment]
        peer.open(self.now, **more)

    def lose(self, worker: FakeWorker) -> None:
        """The worker's session is over, and no other one is opened."""
        self.workers.pop(worker.session)
        worker.close(self.now)
        self.deliver()
        self.engine.check()

    def deliver(self) -> None:
        """Hand out what the engine says, and close what it wants closed."""
        engine = self.engine
        while engine.out or engine.fence:
            while engine.out:
                session, message, weight = engine.out.popleft()
                if session in self.workers:
                    worker = self.workers[session]
                    message = through(message, worker.geometry)
                    if isinstance(message, Plan):
                        worker.plans.append(message)
                        self.plans.append(message)
                elif session in self.frontends:
                    message = through(message)
                    tokens = len(unpack(message.ids)) if isinstance(message, Tokens) else 0
                    assert weight == (message.scores.count if isinstance(message, PromptScores) else tokens)
                    self.frontends[session].take(message, self.now)
            while engine.fence:
                session, _ = engine.fence.pop()
                worker = self.workers.pop(session)
                worker.close(self.now)

    def plan(self) -> bool:
        made = self.engine.schedule(self.now)
        self.deliver()
        self.engine.check()
        return made

    def turn(self, seconds: float = 0.001) -> bool:
        """Timers, plans, one step of each worker. Whether anything happened."""
        self.now += seconds
        self.engine.tick(self.now)
        self.deliver()
        busy = self.plan()
        for worker in list(self.workers.values()):
            if worker.plans:
                busy = True
                worker.step(self.now)
                self.deliver()
                self.engine.check()
        return busy

    def run(self, turns: int = 10_000) -> None:
        """Until nothing moves."""
        for _ in range(turns):
            if not self.turn():
                return
        raise AssertionError("it never comes to rest")
