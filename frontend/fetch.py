"""Tokenizer files over the wire: one bundle after another, each asked for piece by piece. No I/O."""

from __future__ import annotations

from protocol.messages import FileChunk, FileRequest
from protocol.tokenizer_files import MAX_BUNDLE


class Fetch:
    """A bundle on its way. `bundle` holds it once it is complete; `failed` says that nobody has it.

    The caller checks the bundle's hash: this only puts the pieces together.
    """

    def __init__(self, tokenizer: bytes) -> None:
        self.tokenizer = tokenizer
        self.bundle: bytes | None = None
        self.failed = ""
        self._data = bytearray()

    @property
    def over(self) -> bool:
        """Whether the bundle is complete, or not to be had."""
        return self.bundle is not None or bool(self.failed)

    def request(self) -> FileRequest:
        """Ask for the next piece (again, on a new session)."""
        return FileRequest(self.tokenizer, len(self._data))

    def chunk(self, message: FileChunk) -> bool:
        """Take a piece; returns False for one that is not the next (a repeated answer)."""
        if self.over or message.offset != len(self._data):
            return False
        if message.total < 0:
            self.failed = "no worker has these tokenizer files"
        elif message.total > MAX_BUNDLE:
            self.failed = f"the tokenizer files have {message.total} bytes, more than {MAX_BUNDLE}"
        elif not message.data and message.total > len(self._data):
            self.failed = "the tokenizer files end early"
        else:
            self._data += message.data
            if len(self._data) >= message.total:
                self.bundle = bytes(self._data)
        return True


class Fetches:
    """The bundles that are wanted. One request is outstanding, that of the oldest."""

    def __init__(self) -> None:
        self._wanted: dict[bytes, Fetch] = {}

    def ask(self, tokenizer: bytes) -> Fetch:
        """Want a bundle, by its hash."""
        return self._wanted.setdefault(tokenizer, Fetch(tokenizer))

    def request(self) -> FileRequest | None:
        """What is asked for now; None if nothing is wanted."""
        return next((fetch.request() for fetch in self._wanted.values()), None)

    def take(self, message: FileChunk) -> bool:
        """Take a piece; returns False for one that nobody awaits."""
        fetch = self._wanted.get(message.tokenizer)
        if fetch is None or not fetch.chunk(message):
            return False
        if fetch.over:
            del self._wanted[message.tokenizer]
        return True
