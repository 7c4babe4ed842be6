"""What all messages are made of: their bases, a worker's sizes, a model's description."""

from __future__ import annotations

import msgspec
from numpy import int64

from protocol.columns import BadMessage, Int32, rows, within

PROTOCOL = 2  # newest version spoken: 2 added DRAINED, and what ATTACH says beyond the id
PROTOCOL_OLDEST = 1  # oldest version spoken

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
