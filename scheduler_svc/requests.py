"""Requests and their choices, what a client asked for and what becomes of it.

A choice (one output of a request) is what gets scheduled: it has tokens, a slot while it runs, and an end of its own.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np

from protocol.columns import EMPTY, Int32, unpack
from protocol.messages import Failed, SamplingParams, Submit

if TYPE_CHECKING:
    from scheduler_svc.frontends import Frontend
    from scheduler_svc.models import Model
    from scheduler_svc.prefix import Chain
    from scheduler_svc.swap import Swap
    from scheduler_svc.waiting import Queue
    from scheduler_svc.worker import Worker

Key = tuple[int, float, int, int]  # priority, arrival, number of the request, index of the choice
SCORER = -1  # index of the choice that reports a prompt's log probabilities: it comes before the outputs


class State(enum.Enum):
    """Where a choice is."""

    WAITING = "waiting"  # in a queue, or on its way into one
    FORKING = "forking"  # tied to a sibling whose prefill it will share
    RUNNING = "running"  # in a slot
    DRAINING = "draining"  # preempted: in a slot still, until its last row is acknowledged
    ENDED = "ended"


class Choice:
    """One output. Its known tokens are in `tokens`, or in its worker's history while it has a slot.

    A scorer (`scores`) is no output: it computes its request's prompt, all but the last token, reports log probabilities
    from `request.scored` on, and ends with the last of them. The outputs find its blocks by their hashes.
    """

    __slots__ = (
        "cached_record",
        "chains",
        "dismissed",
        "forks",
        "index",
        "key",
        "no_hits",
        "queue",
        "request",
        "scores",
        "seed",
        "shared_blocks",
        "slot",
        "state",
        "swap",
        "tokens",
        "was_running",
        "worker",
    )

    def __init__(self, request: Request, index: int, seed: int, tokens: Int32) -> None:
        self.request = request
        self.index = index
        self.scores = index == SCORER
        self.seed = seed
        self.tokens = tokens
        self.state = State.WAITING
        self.key: Key = (request.priority, request.arrival, request.number, index)
        self.queue: Queue | None = None
        self.worker: Worker | None = None  # where it runs, or last ran in this worker's session
        self.slot = -1
        self.cached_record = 0  # its record at `worker`; 0: none
        self.forks: list[Choice] = []  # siblings that will share this one's prefill
        self.chains: dict[int, Chain] = {}  # block size -> names of the full blocks of prompt + tokens
        self.was_running = False  # its tenant has been charged for it
        self.dismissed = False  # ended by its journal (a stop string), which its tokens do not show
        self.no_hits = False  # recompute alone (after a NaN)
        self.shared_blocks = 0  # blocks of its table that it did not fill itself
        self.swap: Swap | None = None  # where its blocks are, if it was swapped out at `worker`

    @property
    def known(self) -> Int32:
        """Its tokens so far, prompt excluded."""
        if self.slot >= 0 and self.worker is not None:
            slots = self.worker.slots
            return slots.history[self.slot, slots.prompt[self.slot] : slots.known[self.slot]].copy()
        return self.tokens

    @property
    def length(self) -> int:
        """Tokens of prompt and output, for a choice without a slot."""
        return len(self.request.prompt) + len(self.tokens) - self.scores

    @property
    def all_tokens(self) -> Int32:
        """Prompt and output, for a choice without a slot."""
        if self.scores:
            return self.request.prompt[:-1]
        return np.concatenate((self.request.prompt, self.tokens)) if len(self.tokens) else self.request.prompt

    @property
    def limit(self) -> int:
        """The length at which it ends."""
        return self.length if self.scores else len(self.request.prompt) + self.request.params.max_tokens

    @property
    def most_cached(self) -> int:
        """Tokens that it may take from a cache: what it samples or reports must be computed."""
        return self.request.scored - 1 if self.scores else self.length - 1


class Request:
    """What a client asked for."""

    __slots__ = (
        "admitted",
        "arrival",
        "awaits_until",
        "cached",
        "chains",
        "choices",
        "deadline",
        "ended",
        "failure",
        "frontend",
        "handle",
        "held_since",
        "id",
        "model",
        "number",
        "owner",
        "params",
        "priority",
        "prompt",
        "quarantined",
        "queued",
        "root",
        "scored",
        "scorer",
        "strikes",
        "submit",
        "tenant",
        "trial",
        "unsent",
    )

    def __init__(self, submit: Submit, number: int, priority: int, model: Model, frontend: Frontend, root: bytes, now: float) -> None:
        self.id = submit.request
        self.number = number
        self.submit = submit
        self.prompt: Int32 = unpack(submit.prompt)
        self.params: SamplingParams = submit.params
        self.model = model
        self.frontend = frontend
        self.handle = submit.handle
        self.owner = submit.owner
        self.admitted = submit.admitted
        self.arrival = now - submit.age
        self.deadline = now + submit.deadline if submit.deadline > 0 else 0.0
        self.priority = priority
        self.tenant = submit.tenant
        self.cached = submit.cached
        self.queued = 0.0  # seconds from its arrival to its first admission
        self.root = root
        self.failure: Failed | None = None
        self.ended = False
        self.unsent = 0  # tokens known but not sent, its frontend being away
        self.held_since = 0.0  # since when no ready worker could take it, or some part of it
        self.awaits_until = 0.0  # until when some of it waits for a lost worker's return
        self.strikes = 0  # failures it was part of since its last known token
        self.trial = 0  # suspected of breaking steps: runs only beside those of the same number
        self.quarantined = False  # likely to break its next step too: tried at a worker apart (suspects.py)
        self.chains: dict[int, Chain] = {}  # block size -> names of the prompt's full blocks, for all fresh choices
        self.choices = [Choice(self, c.index, c.seed, unpack(c.known) if c.known else EMPTY) for c in submit.choices]
        self.scored = submit.scored  # the first prompt position whose log probabilities have not been told
        self.scorer: Choice | None = None

    @property
    def work(self) -> list[Choice]:
        """Everything that gets scheduled: the scorer, if there is one, and the choices."""
        return self.choices if self.scorer is None else [self.scorer, *self.choices]

    @property
    def unscored(self) -> bool:
        """Whether log probabilities of the prompt are still to be told."""
        return self.params.prompt_logprobs >= 0 and self.scored < len(self.prompt)

    @property
    def size(self) -> int:
        """Bytes that keeping it costs, nearly."""
        kept = len(self.submit.prompt) + len(self.submit.header) + 4 * sum(len(c.tokens) for c in self.choices)
        return kept + sum(len(c.known) for c in self.submit.choices) + 1024
