"""Models: what workers announce, which workers serve one, how long its outputs are."""

from __future__ import annotations

import bisect
from collections import deque

from protocol.columns import EMPTY, unpack
from protocol.messages import ModelInfo, Ready, Submit
from protocol.series import Histogram
from scheduler_svc.requests import Request
from scheduler_svc.waiting import Queue, Shares
from scheduler_svc.worker import Worker

REMEMBERED = 64  # lost workers, by name
RECENT = 256  # outputs that a prediction looks back on
TRACED = 10_000  # admissions of traced requests that are kept until they are exported
GUESS = 256  # tokens expected before any output has ended


class Outputs:
    """Lengths of recent outputs, sorted beside in order of arrival, so that a percentile is a look-up."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self.expected = GUESS  # tokens; nine in ten recent outputs were no longer

    def add(self, length: int) -> None:
        """An output has ended with this many tokens."""
        if len(self._recent) == RECENT:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(length)
        bisect.insort(self._sorted, length)
        self.expected = max(self._sorted[len(self._sorted) * 9 // 10], 1)


class Tally:
    """What has been done for a model, for /metrics."""

    def __init__(self) -> None:
        self.queries = self.hits = 0  # tokens looked up in the prefix cache, and found there
        self.preemptions = 0
        self.steps = Histogram("vllm:iteration_tokens_total")
        self.traced: deque[tuple[str, float, float]] = deque(maxlen=TRACED)  # (traceparent, arrival, first admission)


class Totals:
    """What a scheduler has done since its start. It outlives an engine, which ends whenever another scheduler takes over."""

    def __init__(self) -> None:
        self.finished = self.failed = self.aborted = 0  # requests
        self._tallies: dict[str, Tally] = {}  # by model

    def tally(self, model: str) -> Tally:
        """What has been done for a model."""
        return self._tallies.setdefault(model, Tally())


class Model:
    """One model, known since its first worker's READY (or since a request asked for it before any worker came)."""

    def __init__(self, name: str, shares: Shares, tally: Tally) -> None:
        self.name = name
        self.ready: Ready | None = None  # what its first worker announced
        self.eos = EMPTY
        self.workers: list[Worker] = []  # ready ones
        self.queue = Queue(shares)  # choices that no ready worker can take
        self.outputs = Outputs()
        self.tally = tally
        self.longest = 0  # tokens that the largest worker seen could hold
        self.max_model_len = 0
        self.lost_at = float("-inf")  # when a worker was last lost
        self._absent: dict[str, float] = {}  # workers that were lost and have not come back, and when that was, by name

    def join(self, worker: Worker, ready: Ready) -> None:
        """A worker of this model can serve."""
        if self.ready is None:
            self.ready = ready
            self.eos = unpack(ready.eos)
        self.workers.append(worker)
        self._absent.pop(worker.name, None)
        self.longest = max(self.longest, worker.capacity)
        self.max_model_len = max(self.max_model_len, ready.geometry.max_model_len)

    def lose(self, worker: Worker, now: float) -> None:
        """A worker is gone, and did not mean to."""
        self.workers.remove(worker)
        self.lost_at = self._absent[worker.name] = now
        if len(self._absent) > REMEMBERED:
            del self._absent[next(iter(self._absent))]

    def has_another(self, lost: Worker, since: float) -> bool:
        """Whether there is another worker than the lost one, or was at a time and may come back."""
        self._absent = {name: at for name, at in self._absent.items() if at >= since}
        return bool(self.workers) or any(name != lost.name for name in self._absent)

    def refusal(self, ready: Ready) -> str:
        """Why a worker cannot be of this model, or nothing."""
        if self.ready is None or self.ready.fingerprint == ready.fingerprint:
            return ""
        return f"a model named {self.name!r} with another fingerprint is being served"

    def info(self, loading: int) -> ModelInfo | None:
        """The model as frontends see it; None while no worker has announced it."""
        ready = self.ready
        if ready is None:
            return None
        return ModelInfo(
            name=self.name,
            fingerprint=ready.fingerprint,
            max_model_len=self.max_model_len,
            vocab_size=ready.geometry.vocab_size,
            eos=ready.eos,
            defaults=ready.defaults,
            tokenizer=ready.tokenizer,
            workers_ready=len(self.workers),
            workers_loading=loading,
            bos=ready.bos,
        )

    def fits(self, request: Request) -> bool:
        """Whether the largest worker seen could hold one choice of the request to its end."""
        return len(request.prompt) + request.params.max_tokens <= self.longest

    def wait(self, waiting: int) -> float:
        """Seconds until so many choices that wait have found a slot: each frees one after its expected output."""
        rate = sum(worker.slots.count / worker.step_seconds for worker in self.workers if worker.step_seconds)
        return waiting * self.outputs.expected / rate if rate else 0.0

    def objection(self, request: Submit) -> str:
        """Why the model cannot read a prompt, or nothing. Known only once a worker has announced the vocabulary."""
        if self.ready is None:
            return ""
        size = self.ready.geometry.vocab_size
        return f"A token id is outside the model's vocabulary of {size}." if int(unpack(request.prompt).max()) >= size else ""
