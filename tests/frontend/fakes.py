"""Stand-ins for the scheduler: one behind real sockets (also as a process), one behind a client without sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from frontend.client import Client
from frontend.settings import FrontendSettings
from frontend.tokenizer import Tokenizer
from protocol.codec import MAX_FRAME
from protocol.columns import pack, pack_floats, unpack
from protocol.counters import Counters
from protocol.listener import FRONTENDS, Greeted, Listener, PeerClosed, PeerEvent, PeerMessage
from protocol.messages import (
    Abort,
    Defaults,
    Done,
    Failed,
    FileChunk,
    FileRequest,
    Message,
    ModelInfo,
    Models,
    PromptScores,
    Resumed,
    Scores,
    Submit,
    Tokens,
    Welcome,
)
from protocol.registration import new_incarnation
from protocol.rundir import RunDir
from protocol.times import Times
from protocol.tokenizer_files import bundle_hash, byte_bundle

BUNDLE = byte_bundle()
EOS = 256
MODEL = ModelInfo("oracle", b"f", 512, 258, pack([EOS]), Defaults(), bundle_hash(BUNDLE), 1)


def model_info(**changes: object) -> ModelInfo:
    """The model of the fakes: a byte tokenizer, a context of 512 tokens."""
    fields = {name: getattr(MODEL, name) for name in MODEL.__struct_fields__}
    return ModelInfo(**(fields | changes))  # type: ignore[arg-type]


def letter(submit: Submit, choice: int, position: int) -> int:
    """The token of a choice at a position: the alphabet, from a letter that the choice's index gives."""
    return ord("a") + (position + choice) % 26


def text(tokens: int, choice: int = 0) -> str:
    """The text of `letter`'s first tokens."""
    return "".join(chr(ord("a") + (i + choice) % 26) for i in range(tokens))


def scores_of(submit: Submit) -> Scores:
    """Each prompt token is a quarter less likely than the one before; the alternatives are A, B, C, …."""
    tokens, more = unpack(submit.prompt).tolist(), submit.params.prompt_logprobs
    positions = range(submit.scored, len(tokens))
    return Scores(
        submit.scored,
        pack([id for p in positions for id in (tokens[p], *range(ord("A"), ord("A") + more))]),
        pack_floats([value for p in positions for value in (-0.25 * p, *(-1.0 - i for i in range(more)))]),
        pack([p + 1 for p in positions]),
    )


