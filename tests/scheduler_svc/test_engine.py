"""What the engine does in a request's life, one sentence each."""

from __future__ import annotations

import pytest

from protocol.columns import pack, unpack
from protocol.messages import Abort, Attach, Choice, Done, Failed, FileChunk, FileRequest, Gone, Journal, Plan, Submit, Tokens
from scheduler_svc.waiting import Shares
from tests.scheduler_svc.play import TOKENIZER, FakeFrontend, Stage, Stream, expected

PROMPT = list(range(1, 19))  # 18 tokens: 4 blocks of 4, and 2 tokens


def rows(plan: Plan) -> int:
    return len(plan.slots) // 4


def test_a_request_gets_its_tokens_and_ends() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now)
    stage.run()
    frontend.verify()
    assert stream.complete
    assert stage.engine.stats()["requests_finished"] == 1
    assert stage.engine.stats()["blocks_used"] == 0


def test_two_plans_are_in_flight_and_never_more() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=10, stop=False)
    assert stage.plan()
    assert len(worker.plans) == 2
    assert not stage.plan()
    worker.step(stage.now)
    assert stage.plan()
    assert len(worker.plans) == 2


def test_nothing_is_planned_beyond_the_last_token() -> None:
    stage = Stage()
    worker = stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=3, stop=False)
    stage.run()
    assert worker.written == len(PROMPT) + 2
    assert [rows(plan) for plan in stage.plans] == [1, 1, 1, 0]  # the last one seals and frees


def test_chunks_of_a_long_prefill_run_beside_decodes() -> None:
    stage = Stage()
    stage.worker(max_step_tokens=8)
    frontend = stage.frontend()
    frontend.submit([5], stage.now, max_tokens=20, stop=False)
    stage.plan()
    frontend.submit(list(range(1, 31)), stage.now, max_tokens=2)
    stage.run()
    frontend.verify()
    assert [sorted(unpack(plan.counts).tolist()) for plan in stage.plans[2:6]] == [[1, 7]] * 4


def test_a_prefill_threshold_bounds_a_chunk() -> None:
    stage = Stage(long_prefill_token_threshold=6)
    stage.worker()
    stage.frontend().submit(PROMPT, stage.now, max_tokens=1)
    stage.run()
    assert [unpack(plan.counts).tolist() for plan in stage.plans[:3]] == [[6]] * 3


def test_a_second_identical_prompt_computes_its_last_block_only() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    prompt = PROMPT[:16]
    frontend.submit(prompt, stage.now, max_tokens=1)
    stage.run()
    worker.written = 0
    stream = frontend.submit(prompt, stage.now, max_tokens=1)
    stage.run()
    assert worker.written == 4
    assert stream.cached == 12
    frontend.verify()


def test_a_salt_keeps_tenants_apart() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    frontend.submit(PROMPT, stage.now, max_tokens=1, cache_salt=b"a")
    stage.run()
    stream = frontend.submit(PROMPT, stage.now, max_tokens=1, cache_salt=b"b")
    stage.run()
    assert stream.cached == 0


def test_a_burst_with_one_prefix_computes_it_once_in_one_plan() -> None:
    stage = Stage()
    worker = stage.worker(max_step_tokens=64)
    frontend = stage.frontend()
    for i in range(4):
        frontend.submit([*PROMPT[:16], 40 + i], stage.now, max_tokens=2, stop=False)
    stage.plan()
    assert unpack(stage.plans[0].counts).tolist() == [17, 1, 1, 1]
    stage.run()
    frontend.verify()
    assert worker.written == 17 + 3 + 4


def test_n_choices_share_the_prompt_and_copy_only_the_partial_block() -> None:
    stage = Stage()
    worker = stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, n=4, max_tokens=2, stop=False)
    stage.plan()
    assert stage.engine.stats()["blocks_used"] == 4 + 4
    assert len(unpack(stage.plans[0].fork_slots)) == 3
    assert len(unpack(stage.plans[1].copy_to)) == 3
    stage.run()
    assert worker.written == len(PROMPT) + 4
    assert stream.complete
    frontend.verify()


