"""Takes one result: sampled tokens become known, blocks get their names, choices end, frontends get their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from protocol.columns import EMPTY, Int32, pack, unpack, unpack_floats
from protocol.messages import DEAD, NAN, STOPPED, Result, Tokens
from scheduler_svc.frontends import Frontend, Frontends
from scheduler_svc.requests import Choice
from scheduler_svc.worker import DRAIN, InFlight, Worker


class BadResult(Exception):
    """A result that its plan cannot have had; the worker's session must end."""


@dataclass(slots=True)
class Taken:
    """What a result brought, beside the columns' new values."""

    tokens: list[tuple[Frontend, Tokens, int]] = field(default_factory=list)  # with the number of tokens
    ended: list[Choice] = field(default_factory=list)  # by a stop id or their length; still bound
    nan: list[Choice] = field(default_factory=list)
    drained: list[Choice] = field(default_factory=list)  # preempted, all rows acknowledged; unbound, in no queue yet
    slots: Int32 = field(default_factory=lambda: EMPTY)  # that got a token
    ownerless: int = 0  # rows whose choice has ended meanwhile


def take(worker: Worker, result: Result, frontends: Frontends) -> Taken:
    """Take the result of the oldest plan in flight. Raises BadResult if it does not answer it."""
    flight = worker.in_flight[0]
    s, outputs = worker.slots, len(flight.slots)
    if result.step != flight.step or len(result.flags) != outputs:
        raise BadResult(f"step {result.step} with {len(result.flags)} outputs, where step {flight.step} has {outputs}")
    taken = Taken()
    slots, ids = flight.slots, unpack(result.ids)
    rows: Int32 | None = None
    live = s.generation[slots] == flight.generations
    flagged: list[tuple[int, int]] = []
    if len(ids) != outputs or result.flags.count(0) != outputs or not live.all():
        counts, flags = unpack(result.counts), np.frombuffer(result.flags, dtype=np.uint8)
        flagged = [(int(slots[i]), int(flags[i])) for i in np.flatnonzero(live & (flags > 0)).tolist()]
        if any(flag & DEAD for _, flag in flagged) or (live & (counts == 0) & (flags & NAN == 0)).any():
            raise BadResult(f"step {result.step} has no token for a sequence that lives")
        taken.ownerless = int(outputs - live.sum())
        rows = np.flatnonzero(live & (counts > 0)).astype(np.int32)
        ids = ids[(np.cumsum(counts) - counts)[rows]]
        slots = slots[rows]
    worker.in_flight.popleft()
    for index, n in flight.credit:
        frontends.at(index).in_flight -= n
    taken.slots = slots
    if len(slots):
        firsts = s.known[slots]
        ends = firsts + 1
        s.history[slots, firsts] = ids
        s.known[slots] = ends
        _tell(worker, result, frontends, taken, slots, ids, firsts, rows)
        last = slots[ends >= s.limit[slots]]
        taken.ended = [c for c in (s.choice[slot] for slot in last.tolist()) if c is not None]
    for slot, flag in flagged:
        choice = s.choice[slot]
        assert choice is not None
        if flag & STOPPED and choice not in taken.ended:
            taken.ended.append(choice)
        elif flag & NAN:
            taken.nan.append(choice)
    if worker.caching:
        hash_of = worker.blocks.hash_of
        worker.seals += [(block, name) for block, name in flight.pending if hash_of[block] == name]
        if len(flight.filled[0]):
            _seal(worker, flight)
    if worker.draining:
        done = {choice.slot for choice in taken.ended + taken.nan}
        for slot in [slot for slot in worker.draining if s.known[slot] == s.length[slot] and slot not in done]:
            taken.drained.append(worker.unbind(slot))
    return taken


def _seal(worker: Worker, flight: InFlight) -> None:
    """Name the blocks that decoding filled in this step. Their last token has been known since the step before."""
    s, blocks, size = worker.slots, worker.blocks, worker.block_size
    slots, generations, ends = flight.filled
    live = np.flatnonzero((s.generation[slots] == generations) & (s.state[slots] != DRAIN))
    slots, ends = slots[live], ends[live]
    packed = s.history[slots[:, None], (ends - size)[:, None] + np.arange(size, dtype=np.int32)].tobytes()
    full = s.table[slots, ends // size - 1].tolist()
    name_of, width, names, hash_of, seal = worker.hasher.name, 4 * size, s.names, blocks.hash_of, worker.seals.append
    offset = 0
    for slot, block in zip(slots.tolist(), full, strict=True):
        chain = names[slot]
        choice = s.choice[slot]
        assert choice is not None
        name = name_of(chain[-1] if chain else choice.request.root, packed[offset : offset + width])
        chain.append(name)
        offset += width
        if hash_of[block] is None and blocks.register(block, name):
            seal((block, name))


def _tell(
    worker: Worker,
    result: Result,
    frontends: Frontends,
    taken: Taken,
    slots: Int32,
    ids: Int32,
    firsts: Int32,
    rows: Int32 | None,
) -> None:
    """One Tokens message per frontend that got any."""
    s = worker.slots
    owners = s.frontend[slots]
    firsts = firsts - s.prompt[slots]
    if (owners == owners[0]).all():
        groups: list[tuple[int, Int32 | None]] = [(int(owners[0]), None)]
    else:
        groups = [(index, np.flatnonzero(owners == index).astype(np.int32)) for index in np.unique(owners).tolist()]
    for index, group in groups:
        frontend = frontends.at(index)
        some = slots if group is None else slots[group]
        if not frontend.session:
            for slot in some.tolist():
                choice = s.choice[slot]
                assert choice is not None
                choice.request.unsent += 1
            frontend.unsent += len(some)
            continue
        at = rows if group is None else group if rows is None else rows[group]
        logprobs = _logprobs(result, at) if result.lp_counts else (b"", b"", b"", b"")
        admitted, frontend.admitted = frontend.admitted, []
        message = Tokens(
            handles=s.handle[some].tobytes(),
            choices=s.index[some].tobytes(),
            firsts=(firsts if group is None else firsts[group]).tobytes(),
            counts=_ones(len(some)),
            ids=(ids if group is None else ids[group]).tobytes(),
            lp_counts=logprobs[0],
            lp_ids=logprobs[1],
            lp_values=logprobs[2],
            lp_ranks=logprobs[3],
            admitted=pack([handle for handle, _ in admitted]),
            cached=pack([cached for _, cached in admitted]),
        )
        taken.tokens.append((frontend, message, len(some)))


def _logprobs(result: Result, rows: Int32 | None) -> tuple[bytes, bytes, bytes, bytes]:
    """The logprob columns of some outputs (None: all)."""
    if rows is None:
        return result.lp_counts, result.lp_ids, result.lp_values, result.lp_ranks
    tokens, per_token = unpack(result.counts), unpack(result.lp_counts)
    pairs, ranks = per_token * tokens, (per_token > 0) * tokens
    wanted = np.zeros(len(tokens), dtype=bool)
    wanted[rows] = True
    pick = np.repeat(wanted, pairs)
    return (
        pack(per_token[rows]),
        pack(unpack(result.lp_ids)[pick]),
        unpack_floats(result.lp_values)[pick].tobytes(),
        pack(unpack(result.lp_ranks)[np.repeat(wanted, ranks)]),
    )


_ONES = np.ones(4096, dtype="<i4").tobytes()


def _ones(n: int) -> bytes:
    return _ONES[: 4 * n] if n <= 4096 else np.ones(n, dtype="<i4").tobytes()
