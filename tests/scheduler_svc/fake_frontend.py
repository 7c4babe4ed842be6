"""A frontend that keeps journals and checks every token against the formulas."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.columns import pack, unpack, unpack_floats
from protocol.messages import (
    Abort,
    Attach,
    Choice,
    Done,
    Failed,
    Journal,
    Message,
    Models,
    Moved,
    PromptScores,
    Resumed,
    SamplingParams,
    Submit,
    Tokens,
)
from scheduler_svc.engine import Engine
from tests.scheduler_svc.formulas import STOP, digest, expected
from tests.scheduler_svc.wire import through


@dataclass
class Stream:
    """One request in its journal."""

    submit: Submit
    known: list[list[int]]
    ended: set[int] = field(default_factory=set)
    failed: Failed | None = None
    moved: bool = False
    cached: int = -1
    aborted: bool = False
    stopped: set[int] = field(default_factory=set)  # choices ended by a stop string
    scores: list[float] = field(default_factory=list)  # of the prompt
    scored: int = 1

    @property
    def complete(self) -> bool:
        wanted = len(self.submit.prompt) // 4 if self.submit.params.prompt_logprobs >= 0 else 0
        return len(self.ended) == len(self.known) and self.scored >= wanted


@dataclass
class FakeFrontend:
    """Journals tokens and derives ends, as the real one does."""

    engine: Engine
    session: int
    incarnation: int = 100
    streams: dict[int, Stream] = field(default_factory=dict)  # by handle
    handles: int = 0
    unacked: int = 0
    models: Models | None = None
    silent: bool = False  # takes nothing off its link

    def open(self, now: float) -> None:
        self.unacked = 0
        self.engine.frontend_opened(self.session, f"f{self.incarnation}", self.incarnation, now)

    def close(self, now: float) -> None:
        self.engine.frontend_closed(self.session, now)

    def submit(self, prompt: list[int], now: float, max_tokens: int = 10, n: int = 1, seed: int = 1, stop: bool = True, **more) -> Stream:
        self.handles += 1
        params = SamplingParams(max_tokens, stop_ids=pack([STOP]) if stop else b"", prompt_logprobs=more.pop("prompt_logprobs", -1))
        choices = [Choice(i, digest(seed, i)) for i in range(n)]
        id = digest("id", self.incarnation, self.handles).to_bytes(8, "little") * 2
        submit = Submit(id, self.handles, more.pop("model", "m"), pack(prompt), params, choices, **more)
        stream = self.streams[self.handles] = Stream(submit, [[] for _ in range(n)], ended=set() if max_tokens else set(range(n)))
        self.send(submit, now)
        return stream

    def resubmit(self, now: float) -> None:
        alive = [s for s in self.streams.values() if s.failed is None and not s.moved and not s.aborted and not s.complete]
        for stream in alive:
            old = stream.submit
            choices = [Choice(c.index, c.seed, pack(stream.known[c.index]), c.index in stream.ended) for c in old.choices]
            self.send(
                Submit(
                    old.request,
                    old.handle,
                    old.model,
                    old.prompt,
                    old.params,
                    choices,
                    old.owner,
                    True,
                    age=old.age,
                    cached=stream.cached,
                    priority=old.priority,
                    scored=stream.scored,
                ),
                now,
            )
        self.send(Resumed(len(alive)), now)

    def stop(self, stream: Stream, choice: int, now: float) -> None:
        """A stop string has been found."""
        stream.ended.add(choice)
        stream.stopped.add(choice)
        self.send(Abort(stream.submit.request, pack([choice])), now)
        if stream.complete:
            self.send(Done(stream.submit.request), now)

    def attach(self, request: bytes, now: float, told: tuple[int, ...] = ()) -> None:
        self.handles += 1
        self.send(Attach(request, self.handles, pack(told)), now)

    def journal(self, submit: Submit, now: float) -> None:
        stream = self.streams[submit.handle] = Stream(submit, [unpack(c.known).tolist() for c in submit.choices], cached=submit.cached)
        stream.stopped = {choice.index for choice in submit.choices if choice.ended}
        stream.scored = submit.scored
        for choice, known in zip(submit.choices, stream.known, strict=True):
            if choice.ended or len(known) == submit.params.max_tokens or (known and known[-1] in unpack(submit.params.stop_ids)):
                stream.ended.add(choice.index)
        if stream.complete:
            self.send(Done(submit.request), now)

    def abort(self, stream: Stream, now: float) -> None:
        stream.aborted = True
        self.send(Abort(stream.submit.request), now)
        self.send(Done(stream.submit.request), now)

    def newest(self, request: bytes) -> Stream:
        return [s for s in self.streams.values() if s.submit.request == request][-1]

    def send(self, message: Message, now: float) -> None:
        self.engine.frontend_message(self.session, through(message), now)

    def take(self, message: Message, now: float) -> None:
        match message:
            case Models():
                self.models = message
            case Failed():
                stream = self.newest(message.request)
                assert stream.failed is None, "a request ends twice"
                stream.failed = message
                self.send(Done(message.request), now)
            case Moved():
                self.newest(message.request).moved = True
            case Journal():
                self.journal(message.submit, now)
            case PromptScores():
                self.unacked += message.scores.count if self.silent else 0
                stream = self.streams[message.handle]
                assert message.scores.first == stream.scored, "log probabilities that were told, or a gap"
                assert len(message.scores.ids) // 4 == message.scores.count * (1 + stream.submit.params.prompt_logprobs)
                stream.scores += unpack_floats(message.scores.values)[:: 1 + stream.submit.params.prompt_logprobs].tolist()
                stream.scored += message.scores.count
                if stream.complete:
                    self.send(Done(stream.submit.request), now)
            case Tokens():
                self.unacked += len(unpack(message.ids)) if self.silent else 0
                at = 0
                named = (message.handles, message.choices, message.firsts, message.counts)
                ids = unpack(message.ids).tolist()
                for handle, cached in zip(unpack(message.admitted).tolist(), unpack(message.cached).tolist(), strict=True):
                    self.streams[handle].cached = cached
                for handle, choice, first, count in zip(*(unpack(c).tolist() for c in named), strict=True):
                    self.tokens(self.streams[handle], choice, first, ids[at : at + count], now)
                    at += count

    def tokens(self, stream: Stream, choice: int, first: int, ids: list[int], now: float) -> None:
        known = stream.known[choice]
        if choice in stream.ended or stream.aborted:
            return
        assert first <= len(known), "a gap in a stream"
        for token in ids[len(known) - first :]:
            known.append(token)
            params = stream.submit.params
            if len(known) == params.max_tokens or token in unpack(params.stop_ids).tolist():
                stream.ended.add(choice)
                break
        if stream.complete:
            self.send(Done(stream.submit.request), now)

    def verify(self) -> None:
        """Every committed token is the right one."""
        for stream in self.streams.values():
            submit = stream.submit
            for choice, known in zip(submit.choices, stream.known, strict=True):
                right = expected(unpack(submit.prompt).tolist(), choice.seed, submit.params.max_tokens, bool(submit.params.stop_ids))
                assert known == right[: len(known)], f"request {submit.handle} choice {choice.index} at {len(known)} tokens"
                if choice.index not in stream.stopped:
                    assert (choice.index in stream.ended) == (known == right)
