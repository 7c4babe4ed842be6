"""Log probabilities of prompts: every position once, in order, through hits, preemption and every loss."""

from __future__ import annotations

from math import nan

import pytest

from protocol.columns import pack, pack_floats, unpack
from protocol.messages import Abort, Hello, Scored, Scores
from tests.scheduler_svc.fake_frontend import FakeFrontend, Stream
from tests.scheduler_svc.fake_worker import FakeWorker
from tests.scheduler_svc.formulas import expected_scores
from tests.scheduler_svc.play import Stage

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


def test_a_scorer_is_not_swapped_out_beyond_what_has_been_told() -> None:
    stage = Stage(preemption="swap", policy="priority")
    stage.worker(blocks=64, host_blocks=32, slots=2, max_step_tokens=16, block_size=4)
    frontend = stage.frontend()
    outputs = [frontend.submit([7] * 8, stage.now, 30, priority=0, stop=False)]
    stage.turn()
    stage.turn()
    scored = frontend.submit([1 + i % 50 for i in range(100)], stage.now, 0, prompt_logprobs=0, priority=1)
    stage.turn()
    stage.turn()
    outputs.append(frontend.submit([9] * 24, stage.now, 20, priority=0, stop=False))
    stage.run()
    assert stage.counters.get("scheduler_preemptions", 0) == 1
    assert stage.counters.get("scheduler_workers_fenced", 0) == 0
    whole(stage, scored)
    assert all(stream.complete for stream in outputs)


def test_a_part_that_waits_for_a_lost_worker_is_not_failed_because_the_other_runs() -> None:
    stage = Stage()
    stage.now = 100_000.0  # as on a machine that has been up for a day
    lost = stage.worker(incarnation=1)
    frontend = stage.frontend()
    prompt = [1 + i % 50 for i in range(100)]
    frontend.submit(prompt, stage.now, 3, stop=False)
    stage.run()
    stream = frontend.submit(prompt, stage.now, 25, prompt_logprobs=0, stop=False)
    stage.plan()
    slow = stage.worker(incarnation=2, max_step_tokens=8)
    other = stage.worker(incarnation=3, model="x", fingerprint=b"x")
    stage.engine.workers[slow.session].costs.token = 1.0
    stage.workers.pop(lost.session)
    lost.close(stage.now)
    stage.deliver()
    stage.turn()
    stage.engine.workers[slow.session].costs.token = 1.0
    assert stage.counters.get("scheduler_returns_awaited", 0) == 1
    stage.workers.pop(other.session)
    other.close(stage.now)
    stage.deliver()
    assert stream.failed is None
    stage.turn(20.0)
    stage.run()
    assert stream.complete
    assert stream.scores == expected_scores(prompt)


def test_who_was_admitted_is_told_where_only_prompts_are_scored() -> None:
    stage, _, frontend = staged()
    streams = [frontend.submit([1 + (i + j) % 50 for j in range(20)], stage.now, 0, prompt_logprobs=0) for i in range(5)]
    stage.run()
    assert [stream.cached for stream in streams] == [0] * 5
    assert all(not known.admitted for known in stage.engine.frontends.by_session.values())


def test_what_was_admitted_is_not_refused_for_a_full_queue_when_its_scores_were_lost() -> None:
    stage = Stage(max_waiting_requests=3)
    stage.worker(slots=1, blocks=64)
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, 0, prompt_logprobs=0)
    stage.plan()
    frontend.close(stage.now)
    del stage.frontends[frontend.session]
    stage.run()
    crowd = stage.frontend(incarnation=101)
    for i in range(4):
        crowd.submit([3 + i] * 20, stage.now, 100, stop=False)
        stage.turn()
    frontend.session = stage.session()
    stage.frontends[frontend.session] = frontend
    frontend.open(stage.now)
    frontend.send(stream.submit, stage.now)  # it has heard nothing: `admitted` is False
    stage.run()
    assert stream.failed is None
    assert stream.scores == expected_scores(PROMPT)


def test_a_worker_that_forgets_the_scores_of_a_prompt_is_fenced() -> None:
    stage, worker, frontend = staged(max_step_tokens=16)
    stream = frontend.submit(PROMPT, stage.now, 4, prompt_logprobs=0)
    tell = worker.score
    worker.score = lambda *_: []  # type: ignore[method-assign]
    for _ in range(8):
        stage.turn()
    assert stage.counters["scheduler_workers_fenced"] >= 1
    worker.score = tell  # type: ignore[method-assign]
    assert not stream.scores
