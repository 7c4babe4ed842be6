"""What is over is freed: at once, and without the garbage collector, whose rounds would hold plans up."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from protocol.messages import Submit
from scheduler_svc.requests import Choice, Request
from tests.scheduler_svc.fake_frontend import FakeFrontend
from tests.scheduler_svc.play import PROMPT, Stage


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left() -> int:
    """Requests and choices that exist in this process."""
    return sum(isinstance(thing, Request | Choice) for thing in gc.get_objects())


def drop_journal(frontend: FakeFrontend) -> None:
    frontend.streams.clear()


def test_a_forgotten_request_is_freed_though_its_timers_are_still_to_come() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    before = left()
    frontend.submit(PROMPT, stage.now, n=3, deadline=100.0)
    frontend.submit([5] * 30, stage.now, max_tokens=1)
    aborted = frontend.submit(PROMPT, stage.now)
    assert left() == before + 3 + 5
    frontend.abort(aborted, stage.now)
    stage.run()
    drop_journal(frontend)
    assert left() == before
    assert stage.engine.timers.next_time() < stage.now + 200, "timers are left"


def test_a_preempted_request_leaves_nothing_behind() -> None:
    stage = Stage(preemption="swap")
    stage.worker(blocks=10, host_blocks=16)
    stage.engine.models["m"].outputs.expected = 1
    frontend = stage.frontend()
    before = left()
    for i in (1, 2):
        frontend.submit([i, *range(2, 9)], stage.now, max_tokens=20, stop=False)
    stage.run()
    assert stage.engine.stats()["swaps_in"] > 0
    drop_journal(frontend)
    assert left() == before


def test_a_refused_request_leaves_nothing_behind() -> None:
    stage = Stage(max_waiting_requests=0)
    stage.worker()
    frontend = stage.frontend()
    before = sum(isinstance(thing, Submit) for thing in gc.get_objects())
    for _ in range(5):
        frontend.submit(PROMPT, stage.now)
    stage.deliver()
    assert all(stream.failed is not None for stream in frontend.streams.values())
    drop_journal(frontend)
    assert sum(isinstance(thing, Submit) for thing in gc.get_objects()) == before
    assert not stage.engine.ledger.requests
