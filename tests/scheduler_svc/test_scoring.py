"""Log probabilities of prompts: every position once, in order, through hits, preemption and every loss."""

from __future__ import annotations

from math import nan

import pytest

from protocol.columns import pack, pack_floats, unpack
from protocol.messages import Abort, Hello, Scored, Scores
from tests.scheduler_svc.play import FakeFrontend, FakeWorker, Stage, Stream, expected_scores

PROMPT = [1 + i % 50 for i in range(40)]


def staged(**sizes: int) -> tuple[Stage, FakeWorker, FakeFrontend]:
    stage = Stage()
    return stage, stage.worker(**sizes), stage.frontend()


def whole(stage: Stage, *streams: Stream) -> None:
    """Every stream is complete, its scores are the prompt's, and nothing is left."""
    for stream in streams:
        assert stream.complete
        assert stream.failed is None
        assert stream.scores == expected_scores(unpack(stream.submit.prompt).tolist())
    stage.run()
    stats = stage.engine.stats()
    assert (stats["blocks_used"], stats["requests_running"], stats["requests_waiting"]) == (0, 0, 0)
    assert stats["requests_finished"] >= len(streams)  # more, if a frontend asked for one again


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_every_position_is_told_once_beside_the_outputs(n: int, max_tokens: int) -> None:
    stage, _, frontend = staged(max_step_tokens=16)
    stream = frontend.submit(PROMPT, stage.now, max_tokens, n, prompt_logprobs=2)
    stage.run()
    frontend.verify()
    whole(stage, stream)


def test_the_outputs_share_the_blocks_that_were_scored() -> None:
    stage, worker, frontend = staged()
    frontend.submit(PROMPT, stage.now, 1, prompt_logprobs=0)
    stage.run()
    assert worker.written == len(PROMPT) - 1 + 4, "one block at most is computed twice"


def test_a_cached_prefix_hides_no_position() -> None:
    stage, worker, frontend = staged()
    first = frontend.submit(PROMPT, stage.now, 3)
    stage.run()
    before = worker.written
    stream = frontend.submit(PROMPT, stage.now, 0, prompt_logprobs=0)
    stage.run()
    assert worker.written - before == len(PROMPT) - 1
    assert stream.cached <= 0
    assert first.complete
    assert stream.scores == expected_scores(PROMPT)


def test_a_prompt_of_one_token_and_a_request_for_nothing_end_at_once() -> None:
    stage, worker, frontend = staged()
    streams = frontend.submit([5], stage.now, 0, prompt_logprobs=1), frontend.submit(PROMPT, stage.now, 0)
    stage.run()
    assert all(stream.complete for stream in streams)
    assert worker.written == 0
    assert stage.engine.stats()["requests_finished"] == 2


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_lost_worker_costs_no_position_and_repeats_none(steps: int) -> None:
    stage, worker, frontend = staged(max_step_tokens=8)
    stream = frontend.submit(PROMPT, stage.now, 5, prompt_logprobs=1)
    stage.plan()
    for _ in range(steps):
        stage.turn()
    worker.close(stage.now)
    stage.reopen(worker)
    worker.ready(stage.now)
    stage.run()
    frontend.verify()
    whole(stage, stream)


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("steps", [1, 3, 5, 30])
def test_a_frontend_that_lost_what_was_sent_is_told_again_from_there(steps: int, max_tokens: int) -> None:
    stage, _, frontend = staged(max_step_tokens=8)
    stream = frontend.submit(PROMPT, stage.now, max_tokens, prompt_logprobs=0)
    for _ in range(2):
        stage.turn()
    had = list(stream.scores)
    frontend.close(stage.now)
    del stage.frontends[frontend.session]
    for _ in range(steps):
        stage.turn()
    stage.reopen(frontend)
    assert stream.scores == had
    frontend.resubmit(stage.now)
    stage.run()
    frontend.verify()
    whole(stage, stream)


@pytest.mark.parametrize(("told", "owed"), [((), True), ((3,), False)])
def test_another_frontend_is_told_the_whole_prompt_unless_the_client_has_it(told: tuple[int, ...], owed: bool) -> None:
    stage, _, frontend = staged()
    stream = frontend.submit(PROMPT, stage.now, 30, stop=False, prompt_logprobs=0)
    for _ in range(6):
        stage.turn()
    other = stage.frontend(incarnation=200)
    other.attach(stream.submit.request, stage.now, told)
    stage.run()
    other.verify()
    (adopted,) = other.streams.values()
    assert adopted.complete
    assert adopted.scores == (expected_scores(PROMPT) if owed else [])
    assert stage.engine.stats()["blocks_used"] == 0


