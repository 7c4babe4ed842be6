"""What the journal holds of each request: its committed tokens, its text, and how each choice ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from frontend.measures import ELSEWHERE, Measures
from protocol.columns import pack, unpack
from protocol.messages import Attach, Failed, SamplingParams, Submit
from protocol.messages import Choice as WireChoice


class Text(Protocol):
    """The incremental detokenizer of one choice (`detokenizer.TextStream`)."""

    @property
    def stop(self) -> str | None:
        """The stop string that was found; the text is cut there."""

    @property
    def text_length(self) -> int:
        """Characters released so far."""

    def push(self, token: int) -> str:
        """Take the next token; return the text that may be shown now."""

    def flush(self) -> str:
        """Return what is still withheld, at the end of the choice."""


class TokenLogprobs(NamedTuple):
    """Of one token: (id, log probability) pairs, the sampled token's own first, and the rank of the sampled token."""

    ids: list[int]
    values: list[float]
    rank: int


@dataclass(frozen=True)
class NewRequest:
    """A request as the API hands it to the journal. Entropy (`request`, `seeds`) is drawn by the caller.

    `open_text` makes a fresh detokenizer of a choice; None: the tokens' text is not wanted (simulations).
    """

    request: bytes  # 16 bytes
    model: str
    prompt: bytes  # packed tokens
    params: SamplingParams
    seeds: Sequence[int]  # 64 bits each, one per choice
    open_text: Callable[[], Text] | None = None
    has_stop_strings: bool = False
    show_stop_ids: bool = False  # whether the text of a stop id belongs to the output
    every_step: bool = True  # whether its listener wants each step's tokens, or the end only
    deadline: float = 0.0  # seconds it may wait for admission; 0: no limit
    priority: int = 0
    tenant: str = ""
    cache_salt: bytes = b""
    header: bytes = b""
    trace: str = ""  # traceparent of its span, if it is traced


