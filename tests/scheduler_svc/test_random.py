"""Random lives of an engine: whatever happens, accounts agree at every step and every stream is the right one."""

from __future__ import annotations

import random

import pytest

from protocol.columns import unpack
from tests.scheduler_svc.fake_frontend import FakeFrontend, Stream
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.play import Stage

MIXES = {
    "calm": {},
    "scarce blocks": {"blocks": 18},
    "scarce slots": {"slots": 2},
    "small steps": {"max_step_tokens": 5},
    "chunks": {"max_step_tokens": 16, "long_prefill_token_threshold": 6},
    "no caching": {"enable_prefix_caching": False, "blocks": 20},
    "deep": {"depth": 4, "blocks": 20},
    "priorities": {"policy": "priority", "blocks": 20, "slots": 3},
    "wrong guesses": {"blocks": 20, "expected": 1},
    "wrong guesses, no caching": {"blocks": 16, "expected": 1, "enable_prefix_caching": False, "depth": 3},
    "wrong guesses, priorities": {"blocks": 20, "expected": 1, "policy": "priority"},
    "swaps": {"blocks": 20, "expected": 1, "host_blocks": 24, "preemption": "swap"},
    "swaps, scarce host blocks, deep": {"blocks": 16, "expected": 1, "host_blocks": 9, "preemption": "swap", "depth": 3, "lag": 1},
    "swaps, no caching, priorities": {
        "blocks": 20,
        "expected": 1,
        "host_blocks": 30,
        "preemption": "swap",
        "enable_prefix_caching": False,
        "policy": "priority",
    },
    "whichever is cheaper, adaptive depth": {"blocks": 18, "expected": 1, "host_blocks": 12, "depth": 0, "max_num_partial_prefills": 1},
    "two workers that swap": {"workers": 2, "blocks": 18, "slots": 3, "expected": 1, "host_blocks": 12, "preemption": "swap"},
    "two workers": {"workers": 2, "blocks": 20, "slots": 3},
}


NAN_TOKEN = 59


