"""The clients of a run: what they ask, where they go on when their frontend is gone, and what each of them must get."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from frontend.entries import Entry, NewRequest
from frontend.stops import StopMatcher
from gpu_worker.oracle import expected, expected_prompt_logprobs
from protocol.columns import pack, unpack
from protocol.messages import SamplingParams, Submit
from protocol.times import Times
from tests.simulation.broken import ENDING, STREAM, Broken
from tests.simulation.clock import Clock
from tests.simulation.frontend_node import FrontendNode
from tests.simulation.mixes import Mix

if TYPE_CHECKING:
    from scheduler_svc.engine import Engine

EOS = 256
MOST_CHOICES = 3  # of a request
POISON = 7  # a token id that no oracle stream holds


class Letters:
    """Text of a choice, a character for each token, up to its stop string."""

    def __init__(self, stop: str) -> None:
        self._matcher = StopMatcher([stop])
        self.text_length = 0

    @property
    def stop(self) -> str | None:
        return self._matcher.stop

    def push(self, token: int) -> str:
        return self._released(self._matcher.push(chr(token)))

    def flush(self) -> str:
        return self._released(self._matcher.flush())

    def _released(self, text: str) -> str:
        self.text_length += len(text)
        return text


def with_stop(new: NewRequest, stop: str) -> NewRequest:
    """The request with a stop string, which other frontends find in its header."""
    return replace(new, open_text=lambda: Letters(stop), has_stop_strings=True, header=stop.encode()) if stop else new


def revive(submit: Submit) -> NewRequest:
    """Another frontend's request as one of ours."""
    new = NewRequest(
        submit.request, submit.model, submit.prompt, submit.params, [c.seed for c in submit.choices], cache_salt=submit.cache_salt
    )
    return with_stop(new, submit.header.decode())


@dataclass
class Owed:
    """What one choice must be."""

    tokens: list[int]
    reason: str
    text: str


@dataclass
class Client:
    """What one client asked for, what it should get, and what it has seen."""

    new: NewRequest
    owed: list[Owed]
    poisoned: bool
    entry: Entry
    frontend: FrontendNode
    ended: int = 0
    told: list[int] = field(default_factory=list)  # tokens of each choice that frontends before this one have told it
    # while it asks another frontend for the rest:
    source: FrontendNode | None = None  # who has its journal, if that one lives
    source_entry: Entry | None = None
    copies: list[Engine] = field(default_factory=list)  # who knew the request when its frontend died
    left_at: float = 0.0
    excused: bool = False  # nobody need know it any more: it left a living frontend, or that one was cut off for too long


