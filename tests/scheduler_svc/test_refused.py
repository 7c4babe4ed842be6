"""Requests that are refused, or end without an answer."""

from __future__ import annotations

from protocol.messages import Failed
from tests.scheduler_svc.play import PROMPT, Stage


def failure(stage: Stage, stream: object) -> Failed:
    stage.plan()
    failed = stream.failed  # type: ignore[attr-defined]
    assert failed is not None
    return failed


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    stage = Stage()
    stage.worker(blocks=8, max_model_len=128)
    failed = failure(stage, stage.frontend().submit(PROMPT, stage.now, max_tokens=20))
    assert (failed.status, failed.code, failed.param) == (400, "context_length_exceeded", "prompt")


def test_a_request_that_just_fits_runs_alone_to_its_end() -> None:
    stage = Stage()
    stage.worker(blocks=8)
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=15, stop=False)
    stage.run()
    assert stream.complete
    frontend.verify()


def test_it_is_not_refused_while_a_larger_worker_may_be_loading() -> None:
    stage = Stage()
    stage.worker(blocks=8)
    large = stage.worker(ready=False, incarnation=2, blocks=64)
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=40, stop=False)
    stage.plan()
    assert stream.failed is None
    large.ready(stage.now)
    stage.run()
    assert stream.complete
    frontend.verify()


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    stage = Stage()
    stage.worker()
    failed = failure(stage, stage.frontend().submit([1, 64], stage.now))
    assert (failed.status, failed.param) == (400, "prompt")


def test_a_prompt_that_came_before_the_model_is_checked_when_the_model_is_known() -> None:
    stage = Stage()
    frontend = stage.frontend()
    bad, good = frontend.submit([1, 64], stage.now, n=2), frontend.submit(PROMPT, stage.now)
    stage.plan()
    stage.worker()
    assert failure(stage, bad).param == "prompt"
    stage.run()
    assert good.complete


def test_an_unknown_model_is_refused_and_known_ones_answer_by_name() -> None:
    stage = Stage()
    stage.worker()
    other = stage.worker(model="other", incarnation=2, fingerprint=b"g")
    frontend = stage.frontend()
    assert failure(stage, frontend.submit(PROMPT, stage.now, model="nobody")).status == 404
    stream = frontend.submit(PROMPT, stage.now, model="other")
    stage.run()
    assert stream.complete
    assert other.written
    assert frontend.models is not None
    assert [model.name for model in frontend.models.models] == ["m", "other"]


def test_one_name_with_two_fingerprints_is_refused_to_the_second_worker() -> None:
    stage = Stage()
    stage.worker()
    second = stage.worker(incarnation=2, fingerprint=b"g")
    stage.deliver()
    assert second.session not in stage.workers


def test_requests_wait_for_a_worker_up_to_the_hold_time() -> None:
    stage = Stage()
    frontend = stage.frontend()
    early = frontend.submit(PROMPT, stage.now)
    stage.turn(stage.settings.times.hold - 1)
    late = frontend.submit(PROMPT, stage.now)
    stage.turn(2)
    assert early.failed is not None
    assert early.failed.status == 503
    assert late.failed is None
    stage.worker()
    stage.run()
    assert late.complete


def test_a_full_queue_is_refused_but_not_what_was_admitted_before() -> None:
    stage = Stage(max_waiting_requests=2)
    stage.worker(slots=1)
    frontend = stage.frontend()
    for _ in range(3):
        frontend.submit(PROMPT, stage.now, max_tokens=50)
        stage.plan()
    failed = failure(stage, frontend.submit(PROMPT, stage.now))
    assert (failed.status, failed.code) == (429, "queue_full")
    assert failed.retry_after > 0
    stream = frontend.submit(PROMPT, stage.now, admitted=True)
    stage.plan()
    assert stream.failed is None


def test_a_deadline_ends_the_wait_for_admission_and_nothing_else() -> None:
    stage = Stage()
    stage.worker(slots=1)
    frontend = stage.frontend()
    running = frontend.submit(PROMPT, stage.now, max_tokens=50, stop=False, deadline=0.5)
    stage.turn()
    waiting = frontend.submit(PROMPT, stage.now, deadline=0.5)
    stage.turn(1.0)
    assert running.failed is None
    assert waiting.failed is not None
    assert (waiting.failed.code, waiting.failed.param) == ("queue_timeout", "queue_timeout")


def test_a_request_for_no_tokens_ends_at_once() -> None:
    stage = Stage()
    stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=0)
    stage.plan()
    assert stage.engine.stats()["requests_finished"] == 1
    assert not stage.plans
