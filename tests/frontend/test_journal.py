"""The journal: what is committed, and how choices end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend import journal as journal_module
from frontend.entries import NewRequest
from frontend.journal import Journal
from protocol.codec import MAX_SUBMIT
from protocol.columns import pack, pack_floats
from protocol.counters import Counters
from protocol.messages import Abort, Choice, Done, Failed, Resumed, SamplingParams, Submit, Tokens
from tests.frontend.journals import EOS, TIMES, WELCOME, give, opened, request, sent, tokens


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


def test_logprobs_follow_their_tokens_past_duplicates():
    journal, plain = opened()
    entry = journal.submit(request(2, logprobs=1), 0.0)
    give(journal, entry, "a")
    entry.choices[0].take()
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
    entry.choices[0].take()
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


class TestARequestThatNoFrameHolds:
    """It fails alone: sent, it would end the session, and the next one."""

    def test_it_is_never_sent(self):
        journal, other = opened()
        large = journal.submit(replace(request(2), prompt=bytes(MAX_SUBMIT)), 0.0)
        assert not sent(journal)
        assert (large.error.status, large.error.code) == (413, "request_too_large")
        assert large.ended
        assert large.handle in journal.touched
        give(journal, other, "ab")
        assert other.choices[0].take() == "ab"

    def test_nor_is_one_that_comes_while_there_is_no_session(self):
        journal = Journal(1, TIMES, Counters())
        large = journal.submit(replace(request(), prompt=bytes(MAX_SUBMIT)), 0.0)
        assert large.ended
        journal.opened(WELCOME, 0.0)
        assert sent(journal) == [Resumed(0)]

    def test_one_that_has_grown_is_not_named_in_the_next_session(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(journal_module, "MAX_SUBMIT", 400)
        journal, small = opened()
        grown = journal.submit(request(2), 0.0)
        give(journal, grown, "a" * 90)
        assert not grown.ended
        journal.closed(1.0)
        journal.opened(WELCOME, 2.0)
        named, resumed = sent(journal)
        assert isinstance(named, Submit)
        assert named.handle == small.handle
        assert resumed == Resumed(1)
        assert grown.error.status == 413
        assert len(grown.choices[0].tokens) == 90, "what was committed stays"
