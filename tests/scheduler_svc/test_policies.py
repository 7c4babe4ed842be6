"""What the policies promise, measured in virtual time with steps that take as long as a real model's."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.virtual import Machine, Served, Simulation, StepTime

PLAIN = StepTime(base=0.02, token=0.0, kv=0.0, copy=0.0)  # 20 ms whatever is in a step


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, length, dtype=np.int32)


def test_with_ten_times_the_arrivals_a_tenant_gets_no_more_than_its_half() -> None:
    simulation = Simulation([Machine(slots=8, time=PLAIN)], max_num_seqs=8)
    for i in range(660):
        tenant = "few" if i % 11 == 0 else "many"
        simulation.submit(Served(i / 250, prompt(32, i), 40, tenant))
    simulation.run(until=8.0)
    waiting = {request.tenant for request in simulation.requests if request.tokens == 0}
    assert waiting == {"few", "many"}, "both must wait all the time"
    tokens = {tenant: sum(r.tokens for r in simulation.requests if r.tenant == tenant) for tenant in waiting}
    assert max(tokens.values()) <= 0.6 * sum(tokens.values())


def test_a_priority_request_waits_no_longer_than_two_steps() -> None:
    simulation = Simulation([Machine(slots=8, time=PLAIN)], policy="priority", max_num_seqs=8)
    for i in range(40):
        simulation.submit(Served(0.0, prompt(32, i), 200), priority=1)
    urgent = [Served(1.0 + 0.77 * i, prompt(32, 100 + i), 10) for i in range(5)]
    for request in urgent:
        simulation.submit(request, priority=0)
    planned: dict[int, float] = {}
    while len(planned) < len(urgent):
        simulation.run(until=simulation.now + 0.001)
        simulation.now += 0.001
        for request in simulation.engine.ledger.requests.values():
            if request.priority == 0 and request.choices[0].slot >= 0:
                planned.setdefault(request.number, simulation.now)
    for request, at in zip(urgent, sorted(planned.values()), strict=True):
        assert at - request.arrival <= 2 * 0.02 + 0.002


@pytest.mark.parametrize("threshold", [512, 2048])
def test_a_32k_prefill_delays_no_decode_by_more_than_a_chunk(threshold: int) -> None:
    machine = Machine(max_model_len=40_000)
    simulation = Simulation([machine], long_prefill_token_threshold=threshold)
    gaps: list[float] = []
    decoding = [Served(0.0, prompt(64, i), 400) for i in range(32)]
    for request in decoding:
        simulation.submit(request)
    long = Served(0.5, prompt(32_768), 4)
    simulation.submit(long)
    last: dict[int, float] = {}
    counts = [0] * len(decoding)
    while any(request.tokens < request.max_tokens for request in decoding):
        simulation.run(until=simulation.now + 0.0005)
        simulation.now += 0.0005
        for i, request in enumerate(decoding):
            if request.tokens > counts[i]:
                assert request.tokens == counts[i] + 1
                if last.get(i, 0.0) > long.arrival:
                    gaps.append(request.last - last[i])
                counts[i], last[i] = request.tokens, request.last
    chunk = machine.time.base + machine.time.token * (threshold + 32) + machine.time.kv * (32_768 + 32 * 500)
    assert long.tokens == 4
    assert long.last < min(request.last for request in decoding)
    assert max(gaps) <= chunk + 0.001


def test_partial_prefills_are_bounded_in_number() -> None:
    simulation = Simulation([Machine()], max_num_partial_prefills=1, long_prefill_token_threshold=256)
    requests = [Served(0.0, prompt(1024, i), 2) for i in range(4)]
    for request in requests:
        simulation.submit(request)
    worker = simulation.engine.workers[100]
    most = 0
    while any(request.tokens < 2 for request in requests):
        simulation.run(until=simulation.now + 0.001)
        simulation.now += 0.001
        most = max(most, len(worker.prefilling))
    assert most == 1


@pytest.mark.parametrize(("step", "round_trip", "goal"), [(0.002, 0.0002, 0.98), (0.008, 0.020, 0.95)])
def test_the_depth_adapts_to_the_link(step: float, round_trip: float, goal: float) -> None:
    machine = Machine(slots=64, time=StepTime(step, 0.0, 0.0, 0.0), link=round_trip / 2)
    simulation = Simulation([machine], max_num_seqs=64)
    for i in range(64):
        simulation.submit(Served(0.0, prompt(32, i), 2500))
    simulation.run(until=1.0)
    worker = simulation.engine.workers[100]
    busy, idle = worker.busy_seconds, worker.idle_seconds
    simulation.run(until=5.0)
    busy, idle = worker.busy_seconds - busy, worker.idle_seconds - idle
    assert busy / (busy + idle) >= goal
    assert worker.depth.wanted >= 1 + round_trip / step
    assert worker.depth.wanted <= 3 + round_trip / step
    assert simulation.engine.credit_limit == 8 * worker.depth.wanted * 64


def test_a_depth_that_is_given_stays() -> None:
    simulation = Simulation([Machine(slots=8, time=PLAIN, link=0.05)], depth=2, max_num_seqs=8)
    simulation.submit(Served(0.0, prompt(32), 100))
    simulation.run()
    assert simulation.engine.workers[100].depth.wanted == 2


def test_two_models_behind_one_scheduler_answer_under_their_own_names() -> None:
    simulation = Simulation([Machine(model="small"), Machine(model="large", time=PLAIN)])
    for name in ("small", "large"):
        simulation.submit(Served(0.0, prompt(32), 10), model=name)
    simulation.submit(Served(0.0, prompt(32), 10), model="none")
    simulation.run()
    small, large, none = simulation.requests
    assert small.tokens == large.tokens == 10
    assert large.tpot > 2 * small.tpot
    assert none.failed is not None
    assert none.failed.status == 404


def test_a_stopped_frontend_that_holds_all_blocks_delays_anothers_requests_less_than_two_seconds() -> None:
    machine = Machine(blocks=200, slots=16, time=PLAIN)
    simulation = Simulation([machine], frontends=2, max_num_seqs=16)
    simulation.engine.models["m"].outputs.expected = 1  # admits more than will fit
    for i in range(40):
        simulation.submit(Served(0.0, prompt(64, i), 600), frontend=1)
    for step in range(2000):
        simulation.run(until=step * 0.02)
        if simulation.engine.stats()["blocks_used"] > 190:
            break
    else:
        raise AssertionError("the blocks were never all held")
    simulation.stopped.add(1)
    began = simulation.now + 1.0
    other = [Served(began + i, prompt(64, 50 + i), 20) for i in range(8)]
    for request in other:
        simulation.submit(request, frontend=2)
    simulation.run(until=began + 20.0)
    alone = 0.02 * 20
    assert all(request.tokens == 20 for request in other)
    assert max(request.last - request.arrival for request in other) < alone + 2.0
    simulation.resume(1)
    simulation.run()
    assert all(request.tokens == request.max_tokens for request in simulation.requests)


def test_ten_times_the_capacity_is_refused_at_once_and_admitted_streams_keep_their_pace() -> None:
    """8 slots, steps of 20 ms and outputs of 16 tokens: 25 requests/s; 250 arrive."""
    calm = Simulation([Machine(slots=8, time=PLAIN)], max_num_seqs=8, max_waiting_requests=16)
    for i in range(8):
        calm.submit(Served(0.0, prompt(32, i), 16))
    calm.run()
    crowd = Simulation([Machine(slots=8, time=PLAIN)], max_num_seqs=8, max_waiting_requests=16)
    for i in range(5000):
        crowd.submit(Served(i / 250, prompt(32, i), 16))
    most = 0
    for second in range(1, 21):
        crowd.run(until=float(second))
        most = max(most, len(crowd.engine.ledger.requests))
    crowd.run()
    admitted = [request for request in crowd.requests if request.failed is None]
    refused = [request for request in crowd.requests if request.failed is not None]
    assert all(request.failed is not None and request.failed.status == 429 and request.failed.retry_after > 0 for request in refused)
    assert len(admitted) >= 25 * 19
    waited = max(request.ttft for request in admitted)
    told = refused[-1].failed.retry_after
    assert 1.0 <= told <= 2 * waited + 1.0, "as long as those who wait have to"
    assert all(request.tokens == 16 for request in admitted)
    assert np.percentile([r.tpot for r in admitted], 99) <= 1.1 * np.percentile([r.tpot for r in calm.requests], 99)
    assert most <= 8 + 16 + 8, "what has been refused is not kept"


def test_conversations_stay_where_their_prefix_is_and_loads_stay_together() -> None:
    simulation = Simulation([Machine(slots=32)] * 2)
    common = prompt(2048)
    requests = [Served(i * 0.01, np.concatenate((common, prompt(64, i + 1))), 200) for i in range(60)]
    for request in requests:
        simulation.submit(request)
    simulation.run(until=0.3)
    first = [worker.running for worker in simulation.engine.workers.values()]
    assert max(first) > 0
    simulation.run()
    assert all(request.tokens == 200 for request in requests)
    hits, queries = (simulation.counters[f"scheduler_prefix_{kind}"] for kind in ("hits", "queries"))
    assert hits / queries > 0.9
