"""Who hangs, and who is only slow."""

from __future__ import annotations

from protocol.messages import Phase, Progress
from tests.scheduler_svc.play import PROMPT, Stage


def test_a_step_without_progress_ends_the_session() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now)
    stage.plan()
    end = stage.now + stage.settings.times.progress
    while stage.now < end - 0.1:
        stage.now += 0.05
        stage.engine.tick(stage.now)
    assert not stage.engine.fence
    stage.now = end + 0.01
    stage.engine.tick(stage.now)
    assert [session for session, _ in stage.engine.fence] == [worker.session]


def test_a_counter_that_moves_is_progress_however_long_the_step() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now)
    stage.plan()
    for i in range(200):
        stage.now += 0.04
        stage.engine.worker_message(worker.session, Progress(1, i), stage.now)
        stage.engine.tick(stage.now)
    assert not stage.engine.fence


def test_an_idle_worker_and_an_announced_phase_are_not_hung() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend()
    for _ in range(200):
        stage.turn(0.04)
    stage.engine.worker_message(worker.session, Phase("capture"), stage.now)
    next(iter(stage.frontends.values())).submit(PROMPT, stage.now)
    stage.plan()
    for _ in range(200):
        stage.now += 0.04
        stage.engine.tick(stage.now)
    assert not stage.engine.fence


def test_a_judge_that_comes_late_waits_as_long_again() -> None:
    stage = Stage()
    stage.worker()
    stage.frontend().submit(PROMPT, stage.now)
    stage.plan()
    stage.now += 10  # this process was stopped
    stage.engine.tick(stage.now)
    assert not stage.engine.fence
    assert stage.now < stage.engine.next_time() <= stage.now + 10
