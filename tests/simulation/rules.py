"""The rules of DESIGN §1 to §3 that a fault reaches, each as a patch that switches it off."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest

from frontend.entries import Choice as JournalChoice
from frontend.entries import Entry
from frontend.journal import Journal
from gpu_worker.core import WorkerCore
from protocol.codec import Header, decode_header, encode
from protocol.links import Link, Receiver, Sender
from protocol.listener import Listener
from protocol.messages import Submit
from protocol.sessions import Dialer
from scheduler_svc import draft
from scheduler_svc.core import Core
from scheduler_svc.engine import Engine
from scheduler_svc.epochs import Epochs, State
from scheduler_svc.fleet import Fleet
from scheduler_svc.frontends import Frontends
from scheduler_svc.intake import Intake
from scheduler_svc.ledger import Ledger
from scheduler_svc.outcomes import Outcomes
from scheduler_svc.progress import Progress
from scheduler_svc.requests import Choice
from scheduler_svc.suspects import Suspects
from scheduler_svc.swap import HostBlocks
from scheduler_svc.worker import Worker
from tests.simulation.broken import ACCOUNTS, CHARGE, CREDIT, DRAIN, ENDING, LINK, MESSAGE, PLAN, PROGRESS, REST, STREAM
from tests.simulation.mixes import MIXES, Mix
from tests.simulation.network import Weather

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Rule:
    """`off` switches it off; `mix` is where that is noticed, as a break of one of these kinds."""

    off: Callable[[Patch], None]
    mix: Mix
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.off.__name__.replace("_", " ")


def same_again(message: Any, **changes: object) -> Any:
    return msgspec.structs.replace(message, **changes)


# ---------------------------------------------------------------- §1: who owns what


def a_choice_keeps_its_seed(patch: Patch) -> None:
    submit, rng = Entry.submit, random.Random(1)

    def drawn(self: Entry, now: float) -> Submit:
        told = submit(self, now)
        return same_again(told, choices=[same_again(choice, seed=rng.getrandbits(64)) for choice in told.choices])

    patch.setattr(Entry, "submit", drawn)


def the_prompt_is_told_apart_from_known_tokens(patch: Patch) -> None:
    submit = Entry.submit

    def joined(self: Entry, now: float) -> Submit:
        told = submit(self, now)
        if len(told.choices) != 1:
            return told
        (choice,) = told.choices
        return same_again(told, prompt=told.prompt + choice.known, choices=[same_again(choice, known=b"")])

    patch.setattr(Entry, "submit", joined)


def a_stop_string_beats_a_length(patch: Patch) -> None:
    commit = JournalChoice.commit

    def without_text(self: JournalChoice, token: int) -> None:
        text, self.text = self.text, None
        try:
            commit(self, token)
        finally:
            self.text = text

    patch.setattr(JournalChoice, "commit", without_text)


def a_request_is_kept_until_its_frontend_is_done(patch: Patch) -> None:
    settle = Ledger.settle

    def forgetful(self: Ledger, request: Any, now: float, aborted: bool = False) -> None:
        settle(self, request, now, aborted)
        if request.ended and request.failure is None and self.requests.get(request.id) is request:
            self.forget(request)

    patch.setattr(Ledger, "settle", forgetful)


# ---------------------------------------------------------------- §2: the wire


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


# ---------------------------------------------------------------- §3: steps


def a_slots_generation_moves_with_its_owner(patch: Patch) -> None:
    unbind = Worker.unbind

    def unmoved(self: Worker, slot: int) -> Any:
        choice = unbind(self, slot)
        self.slots.generation[slot] -= 1
        return choice

    patch.setattr(Worker, "unbind", unmoved)


def forks_get_their_own_copy_of_the_partial_block(patch: Patch) -> None:
    living = draft._living_copies

    def none(worker: Any, copies: Any) -> list[Any]:
        living(worker, copies)
        return []

    patch.setattr(draft, "_living_copies", none)


def a_copy_under_way_holds_its_host_blocks(patch: Patch) -> None:
    swap_in = HostBlocks.swap_in

    def at_once(self: HostBlocks, *arguments: Any) -> list[int]:
        host = swap_in(self, *arguments)
        self.pool.release(self.returning.pop()[1])
        return host

    patch.setattr(HostBlocks, "swap_in", at_once)


def suspects_run_alone(patch: Patch) -> None:
    patch.setattr(Suspects, "group_at", lambda self, worker, frontends: 0)


def a_nan_that_came_with_a_shared_block_ends_nobody(patch: Patch) -> None:
    nan = Outcomes._nan

    def harsh(self: Outcomes, worker: Any, choice: Any, now: float) -> None:
        choice.no_hits = True
        nan(self, worker, choice, now)

    patch.setattr(Outcomes, "_nan", harsh)


def a_nan_withdraws_the_hashes_of_its_table(patch: Patch) -> None:
    nan = Outcomes._nan

    def kept(self: Outcomes, worker: Any, choice: Any, now: float) -> None:
        forget, worker.blocks.forget = worker.blocks.forget, lambda block: False
        choice.no_hits = True
        try:
            nan(self, worker, choice, now)
        finally:
            worker.blocks.forget = forget

    patch.setattr(Outcomes, "_nan", kept)


def a_leaving_worker_goes_empty(patch: Patch) -> None:
    patch.setattr("scheduler_svc.fleet.is_empty", lambda worker: True)


def positions_to_be_told_are_not_taken_from_a_cache(patch: Patch) -> None:
    patch.setattr(Choice, "most_cached", property(lambda self: self.length - 1))


# ---------------------------------------------------------------- where each is noticed

# More prefixes than the pool can hold: blocks are evicted, given away, and asked for again.
MANY_PREFIXES = replace(
    MIXES["scheduler crashes"],
    seconds=4.0,
    scheduler_crashes=6,
    blocks=24,
    slots=4,
    workers=1,
    requests=60,
    forks=0.0,
    prefixes=6,
    prefix=(20,),
)
ONE_PREFIX = replace(MIXES["nan once"], requests=40, prefixes=1, prefix=(20,))
MANY_DEATHS = replace(MIXES["frontends crash"], frontend_crashes=10)

RULES = (
    Rule(a_choice_keeps_its_seed, MIXES["scheduler crashes"], (STREAM,)),
    Rule(the_prompt_is_told_apart_from_known_tokens, MIXES["scheduler crashes"], (STREAM,)),
    Rule(a_stop_string_beats_a_length, MIXES["calm"], (STREAM,)),
    Rule(a_request_is_kept_until_its_frontend_is_done, MANY_DEATHS, (ENDING,)),
    Rule(what_another_session_sent_is_dropped, MIXES["cuts"], (MESSAGE,)),
    Rule(a_link_delivers_in_order_and_once, MIXES["link"], (PLAN,)),
    Rule(what_is_not_acknowledged_is_sent_again, MIXES["link"], (PROGRESS,)),
    Rule(silence_ends_a_session, MIXES["scheduler crashes"], (PROGRESS, ENDING)),
    Rule(each_side_is_heard_in_time, MIXES["calm"], (LINK,)),
    Rule(a_new_epoch_is_above_all_that_were_named, MIXES["scheduler crashes"], (ENDING, PROGRESS)),
    Rule(a_lower_epoch_stands_by, MIXES["standby, long pauses"], (CHARGE,)),
    Rule(who_stands_by_drops_everything, MIXES["standby, long pauses"], (CHARGE,)),
    Rule(a_standby_takes_over, replace(MIXES["standby"], scheduler_crashes=1, scheduler_back=(1e3, 1e3)), (ENDING,)),
    Rule(credit_bounds_what_is_outstanding, replace(MIXES["pauses, little credit"], credit=4), (CREDIT,)),
    Rule(a_step_without_progress_ends_its_session, MIXES["poison hangs"], (PROGRESS,)),
    Rule(a_lost_session_resets_the_worker, MIXES["scheduler crashes"], (PLAN,)),
    Rule(an_assigned_block_loses_its_hash, MANY_PREFIXES, (STREAM,)),
    Rule(a_host_block_loses_its_hash_when_another_is_copied_there, MIXES["swaps, poison raises"], (STREAM,)),
    Rule(a_host_block_is_listed_only_when_its_copy_is_complete, MIXES["swaps, poison raises"], (STREAM,)),
    Rule(a_session_begins_with_everything_that_lives, MIXES["scheduler crashes"], (PROGRESS,)),
    Rule(
        pending_attaches_are_sent_again,
        replace(MIXES["frontends and scheduler crash"], frontend_crashes=8, scheduler_crashes=4),
        (PROGRESS,),
    ),
    Rule(what_a_frontend_does_not_name_is_aborted, replace(MIXES["pauses"], pauses=10, leaving=0.5), (REST,)),
    Rule(
        only_the_owner_ends_a_request,
        replace(MIXES["clients move"], moves=40, scheduler_crashes=0, weather=Weather(delay=(0.02, 0.1))),
        (ENDING, PROGRESS),
    ),
    Rule(a_dead_frontends_requests_run_on, MANY_DEATHS, (ENDING,)),
    Rule(the_grace_ends, replace(MIXES["frontends crash"], frontend_crashes=8, credit=4), (REST,)),
    Rule(a_lost_workers_requests_go_elsewhere, MIXES["workers crash"], (ACCOUNTS, PROGRESS)),
    Rule(a_slots_generation_moves_with_its_owner, MIXES["clients leave"], (LINK, ACCOUNTS, STREAM)),
    Rule(forks_get_their_own_copy_of_the_partial_block, replace(MIXES["calm"], forks=0.8), (STREAM,)),
    Rule(a_copy_under_way_holds_its_host_blocks, MIXES["swaps, scheduler crashes"], (STREAM,)),
    Rule(suspects_run_alone, MIXES["poison raises"], (PROGRESS,)),
    Rule(a_nan_that_came_with_a_shared_block_ends_nobody, ONE_PREFIX, (ENDING,)),
    Rule(a_nan_withdraws_the_hashes_of_its_table, ONE_PREFIX, (ENDING,)),
    Rule(a_leaving_worker_goes_empty, MIXES["drains"], (DRAIN,)),
    Rule(positions_to_be_told_are_not_taken_from_a_cache, MIXES["prompt scores"], (PROGRESS, ENDING)),
)
