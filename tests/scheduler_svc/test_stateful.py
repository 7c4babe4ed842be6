"""Any order of events that hypothesis can think of: accounts agree at every step, every stream is the right one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.scheduler_svc.fake_frontend import FakeFrontend, Stream
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.play import Stage

WORKERS = st.integers(0, 1)


class Serving(RuleBasedStateMachine):
    """Two workers with few blocks in device and host memory, one frontend."""

    happened: Counter[str] = Counter()  # over all examples

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
        count=st.integers(1, 4),
        shared=st.integers(0, 14),
        own=st.integers(1, 9),
        text=st.integers(0, 1),
        max_tokens=st.integers(1, 30),
        n=st.sampled_from((1, 1, 2, 3)),
        seed=st.integers(0, 50),
        priority=st.integers(0, 2),
    )
    def arrive(self, count: int, shared: int, own: int, text: int, max_tokens: int, n: int, seed: int, priority: int) -> None:
        for each in range(seed, seed + count):
            prompt = [(7 * i + text) % 50 for i in range(shared)] + [(each + i) % 60 for i in range(own)]
            more = {"n": n, "seed": each, "priority": priority, "stop": each % 3 == 0}
            self.frontend.submit(prompt, self.stage.now, max_tokens=max_tokens, **more)

    @rule(turns=st.integers(1, 12))
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
    @rule(data=st.data(), by_text=st.booleans())
    def end_early(self, data: st.DataObject, by_text: bool) -> None:
        """A stop string is found in a choice, or the client leaves."""
        stream = data.draw(st.sampled_from(self.living))
        if by_text:
            choices = [i for i in range(len(stream.known)) if i not in stream.ended]
            self.frontend.stop(stream, data.draw(st.sampled_from(choices)), self.stage.now)
        else:
            self.frontend.abort(stream, self.stage.now)

    @precondition(lambda self: self.living)
    @rule(which=st.integers(0, 2), heard=st.integers(0, 3), keeps=st.booleans())
    def lose(self, which: int, heard: int, keeps: bool) -> None:
        """A worker, or the frontend; not more often than anything else happens."""
        if which == 2:
            self._lose_the_frontend()
        else:
            self._lose_a_worker(self.workers[which], heard, keeps)

    def _lose_a_worker(self, worker: FakeWorker, heard: int, keeps: bool) -> None:
        """It runs some plans of which nobody hears; its blocks survive or not."""
        stage = self.stage
        stage.workers.pop(worker.session)
        for _ in range(min(heard, len(worker.plans))):
            worker.run(worker.plans.popleft())
        worker.close(stage.now)
        stage.deliver()
        if not keeps:
            worker.hashes.clear()
            worker.kv.clear()
            worker.host_hashes.clear()
            worker.host.clear()
            worker.incarnation += 1000
        stage.reopen(worker)
        worker.ready(stage.now)

    def _lose_the_frontend(self) -> None:
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
        assert stats["host_blocks_used"] == 0
        assert not self.stage.engine.ledger.requests
        self._note(stats)

    def _note(self, stats: dict[str, float]) -> None:
        streams, plans = self.frontend.streams.values(), self.stage.plans
        Serving.happened.update(
            {
                "arrivals": len(streams),
                "finishes": int(stats["requests_finished"]),
                "aborts": sum(stream.aborted for stream in streams),
                "stop strings": sum(bool(stream.stopped) for stream in streams),
                "preemptions": int(stats["preemptions"]),
                "swaps out": int(stats["swaps_out"]),
                "swaps in": int(stats["swaps_in"]),
                "forks": sum(len(plan.fork_slots) // 4 for plan in plans),
                "copies of partial blocks": sum(len(plan.copy_to) // 4 for plan in plans),
                "prefix hits": int(stats["prefix_hits"]),
                "prefix hits in host memory": int(stats["host_hits"]),
                "workers lost": self.stage.counters.get("scheduler_workers_lost", 0),
                "blocks adopted": self.stage.counters.get("scheduler_blocks_adopted", 0),
                "host blocks adopted": self.stage.counters.get("scheduler_host_blocks_adopted", 0),
            }
        )


def machine(examples: int, steps: int) -> type:
    case = Serving.TestCase
    common = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return type(
        "TestServing",
        (case,),
        {"settings": settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=common)},
    )


TestServing = machine(15, 30)
TestServingLong = pytest.mark.timeout(900)(pytest.mark.slow(machine(150, 60)))


@pytest.mark.slow
def test_what_the_rules_are_to_drive_really_happens() -> None:
    """The rules prove nothing of what never comes about; this run is the same each time."""
    Serving.happened.clear()
    common = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    drive = settings(max_examples=30, stateful_step_count=40, deadline=None, database=None, derandomize=True, suppress_health_check=common)
    run_state_machine_as_test(Serving, settings=drive)
    missing = [what for what, n in Serving.happened.items() if not n]
    assert len(Serving.happened) == 14
    assert not missing, Serving.happened
