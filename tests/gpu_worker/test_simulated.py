"""The simulated runner's time is virtual; its results come no earlier than that."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gpu_worker.core import WorkerCore
from gpu_worker.runner import Outcome, Step
from gpu_worker.settings import WorkerSettings
from gpu_worker.simulated import SimulatedRunner, StepTime
from protocol.columns import pack, unpack
from protocol.messages import Admit, Plan, SamplingParams
from tests.gpu_worker.worker_plans import rows_of

SETTINGS = WorkerSettings(run_dir=Path(), runner="simulated", block_size=4, num_gpu_blocks=16, max_num_seqs=2, max_model_len=64)


class Clock:
    """A clock that moves when somebody sleeps, and then a little too far, as real ones do."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + 0.0001


class Bench:
    def __init__(self, step_time: StepTime) -> None:
        self.clock = Clock()
        self.runner = SimulatedRunner(SETTINGS, step_time, self.clock, self.clock.sleep)
        self.core = WorkerCore(self.runner.load())
        self.number = 0

    def start(self, rows: bool = True) -> Step:
        self.number += 1
        columns: dict = {}
        if self.number == 1:
            columns = rows_of(
                bind_slots=[0],
                bind_generations=[1],
                bind_records=[1],
                assign_slots=[0] * 16,
                assign_indices=[*range(16)],
                assign_blocks=[*range(16)],
            )
            columns["admits"] = [Admit(1, pack([97] * 8), b"", 7, SamplingParams(50))]
        if rows:
            start, count = (0, 8) if self.number == 1 else (6 + self.number, 1)
            columns |= rows_of(slots=[0], generations=[1], starts=[start], counts=[count], outputs=[1])
        plan = Plan(self.number, **columns)
        plan.check(self.core.description.geometry)
        step = self.core.apply(plan)
        self.runner.start(step)
        return step

    def finish(self, step: Step) -> Outcome:
        outcome = self.runner.finish(step)
        self.core.result(step, outcome)
        return outcome


def test_steps_follow_one_another_without_a_gap_when_plans_are_there_in_time():
    bench = Bench(StepTime(0.002))
    steps = [bench.start(), bench.start()]
    for _ in range(20):
        outcome = bench.finish(steps.pop(0))
        steps.append(bench.start())
        assert outcome.seconds == 0.002
    assert bench.runner.busy_share == pytest.approx(1.0)
    spans = bench.runner.spans
    assert all(later[0] == pytest.approx(earlier[1]) for earlier, later in zip(spans, list(spans)[1:]))


def test_with_one_plan_at_a_time_the_device_waits_for_each():
    bench = Bench(StepTime(0.002))
    for _ in range(10):
        bench.finish(bench.start())
        bench.clock.now += 0.0009
    assert bench.runner.busy_share == pytest.approx(10 * 2 / (10 * 2 + 9 * 1), rel=1e-3)


def test_idle_time_before_a_step_is_reported():
    bench = Bench(StepTime(0.002))
    bench.finish(bench.start())
    bench.clock.now += 0.0049  # and a tenth of a millisecond overslept
    assert bench.finish(bench.start()).idle == pytest.approx(0.005)


def test_no_result_comes_before_its_steps_virtual_end():
    bench = Bench(StepTime(0.002))
    steps = [bench.start() for _ in range(5)]  # all arrive at 100.0
    for k, step in enumerate(steps, 1):
        bench.finish(step)
        assert bench.clock.now >= 100.0 + k * 0.002
    assert bench.runner.spans[-1] == (pytest.approx(100.008), pytest.approx(100.010))


def test_a_step_takes_longer_for_more_tokens_and_more_cache_read():
    bench = Bench(StepTime(0.001, per_token=0.0001, per_kv_token=0.00001))
    assert bench.finish(bench.start()).seconds == pytest.approx(0.001 + 8 * 0.0001 + 8 * 0.00001)
    assert bench.finish(bench.start()).seconds == pytest.approx(0.001 + 0.0001 + 9 * 0.00001)


def test_a_plan_without_rows_takes_no_time():
    bench = Bench(StepTime(0.002))
    bench.finish(bench.start())
    outcome = bench.finish(bench.start(rows=False))
    assert (outcome.seconds, outcome.idle, len(outcome.tokens)) == (0.0, 0.0, 0)
    assert len(bench.runner.spans) == 1


def test_a_stream_is_the_same_in_another_run():
    def stream() -> bytes:
        bench = Bench(StepTime(0.001))
        return bytes(bench.finish(bench.start()).tokens[0] for _ in range(40))

    assert stream() == stream()
    assert len(set(stream())) > 5
    assert stream().decode().replace(" ", "a").isalpha()


def test_the_real_clock_is_waited_for():
    runner = SimulatedRunner(SETTINGS, StepTime(0.03))
    core = WorkerCore(runner.load())
    columns = rows_of(
        bind_slots=[0],
        bind_generations=[1],
        bind_records=[1],
        assign_slots=[0],
        assign_indices=[0],
        assign_blocks=[0],
        slots=[0],
        generations=[1],
        starts=[0],
        counts=[1],
        outputs=[1],
    )
    began = time.monotonic()
    step = core.apply(Plan(1, admits=[Admit(1, pack([97]), b"", 7, SamplingParams(5))], **columns))
    runner.start(step)
    result = core.result(step, runner.finish(step))
    assert time.monotonic() - began >= 0.03
    assert unpack(result.counts).tolist() == [1]