def test_forks_without_a_slot_wait_and_find_the_prefix() -> None:
    stage = Stage()
    worker = stage.worker(slots=2)
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, n=5, max_tokens=4, stop=False)
    stage.run()
    assert stream.complete
    frontend.verify()
    assert worker.written < len(PROMPT) * 3


def test_blocks_of_an_aborted_request_are_free_for_the_next_plan() -> None:
    stage = Stage()
    stage.worker(blocks=8)
    frontend = stage.frontend()
    first = frontend.submit(PROMPT, stage.now, max_tokens=14, stop=False)
    stage.plan()
    second = frontend.submit([50] * 18, stage.now, max_tokens=14, stop=False)
    stage.turn()
    assert rows(stage.plans[-1]) == 1
    frontend.abort(first, stage.now)
    stage.plan()
    assert len(stage.plans[-1].frees) == 4
    assert len(unpack(stage.plans[-1].assign_blocks)) == 5
    stage.run()
    assert second.complete
    frontend.verify()


def test_an_abort_may_name_a_single_choice() -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    stream = frontend.submit(PROMPT, stage.now, n=2, max_tokens=30, stop=False)
    stage.turn()
    frontend.send(Abort(stream.submit.request, pack([1])), stage.now)
    stage.run()
    frontend.verify()
    assert len(stream.known[0]) == 30
    assert len(stream.known[1]) < 5


def test_preemption_takes_the_newest_and_streams_stay_right() -> None:
    stage = Stage()
    stage.worker(blocks=12)
    frontend = stage.frontend()
    stage.engine.models["m"].outputs.expected = 1  # a wrong guess
    streams = [frontend.submit([10 + i] * 10, stage.now, max_tokens=30, stop=False) for i in range(3)]
    firsts: list[int] = []
    for _ in range(400):
        stage.turn()
        firsts += [i for i, stream in enumerate(streams) if stream.complete and i not in firsts]
    assert firsts == [0, 1, 2]
    assert stage.engine.stats()["preemptions"] > 0
    frontend.verify()


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    stage = Stage()
    stage.worker(blocks=12)
    frontend = stage.frontend()
    stage.engine.models["m"].outputs.expected = 1  # a wrong guess
    for i in range(6):
        frontend.submit([10 + i] * 10, stage.now, max_tokens=30, stop=False)
    preemptions = 0.0
    for _ in range(300):
        count = len(stage.plans)
        stage.turn()
        now = stage.engine.stats()["preemptions"]
        if now > preemptions and len(stage.plans) == count + 1:
            assert not stage.plans[-1].bind_slots
        preemptions = now
    assert preemptions > 0


def test_a_preempted_request_sends_its_record_once() -> None:
    stage = Stage()
    stage.worker(blocks=12)
    frontend = stage.frontend()
    stage.engine.models["m"].outputs.expected = 1  # a wrong guess
    for i in range(3):
        frontend.submit([10 + i] * 10, stage.now, max_tokens=30, stop=False)
    stage.run()
    assert stage.engine.stats()["preemptions"] > 0
    assert sum(len(plan.admits) for plan in stage.plans) == 3


def test_a_frontend_that_stops_reading_exhausts_its_own_credit_only() -> None:
    stage = Stage(max_num_seqs=2)
    stage.worker(slots=4, blocks=40, max_model_len=160)
    silent, reading = stage.frontend(incarnation=100, silent=True), stage.frontend(incarnation=101)
    for i in range(2):
        silent.submit([10 + i] * 10, stage.now, max_tokens=100, stop=False)
    for _ in range(100):
        stage.turn()
    assert silent.unacked <= stage.engine.credit_limit == 32
    sent = silent.unacked
    stream = reading.submit([20] * 40, stage.now, max_tokens=60, stop=False)
    for _ in range(100):
        stage.turn()
    assert stream.complete, "held blocks and slots must be given up for a frontend with credit"
    assert silent.unacked == sent
    silent.silent, silent.unacked = False, 0
    stage.run()
    silent.verify()
    reading.verify()
    assert all(stream.complete for stream in silent.streams.values())