class Life:
    def __init__(self, seed: int, mix: dict[str, object]) -> None:
        self.random = random.Random(seed)
        names = "enable_prefix_caching depth policy long_prefill_token_threshold preemption max_num_partial_prefills"
        engine = {k: v for k, v in mix.items() if k in names.split()}
        self.sizes = {k: v for k, v in mix.items() if k in ("blocks", "host_blocks", "slots", "max_step_tokens", "lag")}
        self.stage = Stage(**engine)
        self.workers: list[FakeWorker] = []
        for i in range(int(mix.get("workers", 1))):  # type: ignore[call-overload]
            self.workers.append(self.stage.worker(incarnation=i + 1, nan_tokens={NAN_TOKEN}, **self.sizes))
        if "expected" in mix:
            for model in self.stage.engine.models.values():
                model.outputs.add = lambda length: None  # type: ignore[method-assign]
                model.outputs.expected = 1
        self.frontends: list[FakeFrontend] = [self.stage.frontend(incarnation=100 + i) for i in range(2)]
        self.prefixes = [[self.random.randrange(60) for _ in range(20)] for _ in range(3)]
        self.streams: list[Stream] = []

    def arrive(self) -> None:
        r = self.random
        prompt = r.choice(self.prefixes)[: r.randrange(1, 20)] + [r.randrange(60) for _ in range(r.randrange(1, 12))]
        self.streams.append(
            r.choice(self.frontends).submit(
                prompt,
                self.stage.now,
                max_tokens=r.randrange(1, 25),
                n=r.choice((1, 1, 1, 2, 4)),
                seed=r.randrange(99),
                priority=r.randrange(3),
            )
        )

    def act(self, faults: bool) -> None:
        r, stage = self.random, self.stage
        if r.random() < 0.3:
            self.arrive()
        if r.random() < 0.05 and self.streams:
            stream = r.choice(self.streams)
            if not (stream.complete or stream.aborted or stream.moved or stream.failed):
                owner = next(f for f in self.frontends if stream in f.streams.values())
                owner.abort(stream, stage.now)
        if faults and r.random() < 0.03:
            worker = r.choice(self.workers)
            stage.workers.pop(worker.session)
            for _ in range(r.randrange(len(worker.plans) + 1)):  # what it still does, nobody hears
                worker.run(worker.plans.popleft())
            worker.close(stage.now)
            stage.deliver()
            if r.random() < 0.5:
                worker.hashes.clear()
                worker.kv.clear()
                worker.incarnation += 1000
            stage.reopen(worker)
            worker.ready(stage.now)
        if faults and r.random() < 0.03:
            frontend = r.choice(self.frontends)
            stage.frontends.pop(frontend.session)
            frontend.close(stage.now)
            for _ in range(r.randrange(4)):
                self.turn()
            stage.reopen(frontend)
            stage.deliver()
            frontend.resubmit(stage.now)
            stage.deliver()
            stage.engine.check()

        if faults and r.random() < 0.05:
            self.more_faults()

    def more_faults(self) -> None:
        """Stop strings, streams taken over, frontends that do not read, steps that raise."""
        r, stage = self.random, self.stage
        frontend = r.choice(self.frontends)
        living = [s for s in frontend.streams.values() if not (s.complete or s.aborted or s.moved or s.failed)]
        kind = r.choice(("stop", "attach", "silence", "raise"))
        if kind == "stop" and living:
            stream = r.choice(living)
            frontend.stop(stream, r.choice(sorted(set(range(len(stream.known))) - stream.ended)), stage.now)
        elif kind == "attach" and living:
            other = next(f for f in self.frontends if f is not frontend)
            other.attach(r.choice(living).submit.request, stage.now)
        elif kind == "silence":
            frontend.silent, frontend.unacked = not frontend.silent, 0
        elif kind == "raise":
            worker = r.choice(self.workers)
            if worker.plans:
                session, step = worker.session, worker.plans[0].step
                stage.workers.pop(session)
                worker.close(stage.now)
                stage.deliver()
                stage.reopen(worker, failed_session=session, failed_step=step)
                worker.ready(stage.now)

    def turn(self) -> None:
        """One random move of the pipeline."""
        stage, r = self.stage, self.random
        stage.now += 0.001
        stage.engine.tick(stage.now)
        stage.deliver()
        if r.random() < 0.7:
            stage.plan()
        for worker in self.workers:
            if worker.plans and r.random() < 0.7:
                worker.step(stage.now)
                stage.deliver()
                stage.engine.check()


@pytest.mark.parametrize("faults", [False, True], ids=["without faults", "with faults"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_every_stream_is_right_and_every_account_agrees(seed: int, mix: str, faults: bool) -> None:
    life = Life(seed, MIXES[mix])
    for _ in range(150):
        life.act(faults)
        life.turn()
    for frontend in life.frontends:
        frontend.silent, frontend.unacked = False, 0
    life.stage.run()
    for frontend in life.frontends:
        frontend.verify()
        for stream in frontend.streams.values():
            ends = [stream.complete, stream.aborted, stream.moved, stream.failed is not None]
            assert any(ends), "a stream has no end"
            if stream.failed is not None:
                assert stream.failed.code == ("nan" if NAN_TOKEN in unpack(stream.submit.prompt) else "step_failed")
    stats = life.stage.engine.stats()
    assert stats["blocks_used"] == stats["requests_running"] == stats["requests_waiting"] == 0
    assert stats["host_blocks_used"] == 0
    if "swap" in mix and not faults:
        assert stats["swaps_out"] >= stats["swaps_in"] > 0
    assert not life.stage.engine.ledger.requests
    for worker in life.workers:
        assert not worker.records, "a record was not dropped"
        assert not worker.slots
