"""The accounts are verified when everything rests and when a worker is drained; what is found wrong is counted."""

from __future__ import annotations

import pytest

from protocol.messages import Phase
from scheduler_svc.inspection import REST
from tests.scheduler_svc.play import PROMPT, Stage


def counts(stage: Stage) -> tuple[int, int]:
    return stage.counters["scheduler_integrity_checks"], stage.counters["scheduler_integrity_failures"]


def busy_and_at_rest(**settings: object) -> Stage:
    """A request has run, and nothing more has happened for a while."""
    stage = Stage(**settings)
    stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=3)
    stage.run()
    rest(stage)
    return stage


def rest(stage: Stage) -> None:
    for _ in range(3):
        stage.turn(0.6 * REST)


def test_accounts_are_verified_once_after_each_busy_time() -> None:
    stage = busy_and_at_rest()
    assert counts(stage) == (1, 0)
    rest(stage)
    assert counts(stage) == (1, 0), "nothing has happened since"
    next(iter(stage.frontends.values())).submit(PROMPT, stage.now, max_tokens=3)
    stage.run()
    rest(stage)
    assert counts(stage) == (2, 0)


def test_no_check_is_made_while_something_runs_or_when_the_flag_is_off() -> None:
    stage = Stage()
    stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=30, stop=False)
    for _ in range(10):
        stage.turn(0.3 * REST)
    assert counts(stage) == (0, 0)
    assert counts(busy_and_at_rest(check_when_idle=False)) == (0, 0)


def test_accounts_that_do_not_agree_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=3)
    stage.run()
    stage.engine.workers[worker.session].blocks.cached += 1
    for _ in range(3):
        stage.now += REST
        stage.engine.tick(stage.now)
    assert counts(stage) == (1, 1)
    assert "accounts do not agree" in caplog.text


def test_a_worker_is_verified_once_it_is_drained() -> None:
    stage = Stage()
    leaving = stage.worker(incarnation=1)
    stage.worker(incarnation=2)
    frontend = stage.frontend()
    streams = [frontend.submit([i, *PROMPT], stage.now, max_tokens=20, stop=False) for i in range(4)]
    for _ in range(3):
        stage.turn()
    stage.engine.worker_message(leaving.session, Phase("draining"), stage.now)
    while not stage.engine.workers[leaving.session].drained:
        stage.turn()
    assert not all(stream.complete for stream in streams)
    assert counts(stage) == (1, 0)
    stage.run()
    frontend.verify()
