"""Tokenizer files that a journal asks for."""

from __future__ import annotations

from protocol.messages import FileChunk, FileRequest
from tests.frontend.journals import WELCOME, opened, sent


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
