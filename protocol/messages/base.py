"""What all messages are made of: their bases, a worker's sizes, a model's description."""

from __future__ import annotations

import msgspec
from numpy import int64

from protocol.columns import BadMessage, Int32, equal_rows, rows, within

PROTOCOL = 3  # newest version spoken: 2 added DRAINED, and what ATTACH says beyond the id; 3 the prompt's log probabilities
PROTOCOL_OLDEST = 1  # oldest version spoken
TRACEPARENT = 55  # characters

SCORES_SINCE = 3  # the protocol in which a prompt's log probabilities travel

MAX_TOKENS_ANYWHERE = 1 << 24
INT32_MAX = 2**31 - 1


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of all messages; says how they are laid out."""

    def check(self, geometry: Geometry | None = None) -> None:
        """Raise BadMessage if a field cannot be used. `geometry` is the worker's, for step messages."""


class Part(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of structs that only occur inside messages."""


class Geometry(Part, frozen=True):
    """The sizes of a worker. Every index in a step message is checked against them."""

    block_size: int  # tokens
    blocks: int  # usable device blocks, ids 0 … blocks − 1
    host_blocks: int  # blocks in host memory, for swapping
    slots: int  # sequences that can run at once
    max_model_len: int  # tokens of prompt and output together
    max_step_tokens: int  # tokens of one step
    vocab_size: int

    @property
    def table_width(self) -> int:
        """Entries in one slot's block table."""
        return -(-self.max_model_len // self.block_size)


class Defaults(Part, frozen=True):
    """The model's own sampling defaults (generation_config.json), used where a client names none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ModelInfo(Part, frozen=True):
    """A model as frontends see it: enough to validate and to answer /v1/models."""

    name: str
    fingerprint: bytes
    max_model_len: int
    vocab_size: int
    eos: bytes  # ids that end a choice
    defaults: Defaults
    tokenizer: bytes  # hash of the tokenizer files, 16 bytes
    workers_ready: int
    workers_loading: int = 0
    bos: int = -1  # −1: the model has none


def check_id(request: bytes) -> None:
    if len(request) != 16:
        raise BadMessage("request", "must be 16 bytes")


def check_trace(trace: str) -> None:
    """Raise BadMessage for what is longer than a W3C traceparent."""
    if len(trace) > TRACEPARENT:
        raise BadMessage("trace", "is longer than a traceparent")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise BadMessage("seed", "must have 64 bits")


def check_logprobs(lp_counts: bytes, counts: Int32, ids: bytes, values: bytes, ranks: bytes) -> None:
    per_token = within(lp_counts, "lp_counts", 0, 1 << 16).astype(int64)
    pairs = int((per_token * counts).sum())
    if rows(ids, "lp_ids") != pairs or rows(values, "lp_values") != pairs:
        raise BadMessage("lp_ids", "must be as many as lp_counts say")
    if rows(ranks, "lp_ranks") != int(((per_token > 0) * counts).sum()):
        raise BadMessage("lp_ranks", "must be one per token with logprobs")


class Scores(Part, frozen=True):
    """Log probabilities of the prompt's own tokens at positions first, first + 1, …; the first position of all has none.

    Each position has as many (id, value) pairs: its own token's, then the alternatives from the most likely on.
    """

    first: int
    ids: bytes
    values: bytes  # float32
    ranks: bytes  # of the prompt's own tokens, one a position

    @property
    def count(self) -> int:
        """How many positions."""
        return len(self.ranks) // 4

    def check(self) -> None:
        """Raise BadMessage if the columns do not belong together."""
        count, pairs = rows(self.ranks, "ranks"), equal_rows(("ids", self.ids), ("values", self.values))
        if not count:
            raise BadMessage("ranks", "is empty")
        if pairs % count or not pairs:
            raise BadMessage("ids", "must be as many for each position")
        if not 1 <= self.first <= MAX_TOKENS_ANYWHERE - count:
            raise BadMessage("first", "is out of range")
