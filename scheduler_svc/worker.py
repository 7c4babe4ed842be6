"""One worker as the scheduler sees it: its slots and blocks, the plans in flight, what the next plan must say."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from protocol.columns import Int32, pack
from protocol.messages import PROTOCOL, SCORES_SINCE, Geometry
from scheduler_svc.blocks import BlockManager
from scheduler_svc.costs import Costs
from scheduler_svc.depth import Depth
from scheduler_svc.prefix import Chain, Hasher
from scheduler_svc.requests import Choice, Request, State
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.slots import DRAIN, FREE, PREFILL, Index, Slots, blocks_for
from scheduler_svc.steps import Copy, DecodeRows, InFlight, per_frontend
from scheduler_svc.swap import HostBlocks
from scheduler_svc.waiting import Queue, Shares

if TYPE_CHECKING:
    from scheduler_svc.frontends import Frontend
    from scheduler_svc.models import Model


class Worker:
    """A worker's session."""

    def __init__(self, session: int, name: str, incarnation: int, shares: Shares, protocol: int = PROTOCOL) -> None:
        self.session = session
        self.name = name
        self.incarnation = incarnation
        self.protocol = protocol
        self.ready = False
        self.closed = False
        self.fenced = False  # its session is about to be ended
        self.hung = False  # for want of progress
        self.leaving = False  # on purpose: gets nothing new
        self.drained = False  # has been told that nothing of its own is left
        self.watched = False  # a timer will judge its progress
        self.prefilling: set[int] = set()  # slots in PREFILL
        self.draining: set[int] = set()  # slots in DRAIN
        self.version = 0  # moves when a slot loses its owner, or its owner changes frontends
        self.queue = Queue(shares)
        self.in_flight: deque[InFlight] = deque()
        self.quarantined: list[Request] = []  # that were sent here
        self.step = 0
        self.records = 0
        # what the next plan says
        self.drops: list[int] = []
        self.frees: list[int] = []
        self.seals: list[tuple[int, bytes]] = []
        self.withdrawals: list[int] = []
        self.copies: list[Copy] = []
        self.promised = 0  # blocks, if every sequence with a slot grew to its limit and none shared any
        self.decoding: DecodeRows | None = None
        self.stuck: tuple[Choice, int] | None = None  # the first in line that did not fit, and blocks available then
        self.turn = 0  # where a budget smaller than the decodes begins
        # liveness
        self.phase = "loading"
        self.heard = 0.0  # when the progress counter last moved, or a plan became the oldest
        self.counter = (0, 0)
        self.step_seconds = 0.0  # mean device time of recent steps
        self.busy_seconds = 0.0
        self.idle_seconds = 0.0

    def open(self, model: Model, geometry: Geometry, hasher: Hasher, settings: SchedulerSettings) -> None:
        """READY has come: lay out the columns."""
        self.model = model
        self.geometry = geometry
        self.hasher = hasher
        self.block_size = geometry.block_size
        self.slots = Slots(geometry, min(geometry.slots, settings.max_num_seqs))
        self.blocks = BlockManager(geometry.blocks)
        self.host = HostBlocks(geometry.host_blocks, self.blocks)
        self.depth = Depth(settings.depth)
        self.costs = Costs(settings.preemption)
        self.budget = min(geometry.max_step_tokens, settings.max_num_batched_tokens or geometry.max_step_tokens)
        self.caching = settings.enable_prefix_caching
        self.ready = True

    @property
    def capacity(self) -> int:
        """The longest sequence that fits, in tokens; its last one needs no K and V."""
        return min(self.geometry.max_model_len, self.geometry.blocks * self.block_size + 1)

    @property
    def running(self) -> int:
        """Slots in use."""
        return self.slots.count - len(self.slots.free)

    @property
    def is_full(self) -> bool:
        """Whether the first in line did not fit when last tried, and nothing has come free since."""
        return self.stuck is not None and bool(self.running) and self.blocks.available <= self.stuck[1]

    @property
    def proving(self) -> bool:
        """Whether quarantined requests wait or run here."""
        if self.quarantined:
            self.quarantined = [request for request in self.quarantined if request.quarantined and not request.ended]
        return bool(self.quarantined)

    @property
    def load(self) -> float:
        """Share of its KV blocks, or of its slots if that is more, which all sequences running or waiting here take; may exceed 1."""
        tokens = int(self.slots.length.sum()) + self.queue.tokens
        return max(tokens / (self.blocks.count * self.block_size), (self.running + len(self.queue)) / self.slots.count)

    @property
    def has_news(self) -> bool:
        """Whether the worker should hear something though there may be no row to run."""
        return bool(self.frees or self.drops or self.seals or self.withdrawals or self.copies or self.host.busy)

    def can_hold(self, choice: Choice) -> bool:
        """Whether a choice fits to its end, and this worker knows how to compute it."""
        return choice.limit <= self.capacity and (not choice.scores or self.protocol >= SCORES_SINCE)

    def bind(self, choice: Choice, tokens: Int32) -> int:
        """Give a choice a slot with these tokens; its table is empty. A new slot is free: the caller has checked."""
        s = self.slots
        slot = s.free.pop()
        request = choice.request
        n = len(tokens)
        s.choice[slot] = choice
        s.history[slot, :n] = tokens
        s.known[slot] = s.length[slot] = n
        s.computed[slot] = s.blocks[slot] = s.capacity[slot] = 0
        s.prompt[slot] = len(request.prompt)
        s.limit[slot] = choice.limit
        s.handle[slot] = request.handle
        s.index[slot] = choice.index
        s.frontend[slot] = request.frontend.index
        s.priority[slot] = request.priority
        s.state[slot] = PREFILL
        self.prefilling.add(slot)
        self.promised += blocks_for(choice.limit, self.block_size)
        choice.slot = slot
        choice.state = State.RUNNING
        if choice.worker is not self:
            choice.worker = self
            choice.cached_record = 0
        return slot

    def rows_of(self, slots: Index) -> DecodeRows:
        """What a step needs to know of these decoding slots."""
        s = self.slots
        generations, narrow = s.generation[slots], slots.astype(np.int32)
        mask = np.zeros(s.count, dtype=np.bool_)
        mask[slots] = True
        return DecodeRows(
            slots=slots,
            mask=mask,
            one=mask.astype(np.int32),
            generations=generations,
            credit=per_frontend(s.frontend[slots]),
            prompts=s.prompt[slots],
            base=slots * s.history.shape[1],
            slots_packed=pack(narrow),
            generations_packed=pack(generations),
            ones_packed=np.ones(len(slots), dtype="<i4").tobytes(),
            handles_packed=pack(s.handle[slots]),
            indices_packed=pack(s.index[slots]),
        )

    def unbind(self, slot: int) -> Choice:
        """Take the slot from its choice at once. Rows still in flight for it have no owner any more."""
        s = self.slots
        choice = s.choice[slot]
        assert choice is not None
        choice.tokens = choice.known
        # the names found so far are kept for its return; a preempted sequence hashes no block twice
        names = s.names[slot]
        self.drop_blocks(slot)
        self.prefilling.discard(slot)
        self.draining.discard(slot)
        self.version += 1
        self.promised -= blocks_for(choice.limit, self.block_size)
        s.choice[slot] = None
        s.names[slot] = []
        s.state[slot] = FREE
        s.length[slot] = 0
        s.generation[slot] += 1
        s.free.append(slot)
        self.frees.append(slot)
        self.decoding = None
        choice.slot = -1
        choice.chains = {}
        if choice.state is not State.ENDED:
            chain = Chain(self.hasher, self.block_size, choice.all_tokens, choice.request.root, names)
            choice.chains[self.block_size] = chain
            if self.caching:
                chain.extend(chain.full)  # a block or two that its last rows filled
        return choice

    def drop_blocks(self, slot: int) -> None:
        """Release the slot's table."""
        s = self.slots
        if n := int(s.blocks[slot]):
            self.blocks.release(s.table[slot, :n].tolist())
            s.blocks[slot] = s.capacity[slot] = 0

    def reassign(self, slot: int, old: Frontend, new: Frontend) -> None:
        """The slot's rows in flight count against another frontend's credit."""
        for flight in self.in_flight:
            mine = (flight.slots == slot) & (flight.generations == self.slots.generation[slot])
            if mine.any():
                credit = dict(flight.credit)
                credit[old.index] -= 1
                credit[new.index] = credit.get(new.index, 0) + 1
                flight.credit = [(index, n) for index, n in credit.items() if n]
                old.in_flight -= 1
                new.in_flight += 1
        self.decoding = None
        self.version += 1

    def drop_record(self, choice: Choice) -> None:
        """The choice will not come back to this worker."""
        if choice.worker is self and choice.cached_record:
            self.drops.append(choice.cached_record)
        choice.cached_record = 0

    def took(self, flight: InFlight, seconds: float, idle: float, now: float) -> bool:
        """A result has come, with its step's device time and the time without work before it. Whether the depth changes."""
        self.heard = now
        if seconds:
            self.step_seconds = seconds if not self.step_seconds else 0.9 * self.step_seconds + 0.1 * seconds
            self.busy_seconds += seconds
            self.idle_seconds += idle
            self.costs.took(seconds, flight.prefilled, flight.copied)
        if flight.alone:
            return self.depth.measured(now - flight.sent - seconds, self.costs.decode or self.step_seconds, now)
        self.depth.took(seconds, idle, now)
        return False

    def check(self) -> None:
        """Verify block accounts, tables and columns. Raises AssertionError."""
        s = self.slots
        references = [copy.source for copy in self.copies]
        references += [block for swap in self.host.leaving for block in swap.blocks]
        bound = [choice for choice in s.choice if choice is not None]
        assert self.promised == sum(blocks_for(choice.limit, self.block_size) for choice in bound)
        for slot in range(s.count):
            choice = s.choice[slot]
            assert (choice is None) == (s.state[slot] == FREE), "a slot's state does not match its owner"
            if choice is None:
                continue
            assert choice.slot == slot
            assert choice.worker is self
            n = int(s.blocks[slot])
            references += s.table[slot, :n].tolist()
            assert s.capacity[slot] == n * self.block_size
            assert s.known[slot] <= s.length[slot] <= s.limit[slot]
            assert (slot in self.prefilling, slot in self.draining) == (s.state[slot] == PREFILL, s.state[slot] == DRAIN)
            if s.state[slot] != DRAIN:
                assert s.computed[slot] <= s.capacity[slot], "tokens computed beyond the table"
            assert s.frontend[slot] == choice.request.frontend.index
            assert s.handle[slot] == choice.request.handle
        assert sorted(s.free) == [i for i in range(s.count) if s.choice[i] is None], "the free slots are not those without owner"
        self.blocks.check(references)
