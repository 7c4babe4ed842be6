"""The journal across sessions: what a new one is told, and what an old one leaves."""

from __future__ import annotations

from frontend.journal import Journal
from protocol.columns import pack, unpack
from protocol.counters import Counters
from protocol.messages import Choice, Credit, Done, Failed, Models, Resumed, Submit
from tests.frontend.fakes import model_info
from tests.frontend.journals import TIMES, WELCOME, give, opened, request, sent, tokens


class TestLinks:
    def test_a_gap_is_a_fault_of_the_link(self):
        journal, entry = opened()
        give(journal, entry, "x", first=1)
        assert journal.fault is not None
        assert journal.counters["journal_gap"] == 1
        give(journal, entry, "a", first=0)
        assert entry.choices[0].tokens == [], "nothing of a faulty session is used"

    def test_known_tokens_are_ignored_and_new_ones_behind_them_appended(self):
        journal, entry = opened()
        give(journal, entry, "abc")
        give(journal, entry, "bc", first=1)
        give(journal, entry, "cdef", first=2)
        assert entry.choices[0].take() == "abcdef"
        assert journal.counters["journal_duplicate"] == 1
        assert journal.fault is None

    def test_unknown_handles_and_choices_are_counted(self):
        journal, entry = opened()
        journal.message(tokens((99, 0, 0, [1]), (entry.handle, 5, 0, [1]), (entry.handle, 0, 0, [97])), 1.0)
        assert journal.counters["journal_unknown"] == 2
        assert entry.choices[0].take() == "a"

    def test_admission_is_noted_once_with_its_cached_tokens(self):
        journal, entry = opened()
        journal.message(tokens(admitted=[(entry.handle, 2)]), 1.0)
        journal.message(tokens(admitted=[(entry.handle, 0)]), 1.0)
        assert entry.admitted
        assert entry.cached == 2

    def test_models_and_credit_are_kept(self):
        journal, _ = opened()
        journal.message(Models([model_info()]), 1.0)
        journal.message(Credit(5), 1.0)
        assert list(journal.models) == ["oracle"]
        assert journal.models_changed
        assert journal.credit == 5

    def test_what_a_frontend_should_not_get_is_counted(self):
        journal, _ = opened()
        journal.message(Resumed(0), 1.0)
        assert journal.counters["journal_unexpected"] == 1


class TestRecovery:
    def test_a_request_made_without_a_session_waits_for_one(self):
        journal = Journal(1, TIMES, Counters())
        entry = journal.submit(request(), 10.0)
        assert not journal.out
        journal.opened(WELCOME, 11.0)
        submit, resumed = sent(journal)
        assert isinstance(submit, Submit)
        assert submit.request == entry.request
        assert not submit.admitted
        assert resumed == Resumed(1)

    def test_a_new_session_is_told_everything_that_lives(self):
        journal, entry = opened(n=2, stops=["b"], deadline=60.0)
        journal.message(tokens((entry.handle, 0, 0, [97, 98]), (entry.handle, 1, 0, [97]), admitted=[(entry.handle, 3)]), 1.0)
        other = journal.submit(request(2, deadline=60.0), 3.0)
        journal.closed(5.0)
        assert not journal.out
        journal.opened(WELCOME, 8.0)
        first, second, resumed = sent(journal)
        assert isinstance(first, Submit)
        assert isinstance(second, Submit)
        assert first.choices == [Choice(0, 0, pack([97, 98]), ended=True), Choice(1, 1, pack([97]))]
        assert (first.admitted, first.cached, first.age, first.deadline) == (True, 3, 8.0, 0.0)
        assert unpack(first.prompt).tolist() == [1, 2, 3], "the prompt travels apart from the known tokens"
        assert (second.request, second.admitted, second.age, second.deadline) == (other.request, False, 5.0, 55.0)
        assert resumed == Resumed(2)

    def test_an_ended_request_is_named_until_its_last_byte_has_gone(self):
        journal, entry = opened(max_tokens=1)
        give(journal, entry, "a")
        journal.closed(2.0)
        journal.opened(WELCOME, 3.0)
        submit, resumed = sent(journal)
        assert isinstance(submit, Submit)
        assert submit.choices[0].ended
        assert resumed == Resumed(1)
        journal.done(entry, 4.0)
        assert sent(journal) == [Done(entry.request)]
        journal.closed(5.0)
        journal.opened(WELCOME, 6.0)
        assert sent(journal) == [Resumed(0)]

    def test_a_failed_request_is_not_started_anew(self):
        journal, entry = opened()
        journal.message(Failed(entry.request, 400, "x", "y"), 1.0)
        journal.closed(2.0)
        journal.opened(WELCOME, 3.0)
        assert sent(journal) == [Resumed(0)]

    def test_the_stream_goes_on_across_sessions_without_a_seam(self):
        journal, entry = opened(stops=["cd"])
        give(journal, entry, "abc")
        journal.closed(2.0)
        journal.opened(WELCOME, 3.0)
        give(journal, entry, "bcd", first=1)
        assert entry.choices[0].take() == "ab"
        assert entry.choices[0].stop_reason == "cd"

    def test_a_fault_is_forgotten_with_its_session(self):
        journal, entry = opened()
        give(journal, entry, "x", first=1)
        journal.closed(2.0)
        journal.opened(WELCOME, 3.0)
        give(journal, entry, "a")
        assert journal.fault is None
        assert entry.choices[0].take() == "a"

    def test_what_is_aborted_between_sessions_is_not_named_again(self):
        journal, entry = opened()
        journal.closed(2.0)
        journal.done(entry, 2.5)
        journal.opened(WELCOME, 3.0)
        assert sent(journal) == [Resumed(0)]

    def test_without_a_scheduler_requests_end_after_the_hold_time(self):
        journal, entry = opened()
        journal.closed(10.0)
        late = journal.submit(request(2), 20.0)
        assert journal.next_time() == 10.0 + TIMES.hold
        journal.tick(10.0 + TIMES.hold)
        assert entry.error is not None
        assert entry.error.status == 503
        assert not late.ended
        assert journal.next_time() == 20.0 + TIMES.hold

    def test_without_a_scheduler_the_deadline_of_admission_still_counts(self):
        journal, entry = opened(deadline=5.0)
        journal.closed(1.0)
        journal.tick(4.9)
        assert not entry.ended
        journal.tick(5.0)
        assert entry.error is not None
        assert entry.error.code == "queue_timeout"

    def test_with_a_scheduler_the_journal_times_nothing(self):
        journal, entry = opened(deadline=5.0)
        journal.tick(1e9)
        assert not entry.ended
        assert journal.next_time() == float("inf")