class Engine:
    """Answers requests: each `step` gives one token to every choice that goes on. Ends like the journal would, by length."""

    def __init__(
        self, token: Callable[[Submit, int, int], int] = letter, refuse: Callable[[Submit], Failed | None] = lambda submit: None
    ) -> None:
        self.token = token
        self.refuse = refuse
        self.out: list[Message] = []
        self.live: dict[bytes, Submit] = {}
        self.tokens: dict[bytes, list[int]] = {}
        self.ended: dict[bytes, set[int]] = {}
        self.messages: list[Message] = []  # what came, in order
        self.paused = False

    def take(self, message: Message) -> None:
        self.messages.append(message)
        match message:
            case Submit():
                failed = self.refuse(message)
                if failed is not None:
                    self.out.append(failed)
                    return
                self.live[message.request] = message
                self.tokens[message.request] = [len(choice.known) // 4 for choice in message.choices]
                self.ended[message.request] = {choice.index for choice in message.choices if choice.ended}
                if message.params.prompt_logprobs >= 0 and message.scored < len(message.prompt) // 4:
                    self.out.append(PromptScores(message.handle, scores_of(message)))
            case Abort():
                if message.request in self.live:
                    choices = unpack(message.choices).tolist() if message.choices else range(len(self.live[message.request].choices))
                    self.ended[message.request] |= set(choices)
            case Done():
                self.live.pop(message.request, None)

    def step(self) -> Message | None:
        """The TOKENS message of one step, None if nothing goes on."""
        rows, admitted = [], []
        for request, submit in self.live.items() if not self.paused else ():
            lengths = self.tokens[request]
            for choice, length in enumerate(lengths):
                if choice in self.ended[request] or length >= submit.params.max_tokens:
                    continue
                if not length and not choice and not submit.admitted:
                    admitted.append(submit.handle)
                rows.append((submit, choice, length, self.token(submit, choice, length)))
                lengths[choice] += 1
        if not rows:
            return None
        lps = [max(submit.params.logprobs + 1, 0) for submit, *_ in rows]
        return Tokens(
            handles=pack([submit.handle for submit, *_ in rows]),
            choices=pack([choice for _, choice, _, _ in rows]),
            firsts=pack([length for _, _, length, _ in rows]),
            counts=pack([1] * len(rows)),
            ids=pack([token for *_, token in rows]),
            lp_counts=pack(lps) if any(lps) else b"",
            lp_ids=pack(
                [[token, *range(ord("A"), ord("A") + n - 1)][i] for (*_, token), n in zip(rows, lps, strict=True) for i in range(n)]
            ),
            lp_values=pack_floats([-0.5 * (i + 1) for n in lps for i in range(n)]),
            lp_ranks=pack([1 for n in lps if n]),
            admitted=pack(admitted),
            cached=pack([0] * len(admitted)),
        )


class LocalClient(Client):
    """A client whose scheduler is an `Engine` in the same loop: one step each time the loop is idle."""

    def __init__(self, settings: FrontendSettings, engine: Engine, info: ModelInfo = MODEL) -> None:
        super().__init__(settings, 1)
        self.engine = engine
        self.info = info
        self._step: asyncio.Handle | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tokenizers.by_hash[self.info.tokenizer] = Tokenizer.from_bundle(BUNDLE)
        self.connect()

    def connect(self) -> None:
        """Open a session (again)."""
        self.journal.opened(Welcome(1, 1, 1, bytes(16)), self._loop.time())
        self.journal.message(Models([self.info]), self._loop.time())
        self._pump()

    async def stop(self) -> None:
        self.stop_threads()

    def _pump(self) -> None:
        now = self._loop.time()
        while self.journal.out:
            self.engine.take(self.journal.out.popleft())
        for message in self.engine.out:
            self.journal.message(message, now)
        self.engine.out.clear()
        touched, self.journal.touched = self.journal.touched, {}
        for entry in touched.values():
            entry.listener.touch(entry, now)  # type: ignore[attr-defined]
        if self._step is None and self.engine.live:
            self._step = self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._step = None
        message = self.engine.step()
        if message is not None:
            self.journal.message(message, self._loop.time())
            self._pump()
        elif self.engine.live:
            self._step = self._loop.call_later(0.001, self._next)  # type: ignore[assignment]


class SocketScheduler:
    """A scheduler behind a real ROUTER: sessions and links by the protocol's own code, tokens by an `Engine`.

    `serve` runs in a thread or a process of its own, one step each `interval` seconds.
    """

    def __init__(self, endpoint: str, engine: Engine, interval: float = 0.002, times: Times | None = None, epoch: int = 1) -> None:
        self.engine = engine
        self.listener = Listener(times or Times(), Counters(), itertools.count(int.from_bytes(os.urandom(6), "big")).__next__)
        self.epoch = epoch
        self.interval = interval
        self.stop = threading.Event()
        self.sessions: list[int] = []
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        self.router.bind(endpoint)

    def serve(self) -> None:
        """Answer until `stop` is set."""
        next_step = time.monotonic()
        while not self.stop.is_set():
            now = time.monotonic()
            if self.router.poll(max(0, min(next_step, self.listener.next_time()) - now) * 1000):
                with contextlib.suppress(zmq.Again):
                    for _ in range(1000):
                        route, *frames = self.router.recv_multipart(zmq.DONTWAIT)
                        self._handle(self.listener.receive((FRONTENDS, route), frames, time.monotonic()))
            now = time.monotonic()
            self._handle(self.listener.tick(now))
            if now >= next_step:
                next_step = max(next_step + self.interval, now)
                message = self.engine.step()
                if message is not None and self.sessions:
                    self.listener.send(self.sessions[-1], message, now)
            for message in self.engine.out if self.sessions else ():  # who has lost its session asks again
                self.listener.send(self.sessions[-1], message, now)
            self.engine.out.clear()
            while self.listener.out:
                (_, route), frames = self.listener.out.popleft()
                with contextlib.suppress(zmq.ZMQError):
                    self.router.send_multipart([route, *frames], zmq.DONTWAIT)
        self.router.close(0)
        self.context.term()

    def _handle(self, events: list[PeerEvent]) -> None:
        now = time.monotonic()
        for event in events:
            match event:
                case Greeted():
                    session, closed = self.listener.welcome(event, self.epoch, bytes(16), 1 << 20, now)
                    self._handle(closed)
                    self.sessions.append(session)
                    self.listener.send(session, Models([MODEL]), now)
                case PeerClosed(session):
                    self.sessions.remove(session)
                    self.engine.live.clear()
                case PeerMessage(session, FileRequest(tokenizer, offset)):
                    self.listener.send(session, FileChunk(tokenizer, offset, len(BUNDLE), BUNDLE[offset : offset + 7]), now)
                case PeerMessage(_, Resumed()):
                    self.engine.messages.append(event.message)
                case PeerMessage():
                    self.engine.take(event.message)


@contextlib.contextmanager
def scheduler_thread(endpoint: str, engine: Engine, interval: float = 0.002, times: Times | None = None, epoch: int = 1):
    """A `SocketScheduler` at work in a thread."""
    scheduler = SocketScheduler(endpoint, engine, interval, times, epoch)
    thread = threading.Thread(target=scheduler.serve, daemon=True)
    thread.start()
    try:
        yield scheduler
    finally:
        scheduler.stop.set()
        thread.join(60)


@contextlib.contextmanager
def scheduler_in(run_dir: Path, engine: Engine, interval: float = 0.002):
    """A `SocketScheduler` at work in a thread, to be found in a run directory as a scheduler's process is."""
    folder = RunDir(run_dir)
    registration = folder.register("scheduler", "scheduler-0", new_incarnation())
    try:
        with scheduler_thread(folder.frontends, engine, interval) as scheduler:
            yield scheduler
    finally:
        registration.remove()


def settings_for(run_dir: Path, **changes: object) -> FrontendSettings:
    """Settings of a frontend under test."""
    return FrontendSettings(run_dir, port=0, **changes)  # type: ignore[arg-type]


if __name__ == "__main__":  # python -m tests.frontend.fakes ENDPOINT INTERVAL: a scheduler process to measure against
    SocketScheduler(sys.argv[1], Engine(), float(sys.argv[2])).serve()
