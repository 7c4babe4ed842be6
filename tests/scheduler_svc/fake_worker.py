"""A KV-faithful worker: a block holds, per offset, a hash of the whole prefix up to there, written through the table it was sent.

What it samples depends on everything stored along the table. A stale plan, a block given away too early or a wrong
table changes the output.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from protocol.columns import pack, pack_floats, unpack
from protocol.messages import DEAD, NAN, STOPPED, Geometry, Hello, Plan, Ready, Result, Scored, Scores
from scheduler_svc.engine import Engine
from tests.scheduler_svc.formulas import STOP, TOKENIZER, digest, likelihood, prefix, sample
from tests.scheduler_svc.wire import through


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
    name: str = ""
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
        self.name = self.name or f"w{self.incarnation}"  # another process may come back under it
        hello = Hello("worker", self.name, self.incarnation, 1, failed_session=failed_session, failed_step=failed_step)
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
