"""A scheduler without its sockets: sessions, epoch and engine in one. No I/O, no clock.

The owner feeds it frames and the time, calls `turn` after each batch of them and at `next_time()` at the latest, and
transmits what stands in `out`: after `turn`, and whenever it is called back meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import NamedTuple

from protocol.columns import unpack
from protocol.counters import Counters
from protocol.listener import Greeted, Listener, Outdated, PeerClosed, PeerEvent, PeerMessage, Route
from protocol.messages import PROTOCOL, PROTOCOL_OLDEST, Message, Plan, Ready, Result
from scheduler_svc.engine import Engine
from scheduler_svc.epochs import Epochs, State
from scheduler_svc.models import Totals
from scheduler_svc.settings import SchedulerSettings


class Did(NamedTuple):
    """What a call has done, for the timeline: a plan made, a result taken, a request brought to run."""

    name: str
    lane: str
    key: str  # "session:step", or the request's id
    since: float = inf  # when it began, if that was before the call


class Core:
    """One scheduler.

    `entropy` gives 63 random bits a call. `claim` makes epochs unique (`epochs.py`). `keep_key` is told the hash key
    that is in use, before the first WELCOME.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        entropy: Callable[[], int],
        claim: Callable[[int], int],
        keep_key: Callable[[bytes], None],
        now: float,
        *,
        seen_epoch: int = 0,
        hash_key: bytes = b"",
        standby: bool = False,
    ) -> None:
        self._settings = settings
        self._times = settings.times
        self._entropy = entropy
        self._keep_key = keep_key
        self._hash_key = hash_key
        self.counters = Counters()
        self._totals = Totals()
        self.listener = Listener(settings.times, self.counters, entropy)
        self.epochs = Epochs(entropy(), seen_epoch, claim, settings.times, now, standby)
        self.engine = self._new_engine()
        self._admit_at = inf
        self.done: list[Did] | None = None  # for the timeline, while somebody traces: the owner takes it after each call
        self._in_charge = False  # since we became active: there may be sessions and requests
        self._awaited: set[int] = set()  # workers heard while resyncing, not yet ready, by incarnation

    @property
    def out(self) -> deque[tuple[Route, list[bytes]]]:
        """Frames to transmit: (route, frames)."""
        return self.listener.out

    @property
    def state(self) -> str:
        """resync, active or standby."""
        return self.epochs.state.value

    @property
    def has_worker(self) -> bool:
        """Whether a worker has said READY."""
        return any(peer.geometry is not None for peer in self.listener.peers.values())

    def receive(self, route: Route, frames: list[bytes], now: float) -> None:
        """Take one multipart message without its routing frame."""
        self._handle(self.listener.receive(route, frames, now), now)

    def disconnected(self, route: Route, now: float) -> None:
        """A frame could not be routed: its connection is gone."""
        self._handle(self.listener.disconnected(route), now)

    def probe(self, now: float) -> None:
        """Send a frame on every route, so that those which are gone show."""
        self.listener.probe(now)

    def turn(self, now: float, transmit: Callable[[], None] = lambda: None) -> None:
        """Timers, then plans, then whatever the engine has to say. `transmit` is called behind each plan that another may follow:
        a device that waits for the first need not wait for all that its pipeline holds."""

        def made_one(more: bool) -> None:
            session, plan, _ = self.engine.out.pop()
            if self.done is not None:
                self._note_plan(self.done, session, plan)
            self.listener.send(session, plan, now)
            if more:
                transmit()

        state = self.epochs.state
        self.epochs.tick(now)
        if state is not State.ACTIVE and self.epochs.state is State.ACTIVE:
            self._take_charge(now)
        self._handle(self.listener.tick(now), now)
        if self.epochs.state is not State.ACTIVE:
            return
        self.engine.tick(now)
        if now >= self._admit_at:
            self._awaited.clear()
        if not self._awaited:
            self.engine.schedule(now, made_one)
        self.flush(now)

    def flush(self, now: float) -> None:
        """Hand the engine's messages to their links, and end the sessions it wants ended."""
        while self.engine.out or self.engine.fence:
            while self.engine.out:
                session, message, weight = self.engine.out.popleft()
                self.listener.send(session, message, now, weight)
            while self.engine.fence:
                session, reason = self.engine.fence.pop()
                self._handle(self.listener.close(session, reason), now)

    def next_time(self) -> float:
        """When `turn` must be called next."""
        earliest = min(self.epochs.next_time(), self.listener.next_time())
        if self.epochs.state is State.ACTIVE:
            # What has arrived waits for the workers that are awaited: it is no reason to turn.
            earliest = min(earliest, min(self.engine.timers.next_time(), self._admit_at) if self._awaited else self.engine.next_time())
        return earliest

    def _new_engine(self) -> Engine:
        engine = Engine(self._settings, self.counters, self.listener.unacked, self._totals)
        engine.hash_key = self._hash_key
        return engine

    def _take_charge(self, now: float) -> None:
        if not self._hash_key:
            self._hash_key = self._entropy().to_bytes(8, "little") + self._entropy().to_bytes(8, "little")
        self.engine.hash_key = self._hash_key
        self._keep_key(self._hash_key)
        self._awaited = set(self.epochs.resyncing)
        self._admit_at = now + self._times.resync
        self._in_charge = True

    def _handle(self, events: list[PeerEvent], now: float) -> None:
        for event in events:
            match event:
                case PeerMessage(session, message):
                    self._message(session, message, now)
                case Greeted():
                    self._greeted(event, now)
                case PeerClosed(session, reason, hello):
                    if hello.role == "worker":
                        self._awaited.discard(hello.incarnation)
                        self.engine.worker_closed(session, reason, now)
                    else:
                        self.engine.frontend_closed(session, now)
                case Outdated(epoch):
                    self.epochs.stale(epoch, now)
                    self._yield_if_standing_by(now)

    def _greeted(self, greeted: Greeted, now: float) -> None:
        hello = greeted.hello
        if hello.protocol_oldest > PROTOCOL or hello.protocol < PROTOCOL_OLDEST:
            spoken, here = f"{hello.protocol_oldest} to {hello.protocol}", f"{PROTOCOL_OLDEST} to {PROTOCOL}"
            self.listener.refuse(greeted, f"it speaks protocol {spoken}, this scheduler {here}")
            return
        self.epochs.hello(hello, now)
        self._yield_if_standing_by(now)
        if not self._hash_key:
            self._hash_key = hello.hash_key
        if self.epochs.state is not State.ACTIVE:
            return
        session, events = self.listener.welcome(greeted, self.epochs.epoch, self._hash_key, self.engine.credit_limit, now)
        self._handle(events, now)
        if hello.role == "worker":
            self.engine.worker_opened(session, hello, now)
        else:
            self.engine.frontend_opened(session, hello.name, hello.incarnation, now)

    def _message(self, session: int, message: Message, now: float) -> None:
        peer = self.listener.peers.get(session)
        if peer is None:
            return  # its session ended on an earlier message of the same batch
        if peer.role == "frontend":
            self.engine.frontend_message(session, message, now)
            return
        if self.done is not None and isinstance(message, Result):
            self.done.append(Did("result", f"results of {peer.hello.name}", f"{session}:{message.step}"))
        self.engine.worker_message(session, message, now)
        if isinstance(message, Ready):
            self._awaited.discard(peer.hello.incarnation)

    def _note_plan(self, done: list[Did], session: int, plan: Message) -> None:
        """A plan has been made; those that it runs for the first time have been waiting since their arrival."""
        worker = self.engine.workers[session]
        assert isinstance(plan, Plan)
        done.append(Did("plan", f"plans for {worker.name}", f"{session}:{plan.step}"))
        for slot in unpack(plan.bind_slots).tolist():
            choice = worker.slots.choice[slot]
            if choice is not None and not len(choice.tokens):
                done.append(Did("queue", "queue", choice.request.id.hex(), choice.request.arrival))

    def _yield_if_standing_by(self, now: float) -> None:
        """Somebody with a higher epoch is in charge: drop every session and request, in silence."""
        if self.epochs.state is not State.STANDBY or not self._in_charge:
            return
        self._in_charge = False
        for session in list(self.listener.peers):
            self.listener.close(session, "standing by")
        self.engine = self._new_engine()
        self.counters.add("epoch_yielded")
