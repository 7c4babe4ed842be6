"""Requests that pass from one frontend to another."""

from __future__ import annotations

from frontend.detokenizer import TextStream
from frontend.entries import NewRequest
from frontend.journal import Journal, NotYet
from protocol.columns import pack
from protocol.counters import Counters
from protocol.messages import Attach, Choice, Done, Gone, Moved, Resumed, SamplingParams, Submit
from protocol.messages import Journal as JournalMessage
from tests.frontend.journals import EOS, TIMES, TOKENIZER, WELCOME, give, opened, sent


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

    def test_what_cannot_be_revived_yet_is_asked_for_again_and_goes_on(self):
        here = False

        def revived(submit: Submit) -> NewRequest:
            if not here:
                raise NotYet
            return self.revived(submit)

        journal = Journal(2, TIMES, Counters(), revived)
        journal.opened(WELCOME, 0.0)
        entry, left = journal.attach(bytes(16), 1.0), journal.attach(bytes([1]) * 16, 1.0)
        sent(journal)
        params = SamplingParams(5, stop_ids=pack([EOS]))
        for each in (entry, left):
            submit = Submit(each.request, each.handle, "oracle", pack([1]), params, [Choice(0, 9, pack(b"abc"))], 3, True, 2.0)
            journal.message(JournalMessage(submit), 2.0)
        give(journal, entry, "d", first=3)
        assert not entry.ended
        assert sent(journal) == []
        assert "journal_unknown" not in journal.counters
        journal.done(left)
        assert sent(journal) == [Done(left.request)]
        here = True
        journal.attach_again()
        assert sent(journal) == [Attach(entry.request, entry.handle)]
        submit = Submit(entry.request, entry.handle, "oracle", pack([1]), params, [Choice(0, 9, pack(b"abcd"))], 3, True, 2.0)
        journal.message(JournalMessage(submit), 3.0)
        give(journal, entry, "e")
        assert entry.choices[0].take() == "abcde"
        journal.attach_again()
        assert sent(journal) == []

    def test_a_new_session_asks_for_what_was_put_off_and_tokens_count_again(self):
        answers = iter((NotYet(), None))

        def revived(submit: Submit) -> NewRequest:
            if (refusal := next(answers)) is not None:
                raise refusal
            return self.revived(submit)

        journal = Journal(2, TIMES, Counters(), revived)
        journal.opened(WELCOME, 0.0)
        entry = journal.attach(bytes(16), 1.0)
        params = SamplingParams(5, stop_ids=pack([EOS]))
        told = JournalMessage(Submit(bytes(16), entry.handle, "oracle", pack([1]), params, [Choice(0, 9, pack(b"abc"))], 3, True, 2.0))
        journal.message(told, 2.0)
        journal.closed(3.0)
        journal.opened(WELCOME, 4.0)
        assert sent(journal) == [Attach(bytes(16), entry.handle), Resumed(1)]
        journal.message(told, 5.0)
        give(journal, entry, "de")
        assert entry.choices[0].take() == "abcde"

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