class Clients:
    """All clients of a run. `frontends` and `engines` give those in service, `rng` draws whatever is random."""

    def __init__(self, world: Any, rng: random.Random, mix: Mix, clock: Clock, times: Times) -> None:
        self._world = world
        self._rng = rng
        self._mix = mix
        self._clock = clock
        self._times = times
        self.all: list[Client] = []
        self.resumed = 0  # streams that went on at another frontend
        self.gone = 0  # streams that nobody knew any more, and rightly so
        self._asked: dict[int, Client] = {}  # by entry

    @property
    def waiting(self) -> list[Client]:
        """Those without an answer."""
        return [client for client in self.all if not client.ended]

    # ------------------------------------------------------------ asking

    def submit(self, i: int) -> None:
        """The i-th request."""
        rng, mix = self._rng, self._mix
        poisoned = bool(mix.poison) and mix.poison != "nan_once" and i % 8 == 3
        prefix = [97 + i % mix.prefixes] * rng.choice(mix.prefix)
        prompt = prefix + [rng.randrange(97, 123) for _ in range(rng.randrange(1, 30))]
        if poisoned:
            prompt[rng.randrange(len(prompt))] = POISON
        n = rng.randint(2, MOST_CHOICES) if rng.random() < mix.forks else 1
        params = SamplingParams(
            max_tokens=rng.randrange(1, 80 - len(prompt) if len(prompt) > 41 else 40),
            temperature=rng.choice((0.0, 1.0)),
            min_tokens=rng.choice((0, 0, 5)),
            stop_ids=pack([EOS] if rng.random() < 0.7 else []),
            logprobs=rng.choice((-1, -1, 2)),
        )
        if mix.scoring and i % 4 == 3:
            params = _changed(params, prompt_logprobs=i % 3, max_tokens=0 if i % 16 in (7, 11) else params.max_tokens)
        params = _changed(params, min_tokens=min(params.min_tokens, params.max_tokens))
        seeds = [rng.getrandbits(64) for _ in range(n)]
        streams = [
            expected(prompt, seed, params.max_tokens, [EOS] if params.stop_ids else [], params.min_tokens, temperature=params.temperature)
            for seed in seeds
        ]
        stop = ""
        if rng.random() < mix.stops and len(streams[0]) > 3:
            at = rng.randrange(len(streams[0]) - 2)
            stop = "".join(map(chr, streams[0][at : at + 2]))
        new = with_stop(NewRequest(rng.getrandbits(128).to_bytes(16, "little"), "oracle", pack(prompt), params, seeds), stop)
        owed = [_owed(stream, bool(params.stop_ids), stop) for stream in streams]
        leaves_at = self._clock.now + rng.uniform(0.0, 1.0) if rng.random() < mix.leaving else float("inf")

        def submit(node: FrontendNode) -> None:
            if not node.alive:
                node = self._choose()
            if self._clock.now < node.paused_until:
                self._clock.at(node.paused_until, lambda: submit(node))
                return
            client = Client(new, owed, poisoned, node.submit(new), node, told=[0] * n)
            self._enter(client)
            if leaves_at < float("inf"):
                self._clock.at(leaves_at, lambda: client.frontend.run(lambda: self._leave(client)))

        submit(self._choose())

    def _choose(self, but: FrontendNode | None = None) -> FrontendNode:
        return self._rng.choice([node for node in self._world.frontends.values() if node.alive and not node.closed and node is not but])

    def _enter(self, client: Client) -> None:
        if client not in self.all:
            self.all.append(client)
        self._asked[id(client.entry)] = client
        self.touched(client.frontend, client.entry)  # it may have ended on the spot

    def _leave(self, client: Client) -> None:
        if not client.ended:
            client.ended += 1
            self._forget(client.frontend, client.entry)

    def _forget(self, node: FrontendNode, entry: Entry) -> None:
        self._asked.pop(id(entry), None)
        node.journal.done(entry, self._clock.now)
        node.turn()

    # ------------------------------------------------------------ going on elsewhere

    def frontend_died(self, node: FrontendNode, engines: list[Engine]) -> None:
        """A frontend's process has ended, while these schedulers ran: its clients come back at others, in their time."""
        for client in self.waiting:
            here = client.frontend is node
            if client.source is node or (here and client.source is None):
                client.copies = [engine for engine in engines if client.new.request in engine.ledger.requests]
                client.source, client.left_at = None, self._clock.now
            if here and self._asked.pop(id(client.entry), None) is not None:  # else it is on its way already
                self._clock.after(self._rng.uniform(0.0, 1.0), lambda client=client: self._come_back(client))  # type: ignore[misc]

    def move(self) -> None:
        """A client's connection breaks, which its frontend notices later; the client goes on at another one."""
        streaming = [c for c in self._asked.values() if c.frontend.alive and not c.entry.attaching and any(_told(c))]
        if not streaming or len([node for node in self._world.frontends.values() if node.alive and not node.closed]) < 2:
            return
        client = self._rng.choice(streaming)
        node, entry = client.frontend, client.entry
        del self._asked[id(entry)]
        client.told = _told(client)
        client.source, client.source_entry, client.left_at = node, entry, self._clock.now

        def notice() -> None:
            self._given_up(entry)
            node.journal.done(entry, self._clock.now)
            node.turn()

        self._clock.after(self._rng.uniform(0.0, 1.5), lambda: node.run(notice))
        self._attach(client, self._choose(but=node))

    def _given_up(self, entry: Entry) -> None:
        """A frontend that lives is done with a request whose client has left it: too late to take it up elsewhere."""
        for client in self.waiting:
            if client.source_entry is entry and not entry.moved and client.entry.attaching:
                client.excused = True

    def cut_off(self, node: FrontendNode, seconds: float) -> None:
        """Nobody hears of a frontend for so long: what its clients left there may be given up as if it were dead."""
        if seconds + 1.0 >= self._times.grace:
            for client in self.waiting:
                if client.source is node or client.frontend is node:
                    client.excused = True

    def _come_back(self, client: Client) -> None:
        """A client whose frontend died asks another one: for the rest, or, having seen nothing, for all of it."""
        if client.ended:
            return
        client.told = _told(client)
        if any(client.told):
            self._attach(client, self._choose())
        else:
            client.new = replace(client.new, request=self._rng.getrandbits(128).to_bytes(16, "little"))
            client.frontend = self._choose()
            client.source, client.copies = None, []
            client.entry = client.frontend.submit(client.new)
            self._enter(client)

    def _attach(self, client: Client, node: FrontendNode) -> None:
        if client.new.request in node.journal._by_id:  # it has not noticed yet that the client left it: 409
            client.excused = True
            self._clock.after(0.2, lambda: self._come_back(client))
            return
        self.resumed += 1
        client.frontend = node
        client.entry = node.attach(client.new.request, client.told)
        self._enter(client)

    # ------------------------------------------------------------ judging

    def touched(self, node: FrontendNode, entry: Entry) -> None:
        """A journal has news of an entry. Raises Broken."""
        client = self._asked.get(id(entry))
        if client is None or client.entry is not entry:
            if entry.ended:  # its client has gone elsewhere
                self._given_up(entry)
                node.journal.done(entry, self._clock.now)
            return
        if entry.attaching:
            return
        if not entry.error:
            client.source = client.source_entry = None
        name = entry.request.hex()[:8]
        for choice, told in zip(entry.choices, client.told, strict=bool(entry.choices)):
            if len(choice.tokens) < told:
                raise Broken(STREAM, f"choice {choice.index} of {name} has {len(choice.tokens)} tokens, {told} were told")
        for choice, owed in zip(entry.choices, client.owed, strict=bool(entry.choices)):
            if choice.tokens != owed.tokens[: len(choice.tokens)]:
                raise Broken(STREAM, f"choice {choice.index} of {name}: {choice.tokens} is no beginning of {owed.tokens}")
        self._check_scores(client)
        if entry.ended:
            client.ended += 1
            if client.ended > 1:
                raise Broken(ENDING, f"{name} ended twice")
            self._judge(client, name)
            self._asked.pop(id(entry))
            node.journal.done(entry, self._clock.now)

    def _check_scores(self, client: Client) -> None:
        entry, params = client.entry, client.new.params
        if params.prompt_logprobs >= 0 and entry.error is None:
            owed = expected_prompt_logprobs(unpack(client.new.prompt).tolist(), params.prompt_logprobs)
            had = [list(zip(one.ids, one.values, strict=True)) for one in entry.scores]
            about = f"log probabilities of {entry.request.hex()[:8]}'s prompt"
            if had != owed[entry.scored - 1 - len(had) : entry.scored - 1]:
                raise Broken(STREAM, f"{about}: {had} do not end before position {entry.scored} of {owed}")
            if len(had) < entry.scored - 1 and not any(client.told):
                raise Broken(STREAM, f"{about}: some are missing that nobody has told")

    def _judge(self, client: Client, name: str) -> None:
        entry, poison = client.entry, self._mix.poison
        if client.poisoned:
            if poison == "nan" and entry.error is None and client.new.params.max_tokens:
                raise Broken(ENDING, "a request that computes NaN ended well")
            return
        if entry.error is not None:
            self._judge_error(client, name)
            return
        for choice, owed in zip(entry.choices, client.owed, strict=True):
            if choice.tokens != owed.tokens:
                raise Broken(STREAM, f"choice {choice.index} of {name} ended at {len(choice.tokens)} of {len(owed.tokens)} tokens")
            if choice.finish_reason != owed.reason:
                raise Broken(ENDING, f"choice {choice.index} of {name} ended by {choice.finish_reason}, not {owed.reason}")
            if choice.text is not None and choice.fresh != owed.text:
                raise Broken(STREAM, f"choice {choice.index} of {name}: {choice.fresh!r}, not {owed.text!r}")

    def _judge_error(self, client: Client, name: str) -> None:
        error = client.entry.error
        assert error is not None
        if error.code == "stream_gone" and self._may_be_gone(client):
            self.gone += 1
        elif error.code != "nan" or not any(node.spoilt.intersection(client.new.seeds) for node in self._world.workers.values()):
            raise Broken(ENDING, f"{name} failed: {error}")

    def _may_be_gone(self, client: Client) -> bool:
        """Whether everybody who must know the request has died with its frontend, or given it up in due time."""
        if client.excused or self._clock.now >= client.left_at + self._times.grace:
            return True
        return client.source is None and not any(self._world.in_charge(engine) for engine in client.copies)


def _told(client: Client) -> list[int]:
    """Tokens of each choice that the client has."""
    entry = client.entry
    if not entry.choices or entry.unscored:  # that frontend had nothing to tell
        return client.told
    return [max(len(choice.tokens), told) for choice, told in zip(entry.choices, client.told, strict=True)]


def _owed(stream: list[int], ends: bool, stop: str) -> Owed:
    """What a stream is to its client: up to its stop string, stop id or length."""
    shown = stream[:-1] if ends and stream[-1:] == [EOS] else stream
    text = "".join(map(chr, shown))
    at = text.find(stop) if stop else -1
    if at >= 0:
        return Owed(stream[: at + len(stop)], "stop", text[:at])
    return Owed(stream, "stop" if len(shown) < len(stream) else "length", text)


def _changed(params: SamplingParams, **changes: object) -> SamplingParams:
    return msgspec.structs.replace(params, **changes)
