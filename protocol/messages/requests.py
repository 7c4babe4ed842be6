"""A request's life: between frontend and scheduler."""

from __future__ import annotations

from math import inf

from protocol.columns import BadMessage, equal_rows, finite, rows, unpack_floats, within
from protocol.messages.base import (
    INT32_MAX,
    MAX_TOKENS_ANYWHERE,
    Geometry,
    Message,
    Part,
    Scores,
    check_id,
    check_logprobs,
    check_seed,
    check_trace,
)

MAX_WORD = 64  # tokens of a bad word: a worker keeps as many of each sequence's last tokens
MAX_WORDS = 8192  # tokens of a request's bad words together


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
    prompt_logprobs: int = -1  # the same of each prompt token
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
        if any(rows(word, "bad_words") > MAX_WORD for word in self.bad_words):
            raise BadMessage("bad_words", f"a word has more than {MAX_WORD} tokens")
        if sum(map(len, self.bad_words)) > 4 * MAX_WORDS:
            raise BadMessage("bad_words", f"have more than {MAX_WORDS} tokens together")

    @property
    def size(self) -> int:
        """Bytes of its columns; what a message has of it beside them is small."""
        columns = (self.stop_ids, self.bias_ids, self.bias_values, self.allowed_ids, *self.bad_words, self.grammar)
        return sum(map(len, columns))


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
    scored: int = 1  # the first prompt position whose log probabilities the journal lacks, where they are asked for
    trace: str = ""  # traceparent of the request's span (W3C), if somebody traces it

    def check(self, geometry: Geometry | None = None) -> None:
        check_id(self.request)
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
            check_seed(choice.seed)
        check_trace(self.trace)
        if not 1 <= self.scored <= MAX_TOKENS_ANYWHERE:
            raise BadMessage("scored", "is out of range")
        self.params.check()


class Abort(Message, tag="abort", frozen=True):
    """Frontend → scheduler: stop these choices (none listed: all). Unknown ids are a no-op, counted."""

    request: bytes
    choices: bytes = b""

    def check(self, geometry: Geometry | None = None) -> None:
        check_id(self.request)
        within(self.choices, "choices", 0, INT32_MAX)


class Done(Message, tag="done", frozen=True):
    """Frontend → scheduler: the last byte has gone to the client; forget the request."""

    request: bytes

    def check(self, geometry: Geometry | None = None) -> None:
        check_id(self.request)


class Attach(Message, tag="attach", frozen=True):
    """Frontend → scheduler: take over a dead frontend's request."""

    request: bytes
    handle: int
    told: bytes = b""  # per choice, the tokens that its client has: log probabilities are wanted from there on
    tenant: str = ""  # must be the request's own

    def check(self, geometry: Geometry | None = None) -> None:
        check_id(self.request)
        if not 0 <= self.handle <= INT32_MAX:
            raise BadMessage("handle", "is out of range")
        within(self.told, "told", 0, MAX_TOKENS_ANYWHERE)


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
        check_id(self.request)


class Moved(Message, tag="moved", frozen=True):
    """Scheduler → frontend: another frontend owns this request now."""

    request: bytes

    def check(self, geometry: Geometry | None = None) -> None:
        check_id(self.request)


class Failed(Message, tag="failed", frozen=True):
    """Scheduler → frontend: the request ends with this error. HTTP status, OpenAI-style code."""

    request: bytes
    status: int
    code: str
    reason: str
    param: str = ""
    retry_after: float = 0.0

    def check(self, geometry: Geometry | None = None) -> None:
        check_id(self.request)


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
    queued: bytes = b""  # float32, seconds from their submission to the first plan that runs them. Since protocol 3

    def check(self, geometry: Geometry | None = None) -> None:
        n = equal_rows(("handles", self.handles), ("choices", self.choices), ("firsts", self.firsts), ("counts", self.counts))
        counts = within(self.counts, "counts", 0, MAX_TOKENS_ANYWHERE)
        if int(counts.sum()) != rows(self.ids, "ids"):
            raise BadMessage("ids", "must be as many as counts say")
        within(self.choices, "choices", 0, INT32_MAX)
        within(self.firsts, "firsts", 0, MAX_TOKENS_ANYWHERE)
        equal_rows(("admitted", self.admitted), ("cached", self.cached))
        if self.queued:
            equal_rows(("admitted", self.admitted), ("queued", self.queued))
        if self.lp_counts:
            if rows(self.lp_counts, "lp_counts") != n:
                raise BadMessage("lp_counts", "must be one per row")
            check_logprobs(self.lp_counts, counts, self.lp_ids, self.lp_values, self.lp_ranks)


class PromptScores(Message, tag="prompt_scores", frozen=True):
    """Scheduler → frontend: log probabilities of a request's prompt, in the order of the positions. Since protocol 3."""

    handle: int
    scores: Scores

    def check(self, geometry: Geometry | None = None) -> None:
        if not 0 <= self.handle <= INT32_MAX:
            raise BadMessage("handle", "is out of range")
        self.scores.check()
