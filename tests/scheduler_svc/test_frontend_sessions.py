"""Frontends that come back, hand requests over, or do not come back."""

from __future__ import annotations

import pytest

from protocol.columns import pack
from protocol.messages import Abort, Attach, Choice, Done, Failed, Gone, Journal, Submit, Tokens
from tests.scheduler_svc.fake_frontend import FakeFrontend
from tests.scheduler_svc.formulas import digest, expected
from tests.scheduler_svc.play import PROMPT, Stage


def reopened(stage: Stage, frontend: FakeFrontend) -> None:
    stage.frontends.pop(frontend.session)
    frontend.close(stage.now)
    stage.reopen(frontend)
    stage.deliver()


def test_a_resubmission_is_answered_from_the_journals_length_on() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=12, stop=False)
    for _ in range(4):
        stage.turn()
    stage.frontends.pop(frontend.session)
    frontend.close(stage.now)
    committed = len(stream.known[0])
    for _ in range(3):
        stage.turn()
    assert len(stream.known[0]) == committed
    stage.reopen(frontend)
    frontend.resubmit(stage.now)
    stage.deliver()
    assert len(stream.known[0]) == committed + 3
    stage.run()
    assert stream.complete
    frontend.verify()
    assert worker.written == len(PROMPT) + 11
    assert stage.engine.stats()["requests_finished"] == 1


def test_nothing_is_sent_on_a_new_session_before_the_request_is_named() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    frontend.submit(PROMPT, stage.now, max_tokens=12, stop=False)
    stage.turn()
    reopened(stage, frontend)
    for _ in range(3):
        assert not any(isinstance(message, Tokens) for session, message, _ in stage.engine.out)
        stage.turn()
    frontend.resubmit(stage.now)
    stage.run()
    frontend.verify()


def test_what_resumed_does_not_name_is_aborted() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=50, stop=False)
    stage.turn()
    reopened(stage, frontend)
    stream.aborted = True  # the client left meanwhile
    frontend.resubmit(stage.now)
    stage.run()
    assert stage.engine.stats()["requests_aborted"] == 1
    assert not stage.engine.ledger.requests


def test_ended_marks_stop_their_choices() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, n=2, max_tokens=50, stop=False)
    stage.turn()
    reopened(stage, frontend)
    stream.ended.add(1)  # by a stop string
    frontend.resubmit(stage.now)
    stage.plan()
    assert stage.engine.stats()["requests_running"] == 1


def test_a_dead_frontends_requests_run_on_until_the_grace_ends() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    frontend.submit(PROMPT, stage.now, max_tokens=100, stop=False)
    stage.turn()
    stage.frontends.pop(frontend.session)
    frontend.close(stage.now)
    for _ in range(20):
        stage.turn()
    assert stage.engine.stats()["requests_running"] == 1
    stage.turn(stage.settings.times.grace + 1)
    stage.run()
    assert not stage.engine.ledger.requests
    assert stage.engine.stats()["blocks_used"] == 0


def test_a_dead_frontends_requests_stop_at_its_credit() -> None:
    stage = Stage(max_num_seqs=1)
    worker = stage.worker(slots=1)
    frontend = stage.frontend()
    frontend.submit(PROMPT, stage.now, max_tokens=100, stop=False)
    stage.turn()
    stage.frontends.pop(frontend.session)
    frontend.close(stage.now)
    stage.run()
    assert worker.written <= len(PROMPT) + stage.engine.credit_limit + 2 < 100


def test_attach_hands_over_journal_and_ownership() -> None:
    stage = Stage()
    stage.worker()
    old, new = stage.frontend(incarnation=100), stage.frontend(incarnation=101)
    stream = old.submit(PROMPT, stage.now, max_tokens=12, stop=False, header=b"head")
    for _ in range(4):
        stage.turn()
    new.send(Attach(stream.submit.request, 77), stage.now)
    (journal,) = [message for session, message, _ in stage.engine.out if isinstance(message, Journal)]
    submit = journal.submit
    assert (submit.handle, submit.owner, submit.header, submit.admitted) == (77, 1, b"head", True)

    stage.deliver()
    assert stream.moved
    old.send(Abort(stream.submit.request), stage.now)  # too late: it is not the owner's
    old.send(stream.submit, stage.now)
    stage.run()
    assert new.streams[77].complete
    new.verify()
    assert stage.counters["scheduler_not_owner"] == 2


