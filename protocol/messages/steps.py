"""A step: one plan and its result, between scheduler and worker."""

from __future__ import annotations

from numpy import add, int64, maximum

from protocol.columns import BadMessage, equal_rows, rows, within
from protocol.messages.base import Geometry, Message, Part, Scores, check_logprobs, check_seed, check_trace
from protocol.messages.requests import SamplingParams


class Admit(Part, frozen=True):
    """A choice that its worker has not met in this session: everything about it, sent once."""

    record: int
    prompt: bytes  # tokens
    known: bytes  # tokens sampled before
    seed: int
    params: SamplingParams
    trace: str = ""  # traceparent of the request's span, if somebody traces it

    @property
    def size(self) -> int:
        """Bytes of its columns."""
        return len(self.prompt) + len(self.known) + self.params.size


class Plan(Message, tag="plan", frozen=True):
    """Scheduler → worker: one step. Applied in the order of the fields; never depends on a sampled value.

    Rows: row i computes tokens starts[i] … starts[i] + counts[i] − 1 (absolute positions) of the record bound to
    slots[i], and samples at most outputs[i] tokens behind the last of them (0: a chunk that does not end its prefill).
    A position below the record's known length is read from its history, else it is the slot's last sampled token.
    Forks: the logits of row fork_rows[i] are sampled for slot fork_slots[i] as well.
    The outputs of a step are, in this order: the rows with outputs > 0, then the forks.
    Scores: row i reports the log probabilities of its prompt at positions scores[i] … starts[i] + counts[i] (0: none).
    """

    step: int
    # records and slots given up
    drops: bytes = b""  # records to forget
    frees: bytes = b""  # slots unbound
    # hashes: a sealed block is reported after a lost session, a withdrawn one is not
    seals: bytes = b""  # blocks
    seal_hashes: bytes = b""  # 16 bytes each
    withdrawals: bytes = b""  # blocks
    # new records, and slots bound to a record under a new generation (their tables start empty)
    admits: list[Admit] = []
    bind_slots: bytes = b""
    bind_generations: bytes = b""
    bind_records: bytes = b""
    # table[slot, index] = block; an assigned block will be written (its hash is forgotten), a shared one is only read
    assign_slots: bytes = b""
    assign_indices: bytes = b""
    assign_blocks: bytes = b""
    share_slots: bytes = b""
    share_indices: bytes = b""
    share_blocks: bytes = b""
    # copies, before the rows: device to device, device to host, host to device
    copy_from: bytes = b""
    copy_to: bytes = b""
    out_from: bytes = b""
    out_to: bytes = b""
    in_from: bytes = b""
    in_to: bytes = b""
    # the rows
    slots: bytes = b""
    generations: bytes = b""
    starts: bytes = b""
    counts: bytes = b""
    outputs: bytes = b""
    fork_rows: bytes = b""
    fork_slots: bytes = b""
    scores: bytes = b""  # empty: no row has any. Since protocol 3

    def check(self, geometry: Geometry | None = None) -> None:
        if geometry is None:
            raise BadMessage("plan", "arrived before the worker announced its geometry")
        g = geometry
        rows(self.drops, "drops")
        within(self.frees, "frees", 0, g.slots)
        if rows(self.seals, "seals") != rows(self.seal_hashes, "seal_hashes", 16):
            raise BadMessage("seal_hashes", "must be one per block")
        within(self.seals, "seals", 0, g.blocks)
        within(self.withdrawals, "withdrawals", 0, g.blocks)
        for admit in self.admits:
            if not rows(admit.prompt, "prompt"):
                raise BadMessage("prompt", "is empty")
            within(admit.prompt, "prompt", 0, g.vocab_size)
            rows(admit.known, "known")
            within(admit.known, "known", 0, g.vocab_size)
            if rows(admit.prompt, "prompt") + rows(admit.known, "known") > g.max_model_len:
                raise BadMessage("prompt", "is longer than max_model_len")
            check_seed(admit.seed)
            check_trace(admit.trace)
            admit.params.check(g.vocab_size)
        if self.bind_slots or self.bind_generations or self.bind_records:
            equal_rows(("bind_slots", self.bind_slots), ("bind_generations", self.bind_generations), ("bind_records", self.bind_records))
            within(self.bind_slots, "bind_slots", 0, g.slots)
        # Asked before names are made of them: most plans have none of these.
        if self.assign_slots or self.assign_indices or self.assign_blocks or self.share_slots or self.share_indices or self.share_blocks:
            for kind in ("assign", "share"):
                self._check_group(kind, ("slots", "indices", "blocks"), (g.slots, g.table_width, g.blocks))
        if self.copy_from or self.copy_to or self.out_from or self.out_to or self.in_from or self.in_to:
            copies = ("copy", (g.blocks, g.blocks)), ("out", (g.blocks, g.host_blocks)), ("in", (g.host_blocks, g.blocks))
            for kind, highs in copies:
                self._check_group(kind, ("from", "to"), highs)
        n = equal_rows(
            ("slots", self.slots),
            ("generations", self.generations),
            ("starts", self.starts),
            ("counts", self.counts),
            ("outputs", self.outputs),
        )
        if n > g.slots:
            raise BadMessage("slots", "more rows than slots")
        within(self.slots, "slots", 0, g.slots)
        starts = within(self.starts, "starts", 0, g.max_model_len)
        counts = within(self.counts, "counts", 1, g.max_step_tokens + 1)
        if n and int(maximum.reduce(starts.astype(int64) + counts)) > g.max_model_len:
            raise BadMessage("counts", "reach beyond max_model_len")
        if n and int(add.reduce(counts)) > g.max_step_tokens:
            raise BadMessage("counts", "sum to more than max_step_tokens")
        within(self.outputs, "outputs", 0, 2)
        if self.fork_rows or self.fork_slots:
            self._check_group("fork", ("rows", "slots"), (max(n, 1), g.slots))
        if self.scores:
            if rows(self.scores, "scores") != n:
                raise BadMessage("scores", "must be one per row")
            firsts = within(self.scores, "scores", 0, g.max_model_len + 1)
            if ((firsts > 0) & ((firsts <= starts) | (firsts > starts + counts))).any():
                raise BadMessage("scores", "names a position that its row does not predict")

    def _check_group(self, kind: str, parts: tuple[str, ...], highs: tuple[int, ...]) -> None:
        """Columns `kind_part` that belong together: of equal rows, each below its bound."""
        columns = [getattr(self, f"{kind}_{part}") for part in parts]
        if any(columns):
            named = [(f"{kind}_{part}", column) for part, column in zip(parts, columns, strict=True)]
            equal_rows(*named)
            for (field, column), high in zip(named, highs, strict=True):
                within(column, field, 0, high)


