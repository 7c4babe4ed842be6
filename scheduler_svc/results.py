"""Takes one result: sampled tokens become known, blocks get their names, choices end, frontends get their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from protocol.columns import Int32, pack, unpack, unpack_floats
from protocol.messages import DEAD, NAN, STOPPED, Result, Scored, Tokens
from scheduler_svc.frontends import NO_LOGPROBS, Frontend, Frontends, Logprobs
from scheduler_svc.requests import Choice
from scheduler_svc.slots import DRAIN, Index
from scheduler_svc.steps import DecodeRows, InFlight, per_frontend
from scheduler_svc.worker import Worker

NO_SLOTS: Index = np.zeros(0, dtype=np.intp)


class BadResult(Exception):
    """A result that its plan cannot have had; the worker's session must end."""


@dataclass(slots=True)
class Taken:
    """What a result brought, beside the columns' new values."""

    tokens: list[tuple[Frontend, Tokens, int]] = field(default_factory=list)  # with the number of tokens
    ended: list[Choice] = field(default_factory=list)  # by a stop id or their length; still bound
    nan: list[Choice] = field(default_factory=list)
    drained: list[Choice] = field(default_factory=list)  # preempted, all rows acknowledged; unbound, in no queue yet
    slots: Index = field(default_factory=lambda: NO_SLOTS)  # that got a token
    ownerless: int = 0  # rows whose choice has ended meanwhile


def take(worker: Worker, result: Result, frontends: Frontends) -> Taken:
    """Take the result of the oldest plan in flight. Raises BadResult if it does not answer it."""
    flight = worker.in_flight[0]
    s, outputs = worker.slots, len(flight.slots)
    if result.step != flight.step or len(result.flags) != outputs:
        raise BadResult(f"step {result.step} with {len(result.flags)} outputs, where step {flight.step} has {outputs}")
    _check_scored(worker, flight)
    taken = Taken()
    slots, ids = flight.slots, unpack(result.ids)
    rows: Index | None = None
    flagged: list[tuple[int, int]] = []
    untouched = worker.version == flight.version
    if not untouched or len(ids) != outputs or result.flags.count(0) != outputs:
        live = s.generation[slots] == flight.generations
        counts, flags = unpack(result.counts), np.frombuffer(result.flags, dtype=np.uint8)
        flagged = [(int(slots[i]), int(flags[i])) for i in (live & (flags > 0)).nonzero()[0].tolist()]
        if any(flag & DEAD for _, flag in flagged) or (live & (counts == 0) & (flags & NAN == 0)).any():
            raise BadResult(f"step {result.step} has no token for a sequence that lives")
        taken.ownerless = int(outputs - live.sum())
        rows = (live & (counts > 0)).nonzero()[0]
        ids = ids[(np.cumsum(counts) - counts)[rows]]
        slots = slots[rows]
    worker.in_flight.popleft()
    for index, n in flight.credit:
        frontends.at(index).in_flight -= n
    taken.slots = slots
    decoding = flight.decoding if rows is None else None
    if decoding is not None and len(slots):
        firsts = s.known[slots]
        s.flat_history[decoding.base + firsts] = ids
        s.known += decoding.one
        if len(flight.credit) == 1:
            _tell(result, frontends.at(flight.credit[0][0]), worker, taken, decoding, ids, firsts - decoding.prompts)
        else:
            _tell_each(worker, result, frontends, taken, slots, ids, firsts, None)
        last = (decoding.mask & (s.known >= s.limit)).nonzero()[0]
        taken.ended = [c for c in (s.choice[slot] for slot in last.tolist()) if c is not None]
    elif len(slots):
        firsts = s.known[slots]
        ends = firsts + 1
        s.history[slots, firsts] = ids
        s.known[slots] = ends
        _tell_each(worker, result, frontends, taken, slots, ids, firsts, rows)
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


