"""Tokenizer files on their way from a worker to the frontends that ask for them."""

from __future__ import annotations

from protocol.messages import FileChunk, FileRequest
from scheduler_svc.frontends import Frontends
from scheduler_svc.ledger import Ledger
from scheduler_svc.worker import Worker


class FileRelay:
    """Passes requests on, one per piece however many frontends wait for it, and answers when nobody has the file."""

    def __init__(self, ledger: Ledger, frontends: Frontends) -> None:
        self._ledger = ledger
        self._frontends = frontends
        self._waiting: dict[tuple[bytes, int], set[int]] = {}  # (file, offset) -> frontend sessions
        self._asked: dict[tuple[bytes, int], int] = {}  # -> the worker session that was asked

    def request(self, session: int, message: FileRequest, workers: list[Worker]) -> None:
        """A frontend asks for a piece."""
        piece = (message.tokenizer, message.offset)
        self._waiting.setdefault(piece, set()).add(session)
        if piece not in self._asked:
            self._ask(piece, workers)

    def chunk(self, message: FileChunk) -> None:
        """A worker has answered."""
        piece = (message.tokenizer, message.offset)
        self._asked.pop(piece, None)
        for session in sorted(self._waiting.pop(piece, ())):
            if session in self._frontends.by_session:
                self._ledger.out.append((session, message, 0))

    def lost(self, session: int, workers: list[Worker]) -> None:
        """A worker is gone: ask another."""
        for piece in [piece for piece, asked in self._asked.items() if asked == session]:
            del self._asked[piece]
            self._ask(piece, workers)

    def _ask(self, piece: tuple[bytes, int], workers: list[Worker]) -> None:
        tokenizer, offset = piece
        for worker in workers:
            if worker.ready and worker.model.ready is not None and worker.model.ready.tokenizer == tokenizer:
                self._asked[piece] = worker.session
                self._ledger.out.append((worker.session, FileRequest(tokenizer, offset), 0))
                return
        self.chunk(FileChunk(tokenizer, offset, -1, b""))