def test_a_priority_request_waits_no_longer_than_the_pipeline() -> None:
    stage = Stage(policy="priority")
    stage.worker(slots=2)
    frontend = stage.frontend()
    for _ in range(4):
        frontend.submit(PROMPT, stage.now, max_tokens=60, stop=False, priority=5)
    for _ in range(5):
        stage.turn()
    urgent = frontend.submit([7] * 9, stage.now, max_tokens=2, stop=False, priority=0)
    for _ in range(6):
        stage.turn()
    assert urgent.complete
    stage.run()
    frontend.verify()


def test_a_plan_smaller_than_the_decodes_gives_everyone_a_turn() -> None:
    stage = Stage()
    stage.worker(max_step_tokens=2)
    frontend = stage.frontend()
    stream = frontend.submit([1], stage.now, n=5, max_tokens=12, stop=False)
    for _ in range(9):
        stage.turn()
    lengths = [len(known) for known in stream.known]
    assert max(lengths) - min(lengths) <= 1
    stage.run()
    frontend.verify()


# ---------------------------------------------------------------- refusals


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


# ---------------------------------------------------------------- sessions of frontends


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


def test_unknown_ids_are_counted_and_do_nothing() -> None:
    stage = Stage()
    frontend = stage.frontend()
    frontend.send(Abort(b"x" * 16), stage.now)
    frontend.send(Done(b"x" * 16), stage.now)
    assert stage.counters["scheduler_unknown_request"] == 2


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


# ---------------------------------------------------------------- files


def test_tokenizer_files_are_asked_for_once_and_given_to_everyone() -> None:
    stage = Stage()
    worker = stage.worker()
    first, second = stage.frontend(incarnation=100), stage.frontend(incarnation=101)
    stage.engine.out.clear()
    for frontend in (first, second):
        frontend.send(FileRequest(TOKENIZER, 0), stage.now)
    assert list(stage.engine.out) == [(worker.session, FileRequest(TOKENIZER, 0), 0)]
    stage.engine.out.clear()
    stage.engine.worker_message(worker.session, FileChunk(TOKENIZER, 0, 3, b"abc"), stage.now)
    assert [session for session, _, _ in stage.engine.out] == [first.session, second.session]


def test_a_file_that_nobody_has_is_answered_so() -> None:
    stage = Stage()
    frontend = stage.frontend()
    frontend.send(FileRequest(b"u" * 16, 0), stage.now)
    assert stage.engine.out[-1][1] == FileChunk(b"u" * 16, 0, -1, b"")


def test_a_fault_of_ours_ends_the_request_that_met_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    other = frontend.submit(PROMPT, stage.now)

    def broken(choice: object, now: float) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(stage.engine.arrivals, "enqueue", broken)
        failed = failure(stage, frontend.submit(PROMPT, stage.now))
    assert failed.status == 500
    stage.run()
    assert other.complete


def test_tenants_that_wait_share_the_tokens_whatever_their_number_of_requests() -> None:
    stage = Stage()
    stage.worker(slots=4)
    frontend = stage.frontend()
    streams: dict[str, list[Stream]] = {"few": [], "many": []}
    for i in range(110):
        tenant = "few" if i >= 100 else "many"
        streams[tenant].append(frontend.submit([i % 60] * 9, stage.now, max_tokens=6, stop=False, tenant=tenant))
    while not all(stream.complete for stream in streams["few"]):
        stage.turn()
    many = sum(stream.complete for stream in streams["many"])
    assert 6 <= many <= 15


def test_a_tenant_that_pauses_saves_nothing_up() -> None:
    shares = Shares()
    for tenant in "ab":
        shares.arrive(tenant)
    shares.charge("a", 500)
    shares.charge("b", 600)
    shares.leave("b")
    shares.charge("a", 5000)
    shares.arrive("b")
    assert shares.given("b") == 5500


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
