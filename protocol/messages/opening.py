"""Opening a session, and what a peer says of itself."""

from __future__ import annotations

from protocol.columns import BadMessage, rows, within
from protocol.messages.base import INT32_MAX, PROTOCOL, PROTOCOL_OLDEST, Defaults, Geometry, Message, ModelInfo


class Hello(Message, tag="hello", frozen=True):
    """Peer → scheduler, unsequenced: who I am. Repeated with the same attempt until answered."""

    role: str  # "frontend" or "worker"
    name: str
    incarnation: int  # random per process start
    attempt: int
    protocol_oldest: int = PROTOCOL_OLDEST
    protocol: int = PROTOCOL
    epoch: int = 0  # highest epoch seen
    live: bool = False  # whether the sender has a live session with some scheduler
    hash_key: bytes = b""  # 16 bytes, or empty if none is known yet
    failed_session: int = 0  # the session and plan that raised, until a WELCOME has answered it
    failed_step: int = 0

    def check(self, geometry: Geometry | None = None) -> None:
        if self.role not in ("frontend", "worker"):
            raise BadMessage("role", f"{self.role!r} is neither 'frontend' nor 'worker'")
        if not self.name or len(self.name) > 200:
            raise BadMessage("name", "must have 1 to 200 characters")
        if len(self.hash_key) not in (0, 16):
            raise BadMessage("hash_key", "must be empty or 16 bytes")
        if self.epoch < 0:
            raise BadMessage("epoch", "is negative")


class Welcome(Message, tag="welcome", frozen=True):
    """Scheduler → peer, unsequenced: the session is open. Everything later carries its id."""

    attempt: int
    session: int
    epoch: int
    hash_key: bytes
    credit: int = 0  # tokens, for frontends
    protocol: int = PROTOCOL

    def check(self, geometry: Geometry | None = None) -> None:
        if len(self.hash_key) != 16:
            raise BadMessage("hash_key", "must be 16 bytes")
        if self.session == 0:
            raise BadMessage("session", "is 0, which means none")


class Refused(Message, tag="refused", frozen=True):
    """Scheduler → peer, unsequenced: no session, and why. The peer says it to its user and tries again, slowly."""

    attempt: int
    reason: str


class Stale(Message, tag="stale", frozen=True):
    """Peer → scheduler, unsequenced: I have seen a higher epoch than yours."""

    epoch: int


class Join(Message, tag="join", frozen=True):
    """Worker → scheduler, unsequenced: opens the results connection of a session."""

    session: int


class Phase(Message, tag="phase", frozen=True):
    """Worker → scheduler: a long phase (loading, compiling, capture, serving) that suspends the progress deadline.

    "draining" says that the worker wants to leave: it gets nothing new, what it has goes elsewhere, then DRAINED comes.
    """

    name: str
    seconds: float = 0.0  # expected, 0 if unknown


class Drained(Message, tag="drained", frozen=True):
    """Scheduler → worker whose phase is "draining": nothing of what it had is left, it may go. Since protocol 2."""


class Ready(Message, tag="ready", frozen=True):
    """Worker → scheduler, first message of its session once it can serve: what it is and which blocks it still holds."""

    model: str
    fingerprint: bytes
    geometry: Geometry
    attention: str
    eos: bytes = b""
    bos: int = -1
    defaults: Defaults = Defaults()
    tokenizer: bytes = b""
    blocks: bytes = b""  # sealed device blocks
    hashes: bytes = b""  # 16 bytes each
    host_blocks: bytes = b""  # blocks in host memory, copied there from sealed ones
    host_hashes: bytes = b""

    def check(self, geometry: Geometry | None = None) -> None:
        g = self.geometry
        for field in ("block_size", "blocks", "slots", "max_model_len", "max_step_tokens", "vocab_size"):
            if not 0 < getattr(g, field) <= INT32_MAX:
                raise BadMessage(f"geometry.{field}", "must be positive")
        if g.host_blocks < 0:
            raise BadMessage("geometry.host_blocks", "is negative")
        if rows(self.blocks, "blocks") != rows(self.hashes, "hashes", 16):
            raise BadMessage("hashes", "must be one per block")
        if rows(self.host_blocks, "host_blocks") != rows(self.host_hashes, "host_hashes", 16):
            raise BadMessage("host_hashes", "must be one per host block")
        within(self.blocks, "blocks", 0, g.blocks)
        within(self.host_blocks, "host_blocks", 0, max(g.host_blocks, 1))
        rows(self.eos, "eos")


class Models(Message, tag="models", frozen=True):
    """Scheduler → frontend, at the start of a session and at each change."""

    models: list[ModelInfo]

    def check(self, geometry: Geometry | None = None) -> None:
        for model in self.models:
            within(model.eos, "eos", 0, INT32_MAX)
            if len(model.tokenizer) != 16:
                raise BadMessage("tokenizer", "must be 16 bytes")


class FileRequest(Message, tag="file?", frozen=True):
    """Frontend → scheduler → worker: a piece of the tokenizer files with this hash. One outstanding."""

    tokenizer: bytes
    offset: int

    def check(self, geometry: Geometry | None = None) -> None:
        if self.offset < 0:
            raise BadMessage("offset", "is negative")


class FileChunk(Message, tag="file", frozen=True):
    """The answer: at most 256 KiB of the bundle. total < 0: not to be had."""

    tokenizer: bytes
    offset: int
    total: int
    data: bytes

    def check(self, geometry: Geometry | None = None) -> None:
        if self.offset < 0:
            raise BadMessage("offset", "is negative")
