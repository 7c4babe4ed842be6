"""Tokenizer files pass from a worker to the frontends."""

from __future__ import annotations

from protocol.messages import FileChunk, FileRequest
from tests.scheduler_svc.formulas import TOKENIZER
from tests.scheduler_svc.play import Stage


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