STOPPED = 1  # flag of an output: a stop id ended the choice, the slot is dead
NAN = 2  # flag of an output: its logits held a NaN; no token
DEAD = 4  # flag of an output: its slot was dead already; no token


class Result(Message, tag="result", frozen=True):
    """Worker → scheduler: what a step sampled, one entry per output of its plan, in the plan's order."""

    step: int
    counts: bytes  # tokens per output
    ids: bytes  # tokens, flat
    flags: bytes  # uint8 per output: STOPPED, NAN, DEAD
    copied: int = 0  # swap copies of all steps up to this one are complete
    seconds: float = 0.0  # device time of the step
    idle: float = 0.0  # device time since the step before it; 0 if no slot was bound meanwhile
    lp_counts: bytes = b""  # pairs per token of each output; empty: no output has logprobs
    lp_ids: bytes = b""
    lp_values: bytes = b""  # float32
    lp_ranks: bytes = b""

    def check(self, geometry: Geometry | None = None) -> None:
        n = rows(self.counts, "counts")
        if len(self.flags) != n:
            raise BadMessage("flags", "must be one per output")
        counts = within(self.counts, "counts", 0, 2)
        if int(counts.sum()) != rows(self.ids, "ids"):
            raise BadMessage("ids", "must be as many as counts say")
        if geometry is not None:
            within(self.ids, "ids", 0, geometry.vocab_size)
            if n > geometry.slots:
                raise BadMessage("counts", "more outputs than slots")
        if self.lp_counts:
            if rows(self.lp_counts, "lp_counts") != n:
                raise BadMessage("lp_counts", "must be one per output")
            check_logprobs(self.lp_counts, counts, self.lp_ids, self.lp_values, self.lp_ranks)


class Scored(Message, tag="scored", frozen=True):
    """Worker → scheduler, before the step's result: what one of its rows reports of its prompt, in slices. Since protocol 3."""

    step: int
    row: int
    scores: Scores

    def check(self, geometry: Geometry | None = None) -> None:
        if self.row < 0:
            raise BadMessage("row", "is negative")
        self.scores.check()
        if geometry is not None:
            within(self.scores.ids, "ids", 0, geometry.vocab_size)


class Progress(Message, tag="progress", frozen=True):
    """Worker → scheduler, while work is outstanding: a counter that moves as long as the step does."""

    step: int
    counter: int
