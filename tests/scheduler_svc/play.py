"""A worker and a frontend for the engine to play with: every message is encoded, decoded and checked on its way.

The worker is KV-faithful: a block holds, per offset, a hash of the whole prefix up to there, written through the table
it was sent; what it samples depends on everything stored along the table. A stale plan, a block given away too early
or a wrong table changes the output.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from protocol.codec import decode, encode
from protocol.columns import pack, pack_floats, unpack, unpack_floats
from protocol.counters import Counters
from protocol.messages import (
    DEAD,
    NAN,
    STOPPED,
    Abort,
    Attach,
    Choice,
    Done,
    Failed,
    Geometry,
    Hello,
    Journal,
    Message,
    Models,
    Moved,
    Plan,
    PromptScores,
    Ready,
    Result,
    Resumed,
    SamplingParams,
    Scored,
    Scores,
    Submit,
    Tokens,
)
from protocol.times import Times
from scheduler_svc.engine import Engine
from scheduler_svc.settings import SchedulerSettings

VOCABULARY = 64
STOP = 63
TOKENIZER = b"t" * 16


def digest(*parts: object) -> int:
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def prefix(before: int, token: int) -> int:
    return digest(before, token)


def sample(seed: int, position: int, before: int) -> int:
    return digest("draw", seed, position, before) % VOCABULARY


def likelihood(before: int) -> float:
    return -float(digest("likelihood", before) % 1024)


def expected_scores(prompt: list[int]) -> list[float]:
    """What is told of each prompt token but the first, computed without blocks."""
    state, told = 0, []
    for token in prompt:
        told.append(likelihood(state))
        state = prefix(state, token)
    return told[1:]


def expected(prompt: list[int], seed: int, max_tokens: int, stop: bool = True) -> list[int]:
    """The stream of a choice, computed without blocks."""
    state = 0
    for token in prompt:
        state = prefix(state, token)
    out: list[int] = []
    while len(out) < max_tokens:
        out.append(sample(seed, len(prompt) + len(out), state))
        if stop and out[-1] == STOP:
            break
        state = prefix(state, out[-1])
    return out


@dataclass
class Slot:
    record: int
    generation: int
    table: list[int | None]
    last: int = -1
    dead: bool = False


@dataclass
class FakeWorker:
    """Applies plans in order; `step()` runs the oldest one and returns its result."""

    engine: Engine
    geometry: Geometry
    session: int
    model: str = "m"
    incarnation: int = 1
    fingerprint: bytes = b"f"
    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    hashes: dict[int, bytes] = field(default_factory=dict)  # sealed
    host: dict[tuple[int, int], int] = field(default_factory=dict)  # KV in host memory
    host_hashes: dict[int, bytes] = field(default_factory=dict)  # of copies that are acknowledged
    leaving: deque[tuple[int, dict[int, bytes]]] = field(default_factory=deque)  # step, hashes of host blocks copied in it
    nan_tokens: set[int] = field(default_factory=set)
    plans: deque[Plan] = field(default_factory=deque)
    written: int = 0  # tokens computed
    lag: int = 0  # steps by which copies are acknowledged late

    def open(self, now: float, failed_session: int = 0, failed_step: int = 0) -> None:
        hello = Hello("worker", f"w{self.incarnation}", self.incarnation, 1, failed_session=failed_session, failed_step=failed_step)
        self.records: dict[int, list] = {}
        self.slots: dict[int, Slot] = {}
        self.plans.clear()
        self.leaving.clear()
        self.engine.worker_opened(self.session, hello, now)

    def ready(self, now: float) -> None:
        sealed = {
            "blocks": pack(self.hashes),
            "hashes": b"".join(self.hashes.values()),
            "host_blocks": pack(self.host_hashes),
            "host_hashes": b"".join(self.host_hashes.values()),
        }
        ready = Ready(self.model, self.fingerprint, self.geometry, "none", pack([STOP]), tokenizer=TOKENIZER, **sealed)
        self.engine.worker_message(self.session, through(ready), now)

    def close(self, now: float) -> None:
        self.engine.worker_closed(self.session, "lost", now)
        self.slots.clear()
        self.plans.clear()

    def step(self, now: float) -> None:
        result = self.run(self.plans.popleft())
        for message in (*self.scored, result):
            self.engine.worker_message(self.session, through(message, self.geometry), now)

    def run(self, plan: Plan) -> Result:
        for record in unpack(plan.drops).tolist():
            del self.records[record]
        for slot in unpack(plan.frees).tolist():
            del self.slots[slot]
        for i, block in enumerate(unpack(plan.seals).tolist()):
            self.hashes[block] = plan.seal_hashes[16 * i : 16 * i + 16]
        for block in unpack(plan.withdrawals).tolist():
            withdrawn = self.hashes.pop(block, None)
            for names in (self.host_hashes, *(names for _, names in self.leaving)):
                for host in [host for host, name in names.items() if name == withdrawn]:
                    del names[host]
        for admit in plan.admits:
            assert admit.record not in self.records
            tokens = unpack(admit.prompt).tolist() + unpack(admit.known).tolist()
            self.records[admit.record] = [tokens, admit.seed, admit.params, len(unpack(admit.prompt))]
        for slot, generation, record in zip(*columns(plan, "bind", "slots generations records"), strict=True):
            assert slot not in self.slots, "a bound slot is bound again"
            assert record in self.records
            self.slots[slot] = Slot(record, generation, [None] * self.geometry.table_width)
        for kind in ("share", "assign"):
            for slot, index, block in zip(*columns(plan, kind, "slots indices blocks"), strict=True):
                assert self.slots[slot].table[index] is None, "an entry of a table is written twice"
                self.slots[slot].table[index] = block
                if kind == "assign":
                    self.hashes.pop(block, None)
        assigned = unpack(plan.assign_blocks).tolist()
        assert len(set(assigned)) == len(assigned), "a block has two writers"
        for source, target in zip(unpack(plan.copy_from).tolist(), unpack(plan.copy_to).tolist(), strict=True):
            for offset in range(self.geometry.block_size):
                self.kv[target, offset] = self.kv.get((source, offset), -1)
            self.hashes.pop(target, None)
        for target in unpack(plan.out_to).tolist():
            for offset in range(self.geometry.block_size):  # as early as a worker may; the end comes behind the rows
                self.host.pop((target, offset), None)
        for source, target in zip(unpack(plan.in_from).tolist(), unpack(plan.in_to).tolist(), strict=True):
            assert target in assigned, "a block that is copied back has not been assigned"
            for offset in range(self.geometry.block_size):
                self.kv[target, offset] = self.host.get((source, offset), -1)
        outputs = []
        rows: list[tuple[int, int, int]] = []
        self.scored: list[Scored] = []
        scores = unpack(plan.scores).tolist()
        named = (plan.slots, plan.generations, plan.starts, plan.counts, plan.outputs)
        for slot, generation, start, count, output in zip(*(unpack(c).tolist() for c in named), strict=True):
            bound = self.slots[slot]
            assert bound.generation == generation
            rows.append((slot, start + count, self.compute(bound, start, count)))
            if output:
                outputs.append(rows[-1])
            if scores and scores[len(rows) - 1]:
                self.scored += self.score(plan.step, len(rows) - 1, bound, scores[len(rows) - 1], start + count)
        for row, slot in zip(unpack(plan.fork_rows).tolist(), unpack(plan.fork_slots).tolist(), strict=True):
            outputs.append((slot, rows[row][1], rows[row][2]))
        for source, target in zip(unpack(plan.out_from).tolist(), unpack(plan.out_to).tolist(), strict=True):
            for offset in range(self.geometry.block_size):  # as late as a worker may
                self.host[target, offset] = self.kv.get((source, offset), -1)
            self.host_hashes.pop(target, None)
        self.leaving.append((plan.step, self._names_of_copies(plan)))
        while self.leaving and self.leaving[0][0] <= plan.step - self.lag:
            self.host_hashes.update(self.leaving.popleft()[1])
        counts, ids, flags = [], [], []
        for slot, position, state in outputs:
            token, flag = self.sample(self.slots[slot], position, state)
            flags.append(flag)
            counts.append(int(token >= 0))
            if token >= 0:
                ids.append(token)
        return Result(plan.step, pack(counts), pack(ids), bytes(flags), plan.step - self.lag, seconds=0.001)

    def _names_of_copies(self, plan: Plan) -> dict[int, bytes]:
        copied = zip(unpack(plan.out_from).tolist(), unpack(plan.out_to).tolist(), strict=True)
        return {target: self.hashes[source] for source, target in copied if source in self.hashes}

    def compute(self, bound: Slot, start: int, count: int) -> int:
        tokens = self.records[bound.record][0]
        size = self.geometry.block_size
        self.written += count
        if bound.dead:
            return 0
        state = 0
        for position in range(start):
            block = bound.table[position // size]
            stored = self.kv.get((block, position % size), -1)
            state = digest(state, stored) if stored != prefix(state, self.token(bound, tokens, position)) else stored
        for position in range(start, start + count):
            state = prefix(state, self.token(bound, tokens, position))
            block = bound.table[position // size]
            assert block is not None, "a row writes beyond its table"
            assert block not in self.hashes, "a sealed block is written"
            self.kv[block, position % size] = state
        return state

    def score(self, step: int, row: int, bound: Slot, first: int, last: int) -> list[Scored]:
        """Two messages where there are enough positions; each value is made of what the table holds before it."""
        tokens, _, params, length = self.records[bound.record]
        size, state, made = self.geometry.block_size, 0, []
        for position in range(min(last, length - 1) + 1):
            if position >= first:
                value = float("nan") if self.nan_tokens & set(tokens[:position]) else likelihood(state)
                made.append((position, tokens[position], value))
            stored = self.kv.get((bound.table[position // size], position % size), -1) if position < last else 0
            state = stored if stored == prefix(state, tokens[position]) else digest(state, stored)
        pairs = 1 + params.prompt_logprobs
        parts = [part for part in (made[: len(made) // 2], made[len(made) // 2 :]) if part]
        return [
            Scored(
                step,
                row,
                Scores(
                    part[0][0],
                    pack([id for _, id, _ in part for _ in range(pairs)]),
                    pack_floats([value for *_, value in part for _ in range(pairs)]),
                    pack([1] * len(part)),
                ),
            )
            for part in parts
        ]

    @staticmethod
    def token(bound: Slot, tokens: list[int], position: int) -> int:
        return tokens[position] if position < len(tokens) else bound.last

    def sample(self, bound: Slot, position: int, state: int) -> tuple[int, int]:
        if bound.dead:
            return -1, DEAD
        tokens, seed, params, prompt_length = self.records[bound.record]
        if self.nan_tokens & set(tokens[:prompt_length]):
            bound.dead = True
            return -1, NAN
        token = sample(seed, position, state)
        bound.last = token
        assert position == len(tokens), "a position is sampled twice or left out"
        tokens.append(token)
        bound.dead = token in unpack(params.stop_ids).tolist()
        return token, STOPPED if bound.dead else 0


def columns(plan: Plan, kind: str, parts: str) -> list[list[int]]:
    return [unpack(getattr(plan, f"{kind}_{part}")).tolist() for part in parts.split()]


def through(message: Message, geometry: Geometry | None = None) -> Message:
    message = decode(encode(message))
    message.check(geometry)
    return message


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


class Stage:
    """An engine with workers and frontends; `turn` moves everything by one step."""

    def __init__(self, **settings: object) -> None:
        self.now = 100.0
        self.counters = Counters()
        self.settings = SchedulerSettings(Path("."), **{"times": Times(), "depth": 2, **settings})  # type: ignore[arg-type]
        self.engine = Engine(self.settings, self.counters, lambda session: self.frontends[session].unacked)
        self.engine.hash_key = b"k" * 16
        self.workers: dict[int, FakeWorker] = {}
        self.frontends: dict[int, FakeFrontend] = {}
        self.sessions = 0
        self.plans: list[Plan] = []

    def session(self) -> int:
        self.sessions += 1
        return self.sessions

    def worker(self, ready: bool = True, **more: object) -> FakeWorker:
        names = ("block_size", "blocks", "host_blocks", "slots", "max_model_len", "max_step_tokens")
        sizes = dict(zip(names, (4, 64, 0, 8, 128, 32), strict=True))
        sizes.update({k: more.pop(k) for k in names if k in more})
        worker = FakeWorker(self.engine, Geometry(**sizes, vocab_size=VOCABULARY), self.session(), **more)  # type: ignore[arg-type]
        self.workers[worker.session] = worker
        worker.open(self.now)
        if ready:
            worker.ready(self.now)
        return worker

    def frontend(self, **more: object) -> FakeFrontend:
        frontend = FakeFrontend(self.engine, self.session(), **more)  # type: ignore[arg-type]
        self.frontends[frontend.session] = frontend
        frontend.open(self.now)
        frontend.send(Resumed(0), self.now)
        return frontend

    def reopen(self, peer: FakeWorker | FakeFrontend, **more: int) -> None:
        """The peer's session is over; the same process opens another."""
        group = self.workers if isinstance(peer, FakeWorker) else self.frontends
        group.pop(peer.session, None)
        peer.session = self.session()
        group[peer.session] = peer  # type: ignore[assignment]
        peer.open(self.now, **more)

    def deliver(self) -> None:
        """Hand out what the engine says, and close what it wants closed."""
        engine = self.engine
        while engine.out or engine.fence:
            while engine.out:
                session, message, weight = engine.out.popleft()
                if session in self.workers:
                    worker = self.workers[session]
                    message = through(message, worker.geometry)
                    if isinstance(message, Plan):
                        worker.plans.append(message)
                        self.plans.append(message)
                elif session in self.frontends:
                    message = through(message)
                    tokens = len(unpack(message.ids)) if isinstance(message, Tokens) else 0
                    assert weight == (message.scores.count if isinstance(message, PromptScores) else tokens)
                    self.frontends[session].take(message, self.now)
            while engine.fence:
                session, _ = engine.fence.pop()
                worker = self.workers.pop(session)
                worker.close(self.now)

    def plan(self) -> bool:
        made = self.engine.schedule(self.now)
        self.deliver()
        self.engine.check()
        return made

    def turn(self, seconds: float = 0.001) -> bool:
        """Timers, plans, one step of each worker. Whether anything happened."""
        self.now += seconds
        self.engine.tick(self.now)
        self.deliver()
        busy = self.plan()
        for worker in list(self.workers.values()):
            if worker.plans:
                busy = True
                worker.step(self.now)
                self.deliver()
                self.engine.check()
        return busy

    def run(self, turns: int = 10_000) -> None:
        """Until nothing moves."""
        for _ in range(turns):
            if not self.turn():
                return
        raise AssertionError("it never comes to rest")