def scorer_of(worker: Worker, message: Scored) -> Choice | None:
    """Whose prompt a worker reports, None if it has lost its slot meanwhile. Raises BadResult if no plan asked for that."""
    flight = worker.in_flight[0] if worker.in_flight else None
    if flight is None or flight.step != message.step or message.row >= len(flight.row_slots):
        raise BadResult(f"step {message.step} reports of row {message.row}, which is not in flight")
    slot = int(flight.row_slots[message.row])
    choice = worker.slots.choice[slot]
    if choice is None or worker.slots.generation[slot] != flight.row_generations[message.row]:
        return None
    scores, request = message.scores, choice.request
    if not choice.scores or len(scores.ids) // 4 != scores.count * (1 + request.params.prompt_logprobs):
        raise BadResult(f"step {message.step} reports of row {message.row} what was not asked for")
    if scores.first > request.scored or scores.first + scores.count > len(request.prompt):
        raise BadResult(f"step {message.step} reports of positions from {scores.first} on, not from {request.scored}")
    return choice


def _check_scored(worker: Worker, flight: InFlight) -> None:
    """A scorer ends with its last row's scores, which come before that row's result. Raises BadResult if it has not."""
    for slot, generation in flight.scored:
        if worker.slots.generation[slot] == generation:
            raise BadResult(f"step {flight.step} ends a prompt whose log probabilities have not been reported")


def _seal(worker: Worker, flight: InFlight) -> None:
    """Name the blocks that decoding filled in this step. Their last token has been known since the step before."""
    s = worker.slots
    slots, generations, indices = flight.filled
    if worker.version != flight.version or worker.draining:
        live = (s.generation[slots] == generations) & (s.state[slots] != DRAIN)
        slots, indices = slots[live], indices[live]
    packed = s.block_history[slots, indices].tobytes()
    names = []
    copy, width, offset = worker.hasher.keyed.copy, 4 * worker.block_size, 0
    for slot in slots.tolist():
        chain = s.names[slot]
        state = copy()
        state.update((chain[-1] if chain else _root(worker, slot)) + packed[offset : offset + width])
        name = state.digest()
        chain.append(name)
        names.append(name)
        offset += width
    worker.seals += worker.blocks.publish(s.table[slots, indices].tolist(), names)


def _root(worker: Worker, slot: int) -> bytes:
    choice = worker.slots.choice[slot]
    assert choice is not None
    return choice.request.root


def _tell(result: Result, frontend: Frontend, worker: Worker, taken: Taken, rows: DecodeRows, ids: Int32, firsts: Int32) -> None:
    """The message of a step that decodes for one frontend only: most of it is packed already."""
    if not frontend.session:
        _mute(worker, frontend, rows.slots)
        return
    logprobs = _logprobs(result, None) if result.lp_counts else NO_LOGPROBS
    columns = rows.handles_packed, rows.indices_packed, firsts.tobytes(), rows.ones_packed, result.ids
    message = frontend.tokens(*columns, logprobs)
    taken.tokens.append((frontend, message, len(ids)))


def _tell_each(
    worker: Worker,
    result: Result,
    frontends: Frontends,
    taken: Taken,
    slots: Index,
    ids: Int32,
    firsts: Int32,
    rows: Index | None,
) -> None:
    """One Tokens message per frontend that got any. `rows`: which outputs these are (None: all)."""
    s = worker.slots
    owners = s.frontend[slots]
    for index, n in per_frontend(owners):
        frontend = frontends.at(index)
        group = (owners == index).nonzero()[0] if n < len(slots) else np.arange(n)
        theirs = slots[group]
        if not frontend.session:
            _mute(worker, frontend, theirs)
            continue
        logprobs = _logprobs(result, group if rows is None else rows[group]) if result.lp_counts else NO_LOGPROBS
        message = frontend.tokens(
            handles=pack(s.handle[theirs]),
            choices=pack(s.index[theirs]),
            firsts=pack(firsts[group] - s.prompt[theirs]),
            counts=np.ones(n, dtype="<i4").tobytes(),
            ids=pack(ids[group]),
            logprobs=logprobs,
        )
        taken.tokens.append((frontend, message, n))


def _mute(worker: Worker, frontend: Frontend, slots: Index) -> None:
    """Tokens for a frontend whose session has ended: known, and unsent until somebody names the request."""
    for slot in slots.tolist():
        choice = worker.slots.choice[slot]
        assert choice is not None
        choice.request.unsent += 1
    frontend.unsent += len(slots)


def _logprobs(result: Result, rows: Index | None) -> Logprobs:
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