def test_a_scorer_that_is_preempted_goes_on_where_it_was() -> None:
    stage, _, frontend = staged(blocks=20, slots=8, max_step_tokens=8)
    frontend.submit(PROMPT[:4], stage.now, 8, stop=False)
    stage.run()  # teaches it to expect short outputs
    for i in range(4):
        frontend.submit([40 + i], stage.now, 24, stop=False)
    for _ in range(4):
        stage.turn()
    stream = frontend.submit(PROMPT, stage.now, 0, prompt_logprobs=0)
    preempted_at = []
    while stage.turn():
        if stage.engine.stats()["preemptions"] > len(preempted_at):
            preempted_at.append(stream.scored)
    frontend.verify()
    assert any(1 < position < len(PROMPT) for position in preempted_at), preempted_at
    assert stream.scores == expected_scores(PROMPT)


def test_a_prompt_that_fills_the_pool_but_for_its_last_token_is_scored() -> None:
    stage, _, frontend = staged(blocks=10, max_model_len=128)
    stream = frontend.submit([7, *PROMPT], stage.now, 0, prompt_logprobs=0)  # 41 tokens: the last needs no K and V
    stage.run()
    assert stream.scores == expected_scores([7, *PROMPT])


def test_a_frontend_out_of_credit_is_sent_no_more_positions() -> None:
    stage, _, frontend = staged(max_step_tokens=8)
    frontend.silent = True
    stage.engine.frontends.limit = 20
    stream = frontend.submit(PROMPT, stage.now, 0, prompt_logprobs=0)
    for _ in range(20):
        stage.turn()
    assert 20 <= len(stream.scores) < 39
    frontend.silent, frontend.unacked = False, 0
    stage.run()
    whole(stage, stream)


def test_an_aborted_request_is_scored_no_further() -> None:
    stage, worker, frontend = staged(max_step_tokens=8)
    stream = frontend.submit(PROMPT, stage.now, 0, prompt_logprobs=0)
    stage.turn()
    frontend.abort(stream, stage.now)
    stage.run()
    assert worker.written < len(PROMPT) - 1
    assert stage.engine.stats()["requests_aborted"] == 1


def test_an_output_that_is_stopped_leaves_the_scoring_alone() -> None:
    stage, _, frontend = staged(max_step_tokens=8)
    stream = frontend.submit(PROMPT, stage.now, 5, prompt_logprobs=0)
    stage.turn()
    frontend.send(Abort(stream.submit.request, pack([0])), stage.now)
    stream.ended.add(0)
    stream.stopped.add(0)
    stage.run()
    assert stream.scores == expected_scores(PROMPT)


def test_nan_ends_the_request() -> None:
    stage, worker, frontend = staged()
    worker.nan_tokens = {60}
    stream = frontend.submit([60, *PROMPT], stage.now, 0, prompt_logprobs=0)
    stage.run()
    assert stream.failed is not None
    assert stream.failed.code == "nan"
    assert stage.engine.stats()["blocks_used"] == 0


def test_only_a_worker_that_knows_how_is_asked() -> None:
    stage = Stage()
    frontend = stage.frontend()
    old = FakeWorker(stage.engine, stage.worker().geometry, stage.session(), incarnation=2)
    (knows,) = stage.workers.values()
    stage.workers[old.session] = old
    old.records, old.slots = {}, {}
    stage.engine.worker_opened(old.session, Hello("worker", "old", 2, 1, protocol=2), stage.now)
    old.ready(stage.now)
    streams = [frontend.submit([i, *PROMPT], stage.now, 0, prompt_logprobs=0) for i in range(6)]
    stage.run()
    assert [stream.scores for stream in streams] == [expected_scores([i, *PROMPT]) for i in range(6)]
    assert (knows.written, old.written) == (6 * len(PROMPT), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        Scored(9, 0, Scores(1, pack([1]), pack_floats([0.0]), pack([1]))),
        Scored(1, 7, Scores(1, pack([1]), pack_floats([0.0]), pack([1]))),
        Scored(1, 0, Scores(1, pack([1, 1]), pack_floats([0.0, 0.0]), pack([1]))),
        Scored(1, 0, Scores(2, pack([1]), pack_floats([nan]), pack([1]))),
        Scored(1, 0, Scores(1, pack([1] * 60), pack_floats([0.0] * 60), pack([1] * 60))),
    ],
)
def test_a_worker_that_reports_what_was_not_asked_is_fenced(wrong: Scored) -> None:
    stage, worker, frontend = staged()
    frontend.submit(PROMPT, stage.now, 0, prompt_logprobs=0)
    stage.plan()
    stage.engine.worker_message(worker.session, wrong, stage.now)
    assert [session for session, _ in stage.engine.fence] == [worker.session]
