"""The plan that an idle device waits for is handed over before those that follow it in the pipeline are made."""

from __future__ import annotations

from protocol.messages import Plan
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