class Choice:
    """One output. Only here it is decided where a choice ends: the lowest index wins, and at one index a stop string
    beats a stop id beats length (DESIGN §1)."""

    __slots__ = (
        "_max",
        "_new",
        "_stop_ids",
        "at",
        "finish_reason",
        "fresh",
        "fresh_logprobs",
        "index",
        "seed",
        "stop_reason",
        "taken",
        "text",
        "tokens",
    )

    def __init__(self, index: int, new: NewRequest, stop_ids: frozenset[int]) -> None:
        self.index = index
        self.seed = new.seeds[index]
        self.tokens: list[int] = []  # committed: never changed, only appended to
        self.text = new.open_text() if new.open_text is not None else None
        self.finish_reason = ""  # "stop", "length", "abort", "error"; empty while it goes on
        self.stop_reason: str | int | None = None  # the stop string or stop id that ended it
        self.fresh = ""  # text not yet taken by the listener
        self.fresh_logprobs: list[TokenLogprobs] = []
        self.taken = 0  # tokens that the listener has taken
        self.at = 0.0  # when its last token came
        self._new = new
        self._stop_ids = stop_ids
        self._max = new.params.max_tokens

    @property
    def characters(self) -> int:
        """Characters of text released so far."""
        return self.text.text_length if self.text is not None else 0

    def take(self) -> str:
        """Return the text released since the last call."""
        fresh, self.fresh = self.fresh, ""
        self.taken = len(self.tokens)
        return fresh

    def skip(self, tokens: int, characters: int) -> None:
        """The listener has so much already, from another frontend."""
        self.fresh, self.taken = self.fresh[characters:], tokens

    def take_tokens(self, count: int) -> None:
        """Take so many tokens, and none of the text yet."""
        self.taken += count

    def take_logprobs(self) -> list[TokenLogprobs]:
        """Return the log probabilities of the tokens taken since the last call."""
        told = max(len(self.fresh_logprobs) - (len(self.tokens) - self.taken), 0)
        fresh, self.fresh_logprobs = self.fresh_logprobs[:told], self.fresh_logprobs[told:]
        return fresh

    def commit(self, token: int) -> None:
        """Append a token and derive whether the choice ends with it. Must not be called after the end."""
        tokens = self.tokens
        tokens.append(token)
        length = len(tokens)
        stopped = token in self._stop_ids and length > self._new.params.min_tokens
        text = self.text
        if text is not None and (not stopped or self._new.show_stop_ids or self._completes_stop_string()):
            self.fresh += text.push(token)
            if text.stop is not None:
                self.finish_reason, self.stop_reason = "stop", text.stop
                return
        if stopped:
            self._end("stop", token)
        elif length >= self._max:
            self._end("length", None)

    def extend(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Commit tokens until one ends the choice; `logprobs` holds one for each of them, or none at all."""
        for at, token in enumerate(tokens):
            if logprobs:
                self.fresh_logprobs.append(logprobs[at])
            self.commit(token)
            if self.finish_reason:
                return

    def end(self, reason: str) -> None:
        """End the choice for a reason outside its tokens ("abort", "error")."""
        self._end(reason, None)

    def _end(self, reason: str, stop_reason: int | None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self.text is not None:
            self.fresh += self.text.flush()
            if self.text.stop is not None:  # it lay in the text that was still withheld
                self.finish_reason, self.stop_reason = "stop", self.text.stop

    def _completes_stop_string(self) -> bool:
        """Whether the last token, a stop id whose text is not shown, would complete a stop string, which beats it."""
        if not self._new.has_stop_strings or self._new.open_text is None:
            return False
        probe = self._new.open_text()
        for token in self.tokens:
            probe.push(token)
        return probe.stop is not None


class Entry:
    """One request in the journal, from its submission until its last byte has gone to the client."""

    def __init__(self, new: NewRequest, handle: int, now: float, measures: Measures) -> None:
        self.handle = handle
        self.request = new.request
        self.measures = measures  # of its model
        self.submitted = now
        self.arrived = now  # when the client began to ask, if that is known
        self.first_token = 0.0  # when the first one came; 0: not yet; −1: to another frontend
        self.queued = -1.0  # seconds until the first plan that ran it; −1: not known
        self.owner = 0
        self.admitted = False
        self.cached = -1  # prompt tokens found in the prefix cache at the first admission; −1: not yet admitted
        self.error: Failed | None = None
        self.moved = False  # another frontend answers it now
        self.finished = False  # the client has everything, or has gone
        self.attaching: Attach | None = None  # asked for with this, not yet answered
        self.put_off = False  # answered, but could not be revived yet: to be asked for once more
        self.listener: object = None  # the shell's: whom to wake
        self.span: object = None  # the shell's: the span of a request that it traces
        self.choices: list[Choice] = []
        self.unfinished = 0
        self.scores: list[TokenLogprobs] = []  # of the prompt's tokens, the first left out; committed like tokens
        self.scored = 1  # the first prompt position that `scores` lacks (an adopted request begins where its client is)
        self.fill(new)

    def fill(self, new: NewRequest) -> None:
        """Take the request's contents (again, when the answer to an ATTACH brings them)."""
        stop_ids = frozenset(unpack(new.params.stop_ids).tolist())
        self.new = new
        self.prompt_tokens = len(new.prompt) // 4
        self.choices = [Choice(index, new, stop_ids) for index in range(len(new.seeds))]
        if not new.params.max_tokens:
            for choice in self.choices:
                choice.end("length")
        self.unfinished = sum(not choice.finish_reason for choice in self.choices)
        self._to_score = self.prompt_tokens if new.params.prompt_logprobs >= 0 else 0

    def adopt(self, new: NewRequest, submit: Submit, measures: Measures, now: float) -> list[Choice]:
        """Take over the request from another frontend, as its SUBMIT tells it. Returns the choices that end with that."""
        self.fill(new)
        self.attaching, self.put_off = None, False
        self.measures = measures
        self.owner = submit.owner
        self.admitted = submit.admitted
        self.cached = submit.cached
        self.scored = submit.scored
        self.submitted = self.arrived = now - submit.age
        ended: list[Choice] = []
        for choice, wire in zip(self.choices, submit.choices, strict=True):
            known = unpack(wire.known).tolist()
            if known and not choice.finish_reason:
                choice.extend(known)
                choice.at, self.first_token = now, ELSEWHERE
                if choice.finish_reason:
                    ended.append(choice)
        return ended

    def came(self, choice: Choice, before: int, now: float) -> None:
        """Note the time of a choice's tokens behind the first `before`."""
        measures = self.measures
        measures.tokens += len(choice.tokens) - before
        if before:
            measures.gaps[choice.at] = measures.gaps.get(choice.at, 0) + 1
        elif not self.first_token:
            self.first_token = now
            measures.begun(self, now)
        choice.at = now

    @property
    def unscored(self) -> bool:
        """Whether log probabilities of the prompt are still to come. They are told before anything else."""
        return self.scored < self._to_score

    @property
    def ended(self) -> bool:
        """Whether every choice has ended and the prompt has its log probabilities, or the request failed or moved."""
        return not (self.unfinished or self.attaching or self.unscored)

    @property
    def endings(self) -> list[str]:
        """How each choice is to be counted once the request is over. One that is told as failed, or whose prompt never
        got its log probabilities, has brought no choice to its end, whatever its tokens say."""
        if self.error is not None:
            return ["error"] * len(self.choices)
        return ["abort" if self.unscored else choice.finish_reason or "abort" for choice in self.choices]

    def finish(self, reason: str) -> None:
        """End all choices that go on, and wait for nothing more."""
        for choice in self.choices:
            if not choice.finish_reason:
                choice.end(reason)
        self.unfinished = self._to_score = 0
        self.attaching = None

    def submit(self, now: float) -> Submit:
        """The SUBMIT that makes a scheduler go on from here, whether or not it ever met the request."""
        new = self.new
        return Submit(
            request=self.request,
            handle=self.handle,
            model=new.model,
            prompt=new.prompt,
            params=new.params,
            choices=[WireChoice(c.index, c.seed, pack(c.tokens), bool(c.finish_reason)) for c in self.choices],
            owner=self.owner,
            admitted=self.admitted,
            age=now - self.submitted,
            deadline=0.0 if self.admitted or not new.deadline else max(self.submitted + new.deadline - now, 1e-3),
            priority=new.priority,
            tenant=new.tenant,
            cache_salt=new.cache_salt,
            cached=self.cached,
            header=new.header,
            trace=new.trace,
            scored=self.scored,
        )
