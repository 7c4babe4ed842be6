"""A fault of ours, or of a frontend, stays with the request that it came with."""

from __future__ import annotations

import pytest

from protocol.messages import Abort, Attach, Done
from tests.scheduler_svc.play import PROMPT, Stage


def test_a_fault_of_ours_ends_the_request_that_met_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    other = frontend.submit(PROMPT, stage.now)

    def broken(choice: object, now: float) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(stage.engine.arrivals, "enqueue", broken)
        victim = frontend.submit(PROMPT, stage.now)
        stage.plan()
    assert victim.failed is not None
    assert victim.failed.status == 500
    stage.run()
    assert other.complete


@pytest.mark.parametrize("handler", ["submit", "abort", "attach"])
def test_a_fault_of_ours_ends_the_request_it_came_with_and_no_other(handler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    neighbour = frontend.submit(PROMPT, stage.now)
    victim = frontend.submit(PROMPT[:5], stage.now) if handler != "submit" else None

    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(stage.engine.intake, handler, broken)
    if victim is None:
        victim = frontend.submit(PROMPT[:5], stage.now)
    else:
        frontend.send({"abort": Abort, "attach": lambda id: Attach(id, 9)}[handler](victim.submit.request), stage.now)
    monkeypatch.undo()
    stage.run()
    assert victim.failed is not None
    assert (victim.failed.status, victim.failed.code) == (500, "internal_error")
    assert neighbour.complete
    assert stage.counters["scheduler_faults"] == 1


def test_unknown_ids_are_counted_and_do_nothing() -> None:
    stage = Stage()
    frontend = stage.frontend()
    frontend.send(Abort(b"x" * 16), stage.now)
    frontend.send(Done(b"x" * 16), stage.now)
    assert stage.counters["scheduler_unknown_request"] == 2
