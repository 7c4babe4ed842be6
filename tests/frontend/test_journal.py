"""The journal: what is committed, how choices end, and what a new session is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.detokenizer import TextStream
from frontend.entries import Entry, NewRequest
from frontend.journal import Journal
from frontend.tokenizer import Tokenizer
from protocol.columns import pack, pack_floats, unpack
from protocol.counters import Counters
from protocol.messages import (
    Abort,
    Attach,
    Choice,
    Credit,
    Done,
    Failed,
    FileChunk,
    FileRequest,
    Gone,
    Message,
    Models,
    Moved,
    Resumed,
    SamplingParams,
    Submit,
    Tokens,
    Welcome,
)
from protocol.messages import Journal as JournalMessage
from protocol.times import Times
from protocol.tokenizer_files import byte_bundle
from tests.frontend.fakes import model_info

EOS = 256
TOKENIZER = Tokenizer.from_bundle(byte_bundle())
TIMES = Times()
WELCOME = Welcome(1, 7, 1, bytes(16), credit=100)


def request(
    name: int = 1,
    *,
    max_tokens: int = 100,
    n: int = 1,
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (EOS,),
    include_stop: bool = False,
    min_tokens: int = 0,
    **more: object,
) -> NewRequest:
    params = SamplingParams(max_tokens, stop_ids=pack(stop_ids), min_tokens=min_tokens, logprobs=more.pop("logprobs", -1))  # type: ignore[arg-type]
    return NewRequest(
        bytes([name] * 16),
        "oracle",
        pack([1, 2, 3]),
        params,
        list(range(n)),
        open_text=lambda: TextStream(TOKENIZER, stops, include_stop, min_tokens=min_tokens),
        has_stop_strings=bool(stops),
        show_stop_ids=include_stop,
        **more,  # type: ignore[arg-type]
    )


def tokens(*rows: tuple[int, int, int, Sequence[int]], admitted: Sequence[tuple[int, int]] = ()) -> Tokens:
    """TOKENS of rows (handle, choice, first index, ids)."""
    message = Tokens(
        pack([row[0] for row in rows]),
        pack([row[1] for row in rows]),
        pack([row[2] for row in rows]),
        pack([len(row[3]) for row in rows]),
        pack([token for row in rows for token in row[3]]),
        admitted=pack([handle for handle, _ in admitted]),
        cached=pack([cached for _, cached in admitted]),
    )
    message.check()
    return message


def opened(**more: object) -> tuple[Journal, Entry]:
    """A journal with an open session and one request, its messages taken off."""
    journal = Journal(1, TIMES, Counters())
    journal.opened(WELCOME, 0.0)
    entry = journal.submit(request(**more), 0.0)  # type: ignore[arg-type]
    journal.out.clear()
    return journal, entry


def sent(journal: Journal) -> list[Message]:
    """What is to be transmitted, each message valid."""
    messages = list(journal.out)
    journal.out.clear()
    for message in messages:
        message.check()
    return messages


def give(journal: Journal, entry: Entry, text: str, first: int | None = None, choice: int = 0) -> None:
    at = len(entry.choices[choice].tokens) if first is None else first
    journal.message(tokens((entry.handle, choice, at, list(text.encode()))), 1.0)


def test_a_request_is_submitted_with_its_seeds_under_a_handle_of_its_own():
    journal = Journal(1, TIMES, Counters())
    journal.opened(WELCOME, 0.0)
    first, second = journal.submit(request(1, n=2), 0.0), journal.submit(request(2), 0.0)
    resumed, one, two = sent(journal)
    assert resumed == Resumed(0)
    assert isinstance(one, Submit)
    assert isinstance(two, Submit)
    assert [one.handle, two.handle] == [first.handle, second.handle]
    assert first.handle != second.handle
    assert one.choices == [Choice(0, 0), Choice(1, 1)]
    assert not one.admitted
    assert one.cached == -1


def test_an_id_is_submitted_only_once():
    journal, _ = opened()
    with pytest.raises(ValueError, match="already"):
        journal.submit(request(), 0.0)


def test_text_comes_with_the_tokens():
    journal, entry = opened()
    give(journal, entry, "hel")
    assert list(journal.touched.values()) == [entry]
    give(journal, entry, "lo")
    assert entry.choices[0].take() == "hello"
    assert entry.choices[0].take() == ""
    assert not entry.ended


def test_a_listener_that_wants_only_the_end_is_touched_only_then():
    journal, entry = opened(max_tokens=3, every_step=False)
    give(journal, entry, "ab")
    assert not journal.touched
    give(journal, entry, "c")
    assert list(journal.touched.values()) == [entry]


def test_half_a_character_is_never_shown():
    journal, entry = opened()
    first, second = "é".encode()
    journal.message(tokens((entry.handle, 0, 0, [first])), 1.0)
    assert entry.choices[0].take() == ""
    journal.message(tokens((entry.handle, 0, 1, [second])), 1.0)
    assert entry.choices[0].take() == "é"


class TestEnds:
    def test_length_ends_a_choice_and_with_it_the_request(self):
        journal, entry = opened(max_tokens=3)
        give(journal, entry, "abcdef")
        assert (entry.choices[0].finish_reason, len(entry.choices[0].tokens), entry.choices[0].take()) == ("length", 3, "abc")
        assert entry.ended
        assert not sent(journal)

    def test_a_stop_id_is_counted_and_not_shown(self):
        journal, entry = opened(stop_ids=(EOS, ord("x")))
        give(journal, entry, "abx")
        choice = entry.choices[0]
        assert (choice.finish_reason, choice.stop_reason, len(choice.tokens), choice.take()) == ("stop", ord("x"), 3, "ab")
        assert not sent(journal), "the worker ends at stop ids by itself"

    def test_a_stop_id_is_shown_if_the_client_asked(self):
        journal, entry = opened(stop_ids=(ord("x"),), include_stop=True)
        give(journal, entry, "abx")
        assert entry.choices[0].take() == "abx"

    def test_stop_ids_before_min_tokens_do_not_end(self):
        journal, entry = opened(stop_ids=(ord("x"),), min_tokens=2)
        give(journal, entry, "xxx")
        choice = entry.choices[0]
        assert (choice.finish_reason, len(choice.tokens), choice.take()) == ("stop", 3, "xx")

    def test_a_stop_string_ends_the_choice_and_aborts_the_rest_of_its_work(self):
        journal, entry = opened(stops=["lo w"])
        give(journal, entry, "hello world")
        choice = entry.choices[0]
        assert (choice.finish_reason, choice.stop_reason, len(choice.tokens), choice.take()) == ("stop", "lo w", 7, "hel")
        assert sent(journal) == [Abort(entry.request, pack([0]))]

    def test_text_that_may_begin_a_stop_string_is_withheld_until_the_end(self):
        journal, entry = opened(stops=["lo w"], max_tokens=5)
        give(journal, entry, "hell")
        assert entry.choices[0].take() == "hel"
        give(journal, entry, "o")
        assert (entry.choices[0].take(), entry.choices[0].finish_reason) == ("lo", "length")

    def test_a_stop_string_beats_length_at_one_index(self):
        journal, entry = opened(stops=["c"], max_tokens=3)
        give(journal, entry, "abc")
        assert (entry.choices[0].finish_reason, entry.choices[0].stop_reason) == ("stop", "c")

    def test_a_stop_string_beats_a_stop_id_at_one_index(self):
        journal, entry = opened(stops=["bc"], stop_ids=(ord("c"),))
        give(journal, entry, "abc")
        choice = entry.choices[0]
        assert (choice.finish_reason, choice.stop_reason, choice.take()) == ("stop", "bc", "a")

    def test_a_stop_id_beats_length_at_one_index(self):
        journal, entry = opened(stop_ids=(ord("c"),), max_tokens=3)
        give(journal, entry, "abc")
        assert entry.choices[0].finish_reason == "stop"

    def test_the_lowest_index_wins(self):
        journal, entry = opened(stops=["d"], stop_ids=(ord("b"),), max_tokens=3)
        give(journal, entry, "abcd")
        assert (entry.choices[0].stop_reason, len(entry.choices[0].tokens)) == (ord("b"), 2)

    def test_tokens_behind_the_end_are_ignored_at_any_index(self):
        journal, entry = opened(max_tokens=2)
        give(journal, entry, "ab")
        for first in (0, 2, 50):
            give(journal, entry, "zz", first)
        assert journal.fault is None
        assert bytes(entry.choices[0].tokens) == b"ab"

    def test_choices_end_one_by_one_and_the_request_with_the_last(self):
        journal, entry = opened(n=2, stops=["b"], max_tokens=4)
        journal.message(tokens((entry.handle, 0, 0, [97, 98]), (entry.handle, 1, 0, [97, 97])), 1.0)
        assert not entry.ended
        assert sent(journal) == [Abort(entry.request, pack([0]))]
        give(journal, entry, "aa", choice=1)
        assert entry.ended
        assert [c.finish_reason for c in entry.choices] == ["stop", "length"]

    def test_a_failed_request_ends_once_and_with_its_error(self):
        journal, entry = opened(n=2)
        failed = Failed(entry.request, 429, "queue_full", "try later", retry_after=2.0)
        journal.message(failed, 1.0)
        journal.message(Failed(entry.request, 500, "x", "y"), 1.0)
        assert entry.ended
        assert entry.error == failed
        assert {c.finish_reason for c in entry.choices} == {"error"}
        assert journal.counters["journal_unknown"] == 1

    def test_a_fault_in_one_text_leaves_its_neighbours_alone(self):
        class Broken:
            stop, text_length = None, 0

            def push(self, token: int) -> str:
                raise IndexError(token)

            def flush(self) -> str:
                raise IndexError

        journal, good = opened()
        bad = journal.submit(NewRequest(bytes(16), "oracle", pack([1]), SamplingParams(9), [1], open_text=Broken), 0.0)
        journal.out.clear()
        journal.message(tokens((bad.handle, 0, 0, [1]), (good.handle, 0, 0, [97])), 1.0)
        assert bad.error is not None
        assert bad.error.status == 500
        assert good.choices[0].take() == "a"
        assert sent(journal) == [Abort(bad.request)]


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


class TestAborts:
    def test_a_client_that_left_is_aborted_and_forgotten(self):
        journal, entry = opened()
        give(journal, entry, "a")
        journal.done(entry)
        assert sent(journal) == [Abort(entry.request), Done(entry.request)]
        give(journal, entry, "b")
        assert journal.counters["journal_unknown"] == 1
        assert not journal.touched

    def test_some_choices_can_be_aborted_alone(self):
        journal, entry = opened(n=3)
        journal.abort(entry, [0, 2])
        assert [c.finish_reason for c in entry.choices] == ["abort", "", "abort"]
        assert not entry.ended
        journal.abort(entry, [0])
        assert sent(journal) == [Abort(entry.request, pack([0, 2]))]

    def test_done_counts_once(self):
        journal, entry = opened(max_tokens=1)
        give(journal, entry, "a")
        journal.done(entry)
        journal.done(entry)
        assert sent(journal) == [Done(entry.request)]


class TestMoves:
    def revived(self, submit: Submit) -> NewRequest:
        seeds = [choice.seed for choice in submit.choices]
        return NewRequest(
            submit.request,
            submit.model,
            submit.prompt,
            submit.params,
            seeds,
            lambda: TextStream(TOKENIZER, ["zz"]),
            True,
            header=submit.header,
        )

    def test_a_moved_request_is_left_to_its_new_owner(self):
        journal, entry = opened()
        journal.message(Moved(entry.request), 1.0)
        assert entry.ended
        assert entry.moved
        assert list(journal.touched.values()) == [entry]
        journal.closed(2.0)
        journal.opened(WELCOME, 3.0)
        assert sent(journal) == [Resumed(0)]
        journal.done(entry)
        assert sent(journal) == []

    def test_an_attached_request_goes_on_where_it_was(self):
        journal = Journal(2, TIMES, Counters(), self.revived)
        journal.opened(WELCOME, 0.0)
        sent(journal)
        entry = journal.attach(bytes(16), 1.0)
        assert sent(journal) == [Attach(bytes(16), entry.handle)]
        assert not entry.ended
        params = SamplingParams(5, stop_ids=pack([EOS]))
        submit = Submit(bytes(16), entry.handle, "oracle", pack([1]), params, [Choice(0, 9, pack(b"abc"))], 3, True, 2.0, cached=1)
        journal.message(JournalMessage(submit), 2.0)
        give(journal, entry, "de")
        assert entry.choices[0].take() == "abcde"
        assert entry.choices[0].finish_reason == "length"
        journal.closed(3.0)
        journal.opened(WELCOME, 4.0)
        again, resumed = sent(journal)
        assert isinstance(again, Submit)
        assert (again.owner, again.admitted, again.cached, again.age) == (3, True, 1, 4.0)
        assert resumed == Resumed(1)

    def test_a_pending_attach_is_asked_again_before_resumed(self):
        journal = Journal(2, TIMES, Counters(), self.revived)
        entry = journal.attach(bytes(16), 1.0)
        journal.opened(WELCOME, 2.0)
        assert sent(journal) == [Attach(bytes(16), entry.handle), Resumed(1)]

    def test_a_stream_that_nobody_has_ends_with_404(self):
        journal = Journal(2, TIMES, Counters(), self.revived)
        journal.opened(WELCOME, 0.0)
        entry = journal.attach(bytes(16), 1.0)
        journal.message(Gone(bytes(16)), 2.0)
        assert entry.ended
        assert entry.error is not None
        assert (entry.error.status, entry.error.code) == (404, "stream_gone")


class TestFiles:
    def test_a_bundle_is_fetched_piece_by_piece(self):
        journal, _ = opened()
        fetch = journal.fetch(b"h" * 16)
        assert journal.fetch(b"h" * 16) is fetch
        assert sent(journal) == [FileRequest(b"h" * 16, 0)]
        journal.message(FileChunk(b"h" * 16, 0, 5, b"abc"), 1.0)
        assert sent(journal) == [FileRequest(b"h" * 16, 3)]
        journal.message(FileChunk(b"h" * 16, 0, 5, b"abc"), 1.0)  # repeated
        journal.closed(2.0)
        journal.opened(WELCOME, 3.0)
        assert sent(journal)[-1] == FileRequest(b"h" * 16, 3)
        journal.message(FileChunk(b"h" * 16, 3, 5, b"de"), 4.0)
        assert fetch.bundle == b"abcde"
        assert not sent(journal)

    def test_one_request_is_outstanding_at_a_time(self):
        journal, _ = opened()
        journal.fetch(b"a" * 16)
        journal.fetch(b"b" * 16)
        assert sent(journal) == [FileRequest(b"a" * 16, 0)]
        journal.message(FileChunk(b"a" * 16, 0, 1, b"x"), 1.0)
        assert sent(journal) == [FileRequest(b"b" * 16, 0)]

    def test_files_that_nobody_has_fail(self):
        journal, _ = opened()
        fetch = journal.fetch(b"h" * 16)
        journal.message(FileChunk(b"h" * 16, 0, -1, b""), 1.0)
        assert fetch.failed
        assert fetch.over


def test_logprobs_follow_their_tokens_past_duplicates():
    journal, plain = opened()
    entry = journal.submit(request(2, logprobs=1), 0.0)
    give(journal, entry, "a")
    entry.choices[0].take_logprobs()
    message = Tokens(
        handles=pack([plain.handle, entry.handle]),
        choices=pack([0, 0]),
        firsts=pack([0, 0]),
        counts=pack([1, 2]),
        ids=pack([97, 97, 98]),
        lp_counts=pack([0, 2]),
        lp_ids=pack([97, 65, 98, 66]),
        lp_values=pack_floats([-1, -2, -3, -4]),
        lp_ranks=pack([1, 2]),
    )
    message.check()
    journal.message(message, 1.0)
    assert entry.choices[0].take_logprobs() == [([98, 66], [-3, -4], 2)]
    assert plain.choices[0].take_logprobs() == []


@given(
    output=st.lists(st.sampled_from([*b"abc", EOS]), min_size=1, max_size=40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.booleans()), max_size=30),
    stops=st.lists(st.sampled_from(["ab", "bca", "cc", "aaa"]), max_size=2),
    max_tokens=st.integers(1, 30),
)
def test_however_tokens_arrive_the_ending_is_the_same(output, cuts, stops, max_tokens):
    straight, whole = opened(stops=stops, max_tokens=max_tokens)
    for i, token in enumerate(output):
        straight.message(tokens((whole.handle, 0, i, [token])), 1.0)
    journal, entry = opened(stops=stops, max_tokens=max_tokens)
    for first, count, reopen in [*cuts, (0, len(output), False)]:
        first = min(first, len(entry.choices[0].tokens))  # gaps are another test's
        journal.message(tokens((entry.handle, 0, first, output[first : first + count])), 1.0)
        if reopen:
            journal.closed(1.0)
            journal.opened(WELCOME, 1.0)
    a, b = whole.choices[0], entry.choices[0]
    assert (a.tokens, a.finish_reason, a.stop_reason, a.take()) == (b.tokens, b.finish_reason, b.stop_reason, b.take())
    assert a.characters == b.characters
