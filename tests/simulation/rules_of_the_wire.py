"""Rules of the wire and of recovery (DESIGN §2), each as a patch that switches it off."""

from __future__ import annotations

from typing import Any

import pytest

from frontend.journal import Journal
from gpu_worker.core import WorkerCore
from protocol.codec import Header, decode_header, encode
from protocol.links import Link, Receiver, Sender
from protocol.listener import Listener
from protocol.sessions import Dialer
from scheduler_svc.core import Core
from scheduler_svc.engine import Engine
from scheduler_svc.epochs import Epochs, State
from scheduler_svc.fleet import Fleet
from scheduler_svc.frontends import Frontends
from scheduler_svc.intake import Intake
from scheduler_svc.progress import Progress

Patch = pytest.MonkeyPatch


def _relabelled(frames: list[bytes], session: int) -> list[bytes]:
    """The frames as if they belonged to this session."""
    header = decode_header(frames)
    if not header.session or not session:
        return frames
    return [encode(Header(session, header.sequence, header.acknowledged)), *frames[1:]]


def what_another_session_sent_is_dropped(patch: Patch) -> None:
    receive = Listener.receive

    def taken(self: Listener, route: Any, frames: list[bytes], now: float) -> Any:
        return receive(self, route, _relabelled(frames, self._by_route.get(route, 0)), now)

    patch.setattr(Listener, "receive", taken)
    heard = Dialer.receive

    def believed(self: Dialer, endpoint: int, channel: int, frames: list[bytes], now: float) -> Any:
        return heard(self, endpoint, channel, _relabelled(frames, self.session), now)

    patch.setattr(Dialer, "receive", believed)
    closed = Dialer._close

    def kept(self: Dialer, reason: str, now: float) -> Any:
        events = closed(self, reason, now)
        self.reopen.clear()
        return events

    patch.setattr(Dialer, "_close", kept)


def a_link_delivers_in_order_and_once(patch: Patch) -> None:
    def take(self: Receiver, sequence: int, body: bytes, now: float) -> list[bytes]:
        self.last = max(self.last, sequence)
        return [body]

    patch.setattr(Receiver, "take", take)


def what_is_not_acknowledged_is_sent_again(patch: Patch) -> None:
    due = Sender.due

    def lost(self: Sender, now: float) -> list[tuple[int, bytes]]:
        due(self, now)
        self.moved = now
        return []

    patch.setattr(Sender, "due", lost)


def silence_ends_a_session(patch: Patch) -> None:
    def patient(self: Link, now: float) -> None:
        self.heard = self.sender.moved = now
        self._next = None

    patch.setattr(Link, "broken", patient)


def each_side_is_heard_in_time(patch: Patch) -> None:
    idle = Link.idle_frame

    def mute(self: Link, now: float, *early: float) -> list[bytes] | None:
        if now >= self.receiver.ack_at:
            return idle(self, now, *early)
        self.sent, self._next = now, None
        return None

    patch.setattr(Link, "idle_frame", mute)


def a_new_epoch_is_above_all_that_were_named(patch: Patch) -> None:
    tick = Epochs.tick

    def first(self: Epochs, now: float) -> None:
        before = self.state
        tick(self, now)
        if before is not State.ACTIVE and self.state is State.ACTIVE:
            self.epoch = self.seen = 1 << 32 | self._incarnation & 0xFFFFFFFF

    patch.setattr(Epochs, "tick", first)


def a_lower_epoch_stands_by(patch: Patch) -> None:
    patch.setattr(Epochs, "_stand_by", lambda self, now: None)


def who_stands_by_drops_everything(patch: Patch) -> None:
    patch.setattr(Core, "_yield_if_standing_by", lambda self, now: None)


def a_standby_takes_over(patch: Patch) -> None:
    patch.setattr(Epochs, "_takeover_at", lambda self: float("inf"))


def credit_bounds_what_is_outstanding(patch: Patch) -> None:
    patch.setattr(Frontends, "free", lambda self, frontend: 1000)


def a_step_without_progress_ends_its_session(patch: Patch) -> None:
    patch.setattr(Progress, "planned", lambda self, worker: None)


def a_lost_session_resets_the_worker(patch: Patch) -> None:
    patch.setattr(WorkerCore, "reset", lambda self: None)


def an_assigned_block_loses_its_hash(patch: Patch) -> None:
    apply = WorkerCore.apply

    def without_forgetting(self: WorkerCore, plan: Any) -> Any:
        forget = self._sealed.forget
        self._sealed.forget = lambda blocks: None  # type: ignore[method-assign]
        try:
            return apply(self, plan)
        finally:
            self._sealed.forget = forget  # type: ignore[method-assign]

    patch.setattr(WorkerCore, "apply", without_forgetting)


def a_host_block_loses_its_hash_when_another_is_copied_there(patch: Patch) -> None:
    copy = WorkerCore._copy

    def without_forgetting(self: WorkerCore, plan: Any) -> None:
        forget = self._host_sealed.forget
        self._host_sealed.forget = lambda blocks: None  # type: ignore[method-assign]
        try:
            copy(self, plan)
        finally:
            self._host_sealed.forget = forget  # type: ignore[method-assign]

    patch.setattr(WorkerCore, "_copy", without_forgetting)


def a_host_block_is_listed_only_when_its_copy_is_complete(patch: Patch) -> None:
    copy = WorkerCore._copy

    def at_once(self: WorkerCore, plan: Any) -> None:
        copy(self, plan)
        self._copied = plan.step
        self._seal_copies()

    patch.setattr(WorkerCore, "_copy", at_once)


def a_session_begins_with_everything_that_lives(patch: Patch) -> None:
    def nothing(self: Journal, welcome: Any, now: float) -> None:
        self.is_open, self.fault = True, None
        self.out.clear()

    patch.setattr(Journal, "opened", nothing)


def pending_attaches_are_sent_again(patch: Patch) -> None:
    opened = Journal.opened

    def without(self: Journal, welcome: Any, now: float) -> None:
        hidden = {handle: entry for handle, entry in self._by_handle.items() if entry.attaching}
        for handle in hidden:
            del self._by_handle[handle]
        opened(self, welcome, now)
        self._by_handle.update(hidden)

    patch.setattr(Journal, "opened", without)


def what_a_frontend_does_not_name_is_aborted(patch: Patch) -> None:
    def named(self: Intake, frontend: Any, message: Any, now: float) -> None:
        frontend.resumed = True

    patch.setattr(Intake, "resumed", named)


def only_the_owner_ends_a_request(patch: Patch) -> None:
    patch.setattr(Intake, "_owned", lambda self, frontend, id: self._ledger.requests.get(id))


def a_dead_frontends_requests_run_on(patch: Patch) -> None:
    closed = Engine.frontend_closed

    def given_up(self: Engine, session: int, now: float) -> None:
        frontend = self.frontends.by_session.get(session)
        closed(self, session, now)
        if frontend is not None:
            self._give_up(frontend, now)

    patch.setattr(Engine, "frontend_closed", given_up)


def the_grace_ends(patch: Patch) -> None:
    patch.setattr(Engine, "_give_up", lambda self, frontend, now: None)


def a_lost_workers_requests_go_elsewhere(patch: Patch) -> None:
    strip = Fleet._strip
    patch.setattr(Fleet, "_strip", lambda self, worker: strip(self, worker) and [])
