"""The messages, all of them. Three groups: opening a session, a request's life, a step.

Conventions
    * Every message is a tagged, array-like Struct: on the wire `["tag", field, field, …]`, plain MessagePack.
    * `bytes` fields named as plurals are columns (`columns.py`): little-endian int32 unless said otherwise.
    * Fields are only ever appended, with defaults, so neighbours one minor version apart understand each other.
    * Times are durations in seconds, never clock readings.
    * `check()` runs before any use; it raises BadMessage, and the message is then dropped and counted.

Words
    request   what a client asked for; named by 16 random bytes
    choice    one output of a request (`n` choices, indices from 0)
    handle    a small integer by which one frontend incarnation names its request in step messages
    record    a choice as its worker knows it, from ADMIT to drop; named by an integer of the session
    epoch     orders schedulers: a counter above 32 random bits of the scheduler's start, so that two never tie
    slot      a row of the worker's device state; a record is bound to it while it runs
    step      one plan and its result; numbered from 1 in each session
"""

from __future__ import annotations

from math import inf

import msgspec
from numpy import int64

from protocol.columns import BadMessage, Int32, equal_rows, finite, rows, unpack_floats, within

PROTOCOL = 1  # newest version spoken
PROTOCOL_OLDEST = 1  # oldest version spoken

MAX_TOKENS_ANYWHERE = 1 << 24
INT32_MAX = 2**31 - 1


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of all messages; says how they are laid out."""

    def check(self, geometry: Geometry | None = None) -> None:
        """Raise BadMessage if a field cannot be used. `geometry` is the worker's, for step messages."""


