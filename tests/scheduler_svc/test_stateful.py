"""Any order of events that hypothesis can think of: accounts agree at every step, every stream is the right one."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.scheduler_svc.play import FakeFrontend, Stage, Stream

WORKERS = st.integers(0, 1)


class Serving(RuleBasedStateMachine):
    """Two workers with few blocks in device and host memory, one frontend."""

    @initialize(
        mode=st.sampled_from(("recompute", "swap", "auto")),
        policy=st.sampled_from(("fcfs", "priority")),
        caching=st.booleans(),
        depth=st.integers(0, 3),
        lag=st.integers(0, 1),
    )
    def begin(self, mode: str, policy: str, caching: bool, depth: int, lag: int) -> None:
        self.stage = Stage(preemption=mode, policy=policy, enable_prefix_caching=caching, depth=depth)
        sizes = {"blocks": 16, "host_blocks": 12, "slots": 3, "lag": lag}
        self.workers = [self.stage.worker(incarnation=i + 1, **sizes) for i in range(2)]
        outputs = self.stage.engine.models["m"].outputs
        outputs.expected = 1  # so that blocks run out
        outputs.add = lambda length: None  # type: ignore[method-assign]
        self.frontend: FakeFrontend = self.stage.frontend()

    @property
    def living(self) -> list[Stream]:
        return [s for s in self.frontend.streams.values() if not (s.complete or s.aborted or s.failed)]

    @rule(
        shared=st.integers(0, 14),
        own=st.integers(1, 9),
        text=st.integers(0, 1),
        max_tokens=st.integers(1, 24),
        n=st.sampled_from((1, 1, 2, 3)),
        seed=st.integers(0, 50),
        priority=st.integers(0, 2),
    )
    def arrive(self, shared: int, own: int, text: int, max_tokens: int, n: int, seed: int, priority: int) -> None:
        prompt = [(7 * i + text) % 50 for i in range(shared)] + [(seed + i) % 60 for i in range(own)]
        self.frontend.submit(prompt, self.stage.now, max_tokens=max_tokens, n=n, seed=seed, priority=priority)

    @rule(turns=st.integers(1, 6))
    def serve(self, turns: int) -> None:
        for _ in range(turns):
            self.stage.turn()

    @rule()
    def plan(self) -> None:
        self.stage.plan()

    @rule(which=WORKERS)
    def step(self, which: int) -> None:
        if self.workers[which].plans:
            self.workers[which].step(self.stage.now)
            self.stage.deliver()

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.frontend.abort(data.draw(st.sampled_from(self.living)), self.stage.now)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def find_a_stop_string(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.living))
        choices = [i for i in range(len(stream.known)) if i not in stream.ended]
        self.frontend.stop(stream, data.draw(st.sampled_from(choices)), self.stage.now)

    @rule(which=WORKERS, heard=st.integers(0, 3), keeps=st.booleans())
    def lose_a_worker(self, which: int, heard: int, keeps: bool) -> None:
        """It runs some plans of which nobody hears; its blocks survive or not."""
        stage, worker = self.stage, self.workers[which]
        stage.workers.pop(worker.session)
        for _ in range(min(heard, len(worker.plans))):
            worker.run(worker.plans.popleft())
        worker.close(stage.now)
        stage.deliver()
        if not keeps:
            worker.hashes.clear()
            worker.kv.clear()
            worker.incarnation += 1000
        stage.reopen(worker)
        worker.ready(stage.now)

    @rule()
    def lose_the_frontend(self) -> None:
        stage, frontend = self.stage, self.frontend
        stage.frontends.pop(frontend.session)
        frontend.close(stage.now)
        stage.turn()
        stage.reopen(frontend)
        stage.deliver()
        frontend.resubmit(stage.now)
        stage.deliver()

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "stage"):
            self.stage.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "stage"):
            return
        self.stage.run()
        self.frontend.verify()
        for stream in self.frontend.streams.values():
            # a worker lost four times over a plan that one request has alone: the innocent end so, too
            assert stream.complete or stream.aborted or (stream.failed is not None and stream.failed.code == "step_failed")
        stats = self.stage.engine.stats()
        assert stats["blocks_used"] == stats["requests_running"] == stats["requests_waiting"] == 0
        assert stats["host_blocks_free"] == stats["host_blocks"]
        assert not self.stage.engine.ledger.requests


def machine(examples: int, steps: int) -> type:
    case = Serving.TestCase
    common = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return type(
        "TestServing",
        (case,),
        {"settings": settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=common)},
    )


TestServing = machine(15, 30)
TestServingLong = pytest.mark.slow(machine(150, 60))