def test_a_journal_that_no_frame_holds_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.worker()
    old, new = stage.frontend(incarnation=100), stage.frontend(incarnation=101)
    stream = old.submit(PROMPT, stage.now, max_tokens=60, stop=False)
    other = old.submit(PROMPT, stage.now, seed=2)
    for _ in range(20):
        stage.turn()
    monkeypatch.setattr("scheduler_svc.intake.MAX_SUBMIT", 200)
    request = stream.submit.request
    new.send(Attach(request, 77), stage.now)
    (failed,) = [message for session, message, _ in stage.engine.out if session == new.session]
    assert isinstance(failed, Failed)
    assert (failed.request, failed.status, failed.code) == (request, 413, "request_too_large")
    stage.engine.out.clear()
    new.send(Done(request), stage.now)
    stage.run()
    assert other.complete
    assert not stage.engine.ledger.requests


def test_attach_of_an_unknown_request_is_held_and_then_answered_gone() -> None:
    stage = Stage()
    frontend = stage.frontend()
    times = stage.settings.times
    frontend.send(Attach(b"x" * 16, 5), stage.now)
    assert not any(isinstance(message, Gone) for _, message, _ in stage.engine.out)
    stage.engine.tick(stage.now + times.silence + times.resync + times.reconnect + 0.01)
    assert any(isinstance(message, Gone) for _, message, _ in stage.engine.out)
    frontend.send(Attach(b"y" * 16, 5), stage.now + 10)
    assert stage.engine.out[-1][1] == Gone(b"y" * 16)


def test_of_two_frontends_that_ask_for_an_unknown_request_each_gets_an_answer() -> None:
    stage = Stage()
    first, second = stage.frontend(incarnation=101), stage.frontend(incarnation=102)
    times = stage.settings.times
    for frontend in (first, second, second):
        frontend.send(Attach(b"x" * 16, 5), stage.now)
    stage.engine.tick(stage.now + times.silence + times.resync + times.reconnect + 0.01)
    assert [session for session, message, _ in stage.engine.out if message == Gone(b"x" * 16)] == [first.session, second.session]


def test_a_client_that_leaves_while_its_attach_is_held_takes_it_back() -> None:
    stage = Stage()
    stage.worker()
    new, old = stage.frontend(incarnation=101), stage.frontend(incarnation=100)
    request = digest("id", old.incarnation, 1).to_bytes(8, "little") * 2  # of the first that it will name
    new.send(Attach(request, 77), stage.now)
    new.send(Abort(request), stage.now)
    new.send(Done(request), stage.now)
    stream = old.submit(PROMPT, stage.now, max_tokens=12, stop=False)  # the frontend was not lost after all
    assert stream.submit.request == request
    stage.run()
    assert not stream.moved
    assert stream.complete
    assert not stage.engine.ledger.requests


def test_ended_requests_are_kept_until_done_the_grace_or_64_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    monkeypatch.setattr(frontend, "take", lambda message, now: None)  # sends no DONE
    monkeypatch.setattr("scheduler_svc.ledger.KEPT_BYTES", 4000)
    streams = [frontend.submit(PROMPT, stage.now, max_tokens=2) for _ in range(6)]
    stage.run()
    assert [stream.submit.request in stage.engine.ledger.requests for stream in streams] == [False] * 3 + [True] * 3
    frontend.send(Done(streams[-1].submit.request), stage.now)
    assert len(stage.engine.ledger.requests) == 2
    stage.turn(stage.settings.times.grace + 1)
    assert not stage.engine.ledger.requests


def test_a_journal_with_more_tokens_than_we_know_is_believed() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=12, stop=False)
    stage.turn()

    right = expected(PROMPT, stream.submit.choices[0].seed, 12, stop=False)
    old = stream.submit
    stage.frontends.pop(frontend.session)
    frontend.close(stage.now)
    stage.reopen(frontend)
    stream.known[0] = right[:7]
    choices = [Choice(0, old.choices[0].seed, pack(right[:7]))]
    frontend.send(Submit(old.request, old.handle, "m", old.prompt, old.params, choices, admitted=True), stage.now)
    stage.run()
    assert stream.known[0] == right


def test_a_journal_handed_over_names_the_choices_that_a_stop_string_ended() -> None:
    stage = Stage()
    stage.worker()
    old, new = stage.frontend(incarnation=100), stage.frontend(incarnation=101)
    stream = old.submit(PROMPT, stage.now, n=2, max_tokens=20, stop=False)
    for _ in range(4):
        stage.turn()
    old.stop(stream, 0, stage.now)
    new.attach(stream.submit.request, stage.now)
    stage.run()
    (taken_over,) = new.streams.values()
    assert [choice.ended for choice in taken_over.submit.choices] == [True, False]
    assert taken_over.complete
    assert len(taken_over.known[1]) == 20