class Part(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of structs that only occur inside messages."""


# ---------------------------------------------------------------- what a worker is


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


# ---------------------------------------------------------------- opening a session


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
    """Worker → scheduler: a long phase (loading, compiling, capture, serving) that suspends the progress deadline."""

    name: str
    seconds: float = 0.0  # expected, 0 if unknown


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
    host_blocks: bytes = b""
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


# ---------------------------------------------------------------- a request's life


class SamplingParams(Part, frozen=True):
    """How a request's choices are sampled and ended. Frontends resolve defaults; nothing inside guesses."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # −1 and 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_ids: bytes = b""  # ids that end a choice, EOS included unless it is ignored
    logprobs: int = -1  # alternatives reported per token; −1: none, 0: the sampled token's own
    prompt_logprobs: int = -1
    bias_ids: bytes = b""
    bias_values: bytes = b""  # float32
    allowed_ids: bytes = b""  # empty: all
    bad_words: list[bytes] = []  # id sequences
    grammar: bytes = b""

    def check(self, vocab_size: int = INT32_MAX) -> None:
        """Raise BadMessage for a value that no sampler can use."""
        if not 0 <= self.max_tokens <= MAX_TOKENS_ANYWHERE:
            raise BadMessage("max_tokens", "is out of range")
        if not 0.0 <= self.temperature <= 1e6:
            raise BadMessage("temperature", "is out of range")
        if not 0.0 < self.top_p <= 1.0:
            raise BadMessage("top_p", "must lie in (0, 1]")
        if not -1 <= self.top_k <= INT32_MAX:
            raise BadMessage("top_k", "must be −1, 0 or positive")
        if not 0.0 <= self.min_p <= 1.0:
            raise BadMessage("min_p", "must lie in [0, 1]")
        if not 0.0 < self.repetition_penalty <= 1e6:
            raise BadMessage("repetition_penalty", "must be positive")
        finite(self.presence_penalty, "presence_penalty")
        finite(self.frequency_penalty, "frequency_penalty")
        if rows(self.bias_ids, "bias_ids") != rows(self.bias_values, "bias_values"):
            raise BadMessage("bias_values", "must be one per id")
        if not (unpack_floats(self.bias_values) < inf).all():  # −inf bans a token
            raise BadMessage("bias_values", "holds an infinity or no number")
        for field in ("stop_ids", "bias_ids", "allowed_ids"):
            rows(getattr(self, field), field)
            within(getattr(self, field), field, 0, vocab_size)
        for word in self.bad_words:
            rows(word, "bad_words")


class Choice(Part, frozen=True):
    """One output: its seed decides every draw, `known` is what the journal has committed so far."""

    index: int
    seed: int  # 64 bits
    known: bytes = b""  # tokens
    ended: bool = False


class Submit(Message, tag="submit", frozen=True):
    """Frontend → scheduler: a new request, or one that lives on after a lost session (`admitted`)."""

    request: bytes  # 16 bytes
    handle: int
    model: str
    prompt: bytes  # tokens
    params: SamplingParams
    choices: list[Choice]
    owner: int = 0  # rises with each change of frontend; the highest wins
    admitted: bool = False  # admitted before: never refused for size or caps
    age: float = 0.0  # since the client sent it
    deadline: float = 0.0  # remaining time it may wait for admission; 0: none
    priority: int = 0
    tenant: str = ""
    cache_salt: bytes = b""
    cached: int = -1  # cached_tokens as at first admission; −1: not yet admitted
    header: bytes = b""  # what another frontend needs to go on answering; opaque to the scheduler

    def check(self, geometry: Geometry | None = None) -> None:
        _check_id(self.request)
        if not 0 <= self.handle <= INT32_MAX:
            raise BadMessage("handle", "is out of range")
        if not rows(self.prompt, "prompt"):
            raise BadMessage("prompt", "is empty")
        within(self.prompt, "prompt", 0, INT32_MAX)
        if not self.choices:
            raise BadMessage("choices", "is empty")
        if [c.index for c in self.choices] != list(range(len(self.choices))):
            raise BadMessage("choices", "must be listed by index, from 0")
        for choice in self.choices:
            rows(choice.known, "known")
            within(choice.known, "known", 0, INT32_MAX)
            _check_seed(choice.seed)
        self.params.check()


class Abort(Message, tag="abort", frozen=True):
    """Frontend → scheduler: stop these choices (none listed: all). Unknown ids are a no-op, counted."""

    request: bytes
    choices: bytes = b""

    def check(self, geometry: Geometry | None = None) -> None:
        _check_id(self.request)
        within(self.choices, "choices", 0, INT32_MAX)


class Done(Message, tag="done", frozen=True):
    """Frontend → scheduler: the last byte has gone to the client; forget the request."""

    request: bytes

    def check(self, geometry: Geometry | None = None) -> None:
        _check_id(self.request)


class Attach(Message, tag="attach", frozen=True):
    """Frontend → scheduler: take over a dead frontend's request."""

    request: bytes
    handle: int

    def check(self, geometry: Geometry | None = None) -> None:
        _check_id(self.request)
        if not 0 <= self.handle <= INT32_MAX:
            raise BadMessage("handle", "is out of range")


class Resumed(Message, tag="resumed", frozen=True):
    """Frontend → scheduler, once per session: everything that lives has been named (`count` requests)."""

    count: int

    def check(self, geometry: Geometry | None = None) -> None:
        if self.count < 0:
            raise BadMessage("count", "is negative")


class Journal(Message, tag="journal", frozen=True):
    """Scheduler → frontend: the answer to ATTACH, the request with its known tokens and its new owner number."""

    submit: Submit

    def check(self, geometry: Geometry | None = None) -> None:
        self.submit.check(geometry)


class Gone(Message, tag="gone", frozen=True):
    """Scheduler → frontend: the answer to ATTACH of a request that nobody has."""

    request: bytes

    def check(self, geometry: Geometry | None = None) -> None:
        _check_id(self.request)


class Moved(Message, tag="moved", frozen=True):
    """Scheduler → frontend: another frontend owns this request now."""

    request: bytes

    def check(self, geometry: Geometry | None = None) -> None:
        _check_id(self.request)


class Failed(Message, tag="failed", frozen=True):
    """Scheduler → frontend: the request ends with this error. HTTP status, OpenAI-style code."""

    request: bytes
    status: int
    code: str
    reason: str
    param: str = ""
    retry_after: float = 0.0

    def check(self, geometry: Geometry | None = None) -> None:
        _check_id(self.request)


class Credit(Message, tag="credit", frozen=True):
    """Scheduler → frontend: a new credit limit in tokens."""

    limit: int


class Tokens(Message, tag="tokens", frozen=True):
    """Scheduler → frontend, one per step: token runs, one row per choice that got any.

    Row i adds counts[i] tokens to choice choices[i] of handles[i], the first of them at index firsts[i].
    Logprobs: a row's lp_counts entry says how many (id, value) pairs each of its tokens has, the sampled token's own
    first, then the alternatives from the most likely on; lp_ranks has one rank for each token that has pairs.
    """

    handles: bytes
    choices: bytes
    firsts: bytes
    counts: bytes
    ids: bytes
    lp_counts: bytes = b""  # empty: no row has logprobs
    lp_ids: bytes = b""
    lp_values: bytes = b""  # float32
    lp_ranks: bytes = b""
    admitted: bytes = b""  # handles admitted for the first time
    cached: bytes = b""  # their cached_tokens

    def check(self, geometry: Geometry | None = None) -> None:
        n = equal_rows(("handles", self.handles), ("choices", self.choices), ("firsts", self.firsts), ("counts", self.counts))
        counts = within(self.counts, "counts", 0, MAX_TOKENS_ANYWHERE)
        if int(counts.sum()) != rows(self.ids, "ids"):
            raise BadMessage("ids", "must be as many as counts say")
        within(self.choices, "choices", 0, INT32_MAX)
        within(self.firsts, "firsts", 0, MAX_TOKENS_ANYWHERE)
        equal_rows(("admitted", self.admitted), ("cached", self.cached))
        if self.lp_counts:
            if rows(self.lp_counts, "lp_counts") != n:
                raise BadMessage("lp_counts", "must be one per row")
            _check_logprobs(self.lp_counts, counts, self.lp_ids, self.lp_values, self.lp_ranks)


# ---------------------------------------------------------------- a step


class Admit(Part, frozen=True):
    """A choice that its worker has not met in this session: everything about it, sent once."""

    record: int
    prompt: bytes  # tokens
    known: bytes  # tokens sampled before
    seed: int
    params: SamplingParams


class Plan(Message, tag="plan", frozen=True):
    """Scheduler → worker: one step. Applied in the order of the fields; never depends on a sampled value.

    Rows: row i computes tokens starts[i] … starts[i] + counts[i] − 1 (absolute positions) of the record bound to
    slots[i], and samples at most outputs[i] tokens behind the last of them (0: a chunk that does not end its prefill).
    A position below the record's known length is read from its history, else it is the slot's last sampled token.
    Forks: the logits of row fork_rows[i] are sampled for slot fork_slots[i] as well.
    The outputs of a step are, in this order: the rows with outputs > 0, then the forks.
    """

    step: int
    # records and slots given up
    drops: bytes = b""  # records to forget
    frees: bytes = b""  # slots unbound
    # hashes: a sealed block is reported after a lost session, a withdrawn one is not
    seals: bytes = b""  # blocks
    seal_hashes: bytes = b""  # 16 bytes each
    withdrawals: bytes = b""  # blocks
    # new records, and slots bound to a record under a new generation (their tables start empty)
    admits: list[Admit] = []
    bind_slots: bytes = b""
    bind_generations: bytes = b""
    bind_records: bytes = b""
    # table[slot, index] = block; an assigned block will be written (its hash is forgotten), a shared one is only read
    assign_slots: bytes = b""
    assign_indices: bytes = b""
    assign_blocks: bytes = b""
    share_slots: bytes = b""
    share_indices: bytes = b""
    share_blocks: bytes = b""
    # copies, before the rows: device to device, device to host, host to device
    copy_from: bytes = b""
    copy_to: bytes = b""
    out_from: bytes = b""
    out_to: bytes = b""
    in_from: bytes = b""
    in_to: bytes = b""
    # the rows
    slots: bytes = b""
    generations: bytes = b""
    starts: bytes = b""
    counts: bytes = b""
    outputs: bytes = b""
    fork_rows: bytes = b""
    fork_slots: bytes = b""

    def check(self, geometry: Geometry | None = None) -> None:
        if geometry is None:
            raise BadMessage("plan", "arrived before the worker announced its geometry")
        g = geometry
        rows(self.drops, "drops")
        within(self.frees, "frees", 0, g.slots)
        if rows(self.seals, "seals") != rows(self.seal_hashes, "seal_hashes", 16):
            raise BadMessage("seal_hashes", "must be one per block")
        within(self.seals, "seals", 0, g.blocks)
        within(self.withdrawals, "withdrawals", 0, g.blocks)
        for admit in self.admits:
            if not rows(admit.prompt, "prompt"):
                raise BadMessage("prompt", "is empty")
            within(admit.prompt, "prompt", 0, g.vocab_size)
            rows(admit.known, "known")
            within(admit.known, "known", 0, g.vocab_size)
            if rows(admit.prompt, "prompt") + rows(admit.known, "known") > g.max_model_len:
                raise BadMessage("prompt", "is longer than max_model_len")
            _check_seed(admit.seed)
            admit.params.check(g.vocab_size)
        equal_rows(("bind_slots", self.bind_slots), ("bind_generations", self.bind_generations), ("bind_records", self.bind_records))
        within(self.bind_slots, "bind_slots", 0, g.slots)
        for kind in ("assign", "share"):
            named = [(f"{kind}_{part}", getattr(self, f"{kind}_{part}")) for part in ("slots", "indices", "blocks")]
            equal_rows(*named)
            for (field, column), high in zip(named, (g.slots, g.table_width, g.blocks), strict=True):
                within(column, field, 0, high)
        for field, high in (
            ("copy_from", g.blocks),
            ("copy_to", g.blocks),
            ("out_from", g.blocks),
            ("out_to", g.host_blocks),
            ("in_from", g.host_blocks),
            ("in_to", g.blocks),
        ):
            rows(getattr(self, field), field)
            within(getattr(self, field), field, 0, high)
        equal_rows(("copy_from", self.copy_from), ("copy_to", self.copy_to))
        equal_rows(("out_from", self.out_from), ("out_to", self.out_to))
        equal_rows(("in_from", self.in_from), ("in_to", self.in_to))
        n = equal_rows(
            ("slots", self.slots),
            ("generations", self.generations),
            ("starts", self.starts),
            ("counts", self.counts),
            ("outputs", self.outputs),
        )
        if n > g.slots:
            raise BadMessage("slots", "more rows than slots")
        within(self.slots, "slots", 0, g.slots)
        starts = within(self.starts, "starts", 0, g.max_model_len)
        counts = within(self.counts, "counts", 1, g.max_step_tokens + 1)
        if n and int((starts.astype(int64) + counts).max()) > g.max_model_len:
            raise BadMessage("counts", "reach beyond max_model_len")
        if n and int(counts.sum()) > g.max_step_tokens:
            raise BadMessage("counts", "sum to more than max_step_tokens")
        within(self.outputs, "outputs", 0, 2)
        equal_rows(("fork_rows", self.fork_rows), ("fork_slots", self.fork_slots))
        within(self.fork_rows, "fork_rows", 0, max(n, 1))
        within(self.fork_slots, "fork_slots", 0, g.slots)


STOPPED = 1  # flag of an output: a stop id ended the choice, the slot is dead
NAN = 2  # flag of an output: its logits held a NaN; no token
DEAD = 4  # flag of an output: its slot was dead already; no token


class Result(Message, tag="result", frozen=True):
    """Worker → scheduler: what a step sampled, one entry per output of its plan, in the plan's order."""

    step: int
    counts: bytes  # tokens per output
    ids: bytes  # tokens, flat
    flags: bytes  # uint8 per output: STOPPED, NAN, DEAD
    copied: int = 0  # swap copies of all steps up to this one are complete
    seconds: float = 0.0  # device time of the step
    idle: float = 0.0  # device time without work before it
    lp_counts: bytes = b""  # pairs per token of each output; empty: no output has logprobs
    lp_ids: bytes = b""
    lp_values: bytes = b""  # float32
    lp_ranks: bytes = b""

    def check(self, geometry: Geometry | None = None) -> None:
        n = rows(self.counts, "counts")
        if len(self.flags) != n:
            raise BadMessage("flags", "must be one per output")
        counts = within(self.counts, "counts", 0, 2)
        if int(counts.sum()) != rows(self.ids, "ids"):
            raise BadMessage("ids", "must be as many as counts say")
        if geometry is not None:
            within(self.ids, "ids", 0, geometry.vocab_size)
            if n > geometry.slots:
                raise BadMessage("counts", "more outputs than slots")
        if self.lp_counts:
            if rows(self.lp_counts, "lp_counts") != n:
                raise BadMessage("lp_counts", "must be one per output")
            _check_logprobs(self.lp_counts, counts, self.lp_ids, self.lp_values, self.lp_ranks)


class Progress(Message, tag="progress", frozen=True):
    """Worker → scheduler, while work is outstanding: a counter that moves as long as the step does."""

    step: int
    counter: int


def _check_id(request: bytes) -> None:
    if len(request) != 16:
        raise BadMessage("request", "must be 16 bytes")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise BadMessage("seed", "must have 64 bits")


def _check_logprobs(lp_counts: bytes, counts: Int32, ids: bytes, values: bytes, ranks: bytes) -> None:
    per_token = within(lp_counts, "lp_counts", 0, 1 << 16).astype(int64)
    pairs = int((per_token * counts).sum())
    if rows(ids, "lp_ids") != pairs or rows(values, "lp_values") != pairs:
        raise BadMessage("lp_ids", "must be as many as lp_counts say")
    if rows(ranks, "lp_ranks") != int(((per_token > 0) * counts).sum()):
        raise BadMessage("lp_ranks", "must be one per token with logprobs")


ToScheduler = Hello | Stale | Join | Phase | Ready | FileRequest | FileChunk | Submit | Abort | Done | Attach | Resumed | Result | Progress
FromScheduler = Welcome | Refused | Models | FileRequest | FileChunk | Journal | Gone | Moved | Failed | Credit | Tokens | Plan
Any = ToScheduler | FromScheduler
