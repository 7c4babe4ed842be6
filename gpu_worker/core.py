"""The worker's core: plans in, steps out; outcomes in, results out. No I/O, no clock, no torch.

Two threads share it. `apply` is called on the main thread, `result` on the output thread; what both touch is a
record's history, where the one appends behind what the other reads, and one number, the step up to which copies to
the host are complete. `reset` and `ready` are called with neither at work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpu_worker.runner import Description, Outcome, Record, Step
from gpu_worker.slots import UNASSIGNED, BlockTables, PlanError, Rows, SealedBlocks, Slots
from protocol.columns import EMPTY, Int32, pack, pack_floats, unpack
from protocol.messages import FileChunk, FileRequest, Plan, Ready, Result, Scored, Scores

FILE_CHUNK = 256 << 10  # bytes of the tokenizer files in one message


@dataclass(slots=True)
class _CopyOut:
    """Blocks on their way to the host in one step, with the hashes that the copies will have once acknowledged."""

    step: int
    source: Int32
    target: Int32
    sealed: np.ndarray  # bool, per block
    hashes: np.ndarray  # uint8, [blocks, 16]

    def look_up(self, which: np.ndarray, sealed: SealedBlocks) -> None:
        """Some of the sources (bool, per block) have been sealed meanwhile, with nothing written since the copy."""
        self.sealed[which], self.hashes[which] = sealed.lookup(self.source[which])


class WorkerCore:
    """Records, slots and sealed hashes of one worker, for a runner that `description` describes."""

    def __init__(self, description: Description) -> None:
        geometry = description.geometry
        self.description = description
        self.records: dict[int, Record] = {}
        self.hash_key = b""
        self._slots = Slots(geometry.slots)
        self._tables = BlockTables(geometry.slots, geometry.table_width)
        self._sealed = SealedBlocks(geometry.blocks)
        self._host_sealed = SealedBlocks(geometry.host_blocks)
        self._copies: deque[_CopyOut] = deque()
        self._copied = 0
        self._step = 0

    # ------------------------------------------------------------ opening and ending a session

    def welcome(self, hash_key: bytes) -> None:
        """A session opens under this key: hashes made with another one mean nothing."""
        if hash_key != self.hash_key:
            self._sealed.clear()
            self._host_sealed.clear()
            self.hash_key = hash_key

    def ready(self) -> Ready:
        """What this worker is, and the sealed blocks it still holds."""
        d = self.description
        blocks, hashes = self._sealed.columns()
        host_blocks, host_hashes = self._host_sealed.columns()
        return Ready(
            model=d.model,
            fingerprint=d.fingerprint,
            geometry=d.geometry,
            attention=d.attention,
            eos=pack(d.eos),
            bos=d.bos,
            defaults=d.defaults,
            tokenizer=d.tokenizer,
            blocks=blocks,
            hashes=hashes,
            host_blocks=host_blocks,
            host_hashes=host_hashes,
        )

    def reset(self) -> None:
        """The session is over: drop slots, records and copies; what is sealed stays. Nothing may be in flight."""
        self._seal_copies()
        self.records.clear()
        self._slots.clear()
        self._tables.clear()
        self._copies.clear()
        self._copied = 0
        self._step = 0

    def file_chunk(self, request: FileRequest) -> FileChunk:
        """A piece of the tokenizer files; total −1 if these are not the files asked for."""
        return file_chunk(self.description, request)

    # ------------------------------------------------------------ plan → step

    def apply(self, plan: Plan) -> Step:
        """Take a plan that `plan.check(geometry)` has passed, the next in order. Raises PlanError: the step failed."""
        if plan.step != self._step + 1:
            raise PlanError(plan.step, "step", f"does not follow {self._step}")
        self._step = plan.step
        after_rest = not self._slots.bound
        self._release(plan)
        self._seal(plan)
        self._seal_copies()
        self._withdraw(plan)
        bind_slots, bind_records = self._bind(plan)
        self._tables.apply(plan)
        if plan.assign_blocks:
            self._sealed.forget(unpack(plan.assign_blocks))
        self._copy(plan)
        return self._rows(plan, bind_slots, bind_records, after_rest)

    def _release(self, plan: Plan) -> None:
        if plan.drops:
            for record in unpack(plan.drops).tolist():
                if self.records.pop(record, None) is None:
                    raise PlanError(plan.step, "drops", f"record {record} is not known")
        if plan.frees:
            for slot in unpack(plan.frees).tolist():
                self._slots.free(slot)

    def _seal(self, plan: Plan) -> None:
        if plan.seals:
            blocks = unpack(plan.seals)
            self._sealed.seal(blocks, np.frombuffer(plan.seal_hashes, np.uint8).reshape(-1, 16))
            for copy in self._copies:  # begun before their sources' seals came
                copy.look_up(np.isin(copy.source, blocks), self._sealed)

    def _withdraw(self, plan: Plan) -> None:
        if plan.withdrawals:
            withdrawn = unpack(plan.withdrawals)
            _, hashes = self._sealed.lookup(withdrawn)
            self._sealed.forget(withdrawn)
            self._host_sealed.forget_copies(hashes)
            for copy in self._copies:
                copy.sealed &= ~np.isin(copy.source, withdrawn)

    def _seal_copies(self) -> None:
        """Host blocks whose copies are complete bear their sources' hashes from now on."""
        while self._copies and self._copies[0].step <= self._copied:
            copy = self._copies.popleft()
            self._host_sealed.seal(copy.target[copy.sealed], copy.hashes[copy.sealed])

    def _bind(self, plan: Plan) -> tuple[Int32, list[Record]]:
        max_model_len = self.description.geometry.max_model_len
        for admit in plan.admits:
            if admit.record in self.records:
                raise PlanError(plan.step, "admits", f"record {admit.record} is known already")
            self.records[admit.record] = Record(
                admit.record, unpack(admit.prompt), unpack(admit.known), admit.seed, admit.params, max_model_len
            )
        if not plan.bind_slots:
            return EMPTY, []
        slots = unpack(plan.bind_slots)
        bound: list[Record] = []
        for slot, generation, id in zip(
            slots.tolist(), unpack(plan.bind_generations).tolist(), unpack(plan.bind_records).tolist(), strict=True
        ):
            record = self.records.get(id)
            if record is None:
                raise PlanError(plan.step, "bind_records", f"record {id} is not known")
            if generation < 0:
                raise PlanError(plan.step, "bind_generations", f"{generation} is negative")
            self._slots.bind(slot, generation, record)
            bound.append(record)
        return slots, bound

    def _copy(self, plan: Plan) -> None:
        if plan.copy_to:
            self._sealed.forget(unpack(plan.copy_to))
        if plan.in_to:
            target = unpack(plan.in_to)
            self._sealed.forget(target)
            self._sealed.expect(target, self._host_sealed.lookup(unpack(plan.in_from))[1])
        if plan.out_to:
            source, target = unpack(plan.out_from), unpack(plan.out_to)
            self._host_sealed.forget(target)
            self._copies.append(_CopyOut(plan.step, source, target, *self._sealed.lookup(source)))

    def _rows(self, plan: Plan, bind_slots: Int32, bind_records: list[Record], after_rest: bool) -> Step:
        rows = self._slots.rows_of(plan)
        starts, counts, outputs = unpack(plan.starts), unpack(plan.counts), unpack(plan.outputs)
        known = np.minimum(np.maximum(rows.known - starts, 0), counts)
        self._check_rows(plan, rows, starts + counts, outputs, counts - known)
        prefill = [rows.records[i].history[starts[i] : starts[i] + known[i]] for i in known.nonzero()[0].tolist()]
        fork_rows, fork_slots, fork_records = self._forks(plan, outputs) if plan.fork_slots else (EMPTY, EMPTY, [])
        return Step(
            plan=plan,
            records=rows.records,
            slots=rows.slots,
            starts=starts,
            counts=counts,
            outputs=outputs,
            known=known,
            prefill=np.concatenate(prefill) if prefill else EMPTY,
            fork_rows=fork_rows,
            fork_slots=fork_slots,
            fork_records=fork_records,
            bind_slots=bind_slots,
            bind_records=bind_records,
            scores=_scores(plan, rows) if plan.scores else EMPTY,
            after_rest=after_rest,
        )

    def _check_rows(self, plan: Plan, rows: Rows, ends: Int32, outputs: Int32, unknown: Int32) -> None:
        # count_nonzero: on columns this short it takes a quarter of the time of `any` or `max`.
        if np.count_nonzero(unknown > 1):
            raise PlanError(plan.step, "starts", f"slot {rows.slots[unknown.argmax()]} would read a token that was never sampled")
        if np.count_nonzero(self._tables.table[rows.slots, (ends - 1) // self.description.geometry.block_size] == UNASSIGNED):
            raise PlanError(plan.step, "counts", "a row reaches beyond its block table")
        if np.count_nonzero(ends + outputs > rows.capacity):
            raise PlanError(plan.step, "outputs", "a row samples beyond its record's max_tokens")

    def _forks(self, plan: Plan, outputs: Int32) -> tuple[Int32, Int32, list[Record]]:
        rows, slots = unpack(plan.fork_rows), unpack(plan.fork_slots)
        records = [self._record_of(plan, "fork_slots", slot) for slot in slots.tolist()]
        if not outputs[rows].all():
            raise PlanError(plan.step, "fork_rows", "a row that samples nothing is forked")
        return rows, slots, records

    def _record_of(self, plan: Plan, field: str, slot: int) -> Record:
        record = self._slots.records[slot]
        if record is None:
            raise PlanError(plan.step, field, f"slot {slot} has no record")
        return record

    # ------------------------------------------------------------ outcome → result

    def result(self, step: Step, outcome: Outcome) -> Result:
        """Take what a step sampled into the records, and say it."""
        tokens = outcome.tokens
        taken = tokens >= 0
        ids = tokens if np.count_nonzero(taken) == len(taken) else tokens[taken]
        for record, token in zip(step.output_records, tokens.tolist(), strict=True):
            if token >= 0:
                record.append(token)
        self._copied = outcome.copied
        return Result(
            step=step.plan.step,
            counts=pack(taken),
            ids=pack(ids),
            flags=outcome.flags.tobytes(),
            copied=outcome.copied,
            seconds=outcome.seconds,
            idle=0.0 if step.after_rest else outcome.idle,
            lp_counts=pack(outcome.lp_counts),
            lp_ids=pack(outcome.lp_ids),
            lp_values=pack_floats(outcome.lp_values),
            lp_ranks=pack(outcome.lp_ranks),
        )


def _scores(plan: Plan, rows: Rows) -> Int32:
    scores = unpack(plan.scores)
    for i in scores.nonzero()[0].tolist():
        if scores[i] >= rows.records[i].prompt_length or rows.records[i].params.prompt_logprobs < 0:
            raise PlanError(plan.step, "scores", f"slot {rows.slots[i]} has nothing to report there")
    return scores


def scored(step: Step, outcome: Outcome) -> Iterator[Scored]:
    """What a step reports of its rows' prompts, a message a slice; to be sent before the step's result."""
    for part in outcome.scores:
        yield Scored(step.plan.step, part.row, Scores(part.first, pack(part.ids), pack_floats(part.values), pack(part.ranks)))


def file_chunk(description: Description | None, request: FileRequest) -> FileChunk:
    """A piece of the tokenizer files of a worker, None while it is loading; total −1 if it has not these files."""
    bundle = description.bundle if description and description.tokenizer == request.tokenizer else None
    if bundle is None or not 0 <= request.offset <= len(bundle):
        return FileChunk(request.tokenizer, request.offset, -1, b"")
    return FileChunk(request.tokenizer, request.offset, len(bundle), bundle[request.offset : request.offset + FILE_CHUNK])
