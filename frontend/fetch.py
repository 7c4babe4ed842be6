"""Tokenizer files over the wire: one bundle, asked for piece by piece. No I/O."""

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
