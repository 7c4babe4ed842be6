"""The way of a choice from its arrival into a queue: named block by block, routed, held if no worker can take it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import inf

from protocol.counters import Counters
from scheduler_svc.hits import found_tokens
from scheduler_svc.ledger import Ledger
from scheduler_svc.models import Model
from scheduler_svc.prefix import Hasher, Recent
from scheduler_svc.requests import Choice, Request, State
from scheduler_svc.routing import Router
from scheduler_svc.settings import SchedulerSettings
from scheduler_svc.worker import Worker

HASHED_BLOCKS = 1024  # named between two plans: 0.4 ms; with fewer, prompts of thousands of tokens come too late to fill a step
TAKEN_OVER = 32  # names taken over from another prompt, which cost what one that is made costs
ARRIVALS = 64  # choices routed between two plans


class Arrivals:
    """Choices on their way. The work is done in slices, between plans."""

    def __init__(
        self, settings: SchedulerSettings, ledger: Ledger, models: dict[str, Model], counters: Counters, loading: Callable[[], int]
    ) -> None:
        """`loading()`: workers that have not said READY yet."""
        self._settings = settings
        self._ledger = ledger
        self._models = models
        self._counters = counters
        self.loading = loading
        self._router = Router(settings.routing)
        self.hasher: Hasher
        self._recent: Recent
        self._entries: deque[tuple[Choice, int]] = deque()  # with their tokens
        self._tokens = 0

    def begin(self, hasher: Hasher) -> None:
        """Names are made with this key from here on."""
        self.hasher, self._recent = hasher, Recent(hasher)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __iter__(self) -> Iterator[Choice]:
        return (choice for choice, _ in self._entries)

    def enqueue(self, choice: Choice, now: float) -> None:
        """Let a choice wait; it is hashed and routed between plans."""
        choice.state = State.WAITING
        request = choice.request
        request.held_since = request.held_since or now
        if request.deadline and not request.admitted:
            self._ledger.later(request.deadline, request, self._overdue)
        self._entries.append((choice, choice.length))
        self._tokens += choice.length

    def advance(self, now: float) -> None:
        """Name some blocks of the arrivals, and let those which are complete wait at a worker."""
        blocks = HASHED_BLOCKS
        for _ in range(ARRIVALS):
            if not self._entries:
                return
            choice, tokens = self._entries[0]
            if choice.state is State.WAITING and choice.queue is None:
                blocks -= self._name(choice, blocks)
                if blocks <= 0:
                    return
                self._route(choice, now)
            self._entries.popleft()
            self._tokens -= tokens

    def _name(self, choice: Choice, most: int) -> int:
        """Name at most `most` blocks of the choice, for every block size among the model's workers."""
        named = 0
        if not self._settings.enable_prefix_caching:
            return named
        for size in {worker.block_size for worker in choice.request.model.workers}:
            chain = choice.chains.get(size)
            if chain is None:
                request, fresh = choice.request, not len(choice.tokens)
                chain = request.chains.get(size) if fresh else None
                if chain is None:
                    chain = self._recent.chain(size, request.prompt if fresh else choice.all_tokens, request.root)
                    named += len(chain.names) // TAKEN_OVER
                choice.chains[size] = chain
                if fresh:
                    request.chains[size] = chain
            named += chain.extend(max(1, most - named))
            if not chain.complete:
                return most
        return named

    def _route(self, choice: Choice, now: float) -> None:
        worker = self._router.route(choice.request.model.workers, choice, now)
        if worker is not None:
            worker.queue.add(choice)
            if not any(other.queue is choice.request.model.queue for other in choice.request.work):
                choice.request.held_since = 0.0
            return
        choice.request.model.queue.add(choice)
        choice.request.held_since = choice.request.held_since or now
        self._hold(choice.request, now)

    def _hold(self, request: Request, now: float) -> None:
        """Judge a request that no ready worker can take: is it worth waiting?"""
        model, times = request.model, self._settings.times
        if request.ended or not any(choice.queue is model.queue for choice in request.work):
            return
        settled = max(model.lost_at + times.move, now) if model.lost_at > -inf else now
        if not request.admitted and not self.loading() and settled <= now:
            if model.ready is not None and not model.fits(request):
                reason = f"The prompt of {len(request.prompt)} tokens and max_tokens of {request.params.max_tokens} exceed"
                self._ledger.fail(request, now, 400, "context_length_exceeded", f"{reason} the {model.longest} tokens that fit.", "prompt")
                return
            if model.ready is None and any(other.ready is not None for other in self._models.values()):
                self._ledger.fail(request, now, 404, "model_not_found", f"The model {model.name!r} does not exist.", "model")
                return
        end = request.held_since + times.hold
        if now >= end:
            self._ledger.fail(request, now, 503, "no_worker", "No worker has been able to take the request.", retry_after=times.move)
            return
        self._ledger.later(min(end, settled) if settled > now else end, request, self._hold)

    def leave(self, lost: Worker, choices: list[Choice], now: float) -> None:
        """The choices of a lost worker go to others at once, but for those that do better to wait for its return."""
        for choice in choices:
            if self._awaits(lost, choice, now):
                self._counters.add("scheduler_returns_awaited")
                choice.request.model.queue.add(choice)
                choice.request.held_since = now
                choice.request.awaits_until = now + self._settings.times.move
                self._ledger.later(choice.request.awaits_until, choice.request, self._move)
            else:
                self.enqueue(choice, now)

    def _awaits(self, lost: Worker, choice: Choice, now: float) -> bool:
        """Whether to compute what the lost worker may still hold takes every other worker longer than the move time.

        A quarantined one waits for a worker that comes back, not to harm those that serve; if there is but one, in vain.
        """
        if choice.request.quarantined:
            return not lost.leaving and choice.request.model.has_another(lost, now - self._settings.times.move)
        others = [worker for worker in choice.request.model.workers if worker.can_hold(choice)]
        if not others or lost.leaving or lost.hung:
            return False
        held = found_tokens(lost, choice)
        return min((held - found_tokens(worker, choice)) * worker.costs.token for worker in others) > self._settings.times.move

    def _move(self, request: Request, now: float) -> None:
        """The lost worker has not come back in time."""
        if now < request.awaits_until:
            return  # it has been back, and was lost again
        for choice in request.work:
            if choice.queue is request.model.queue:
                choice.queue.remove(choice)
                self.enqueue(choice, now)

    def review(self, now: float) -> None:
        """Workers have changed: judge again what waits for one."""
        for model in self._models.values():
            for request in {choice.request for choice in model.queue}:
                self._hold(request, now)

    def _overdue(self, request: Request, now: float) -> None:
        if not request.admitted:
            self._ledger.fail(request, now, 503, "queue_timeout", "the request waited longer than its queue_timeout", "queue_timeout")

    def steal(self, worker: Worker) -> None:
        """An idle worker fills its free slots with the first in line of workers that have no room, as far as its own goes."""
        if worker.is_full:
            return
        for other in worker.model.workers:
            while len(worker.queue) < len(worker.slots.free) and self._moves(other, worker):
                pass

    def _moves(self, other: Worker, worker: Worker) -> bool:
        """Move the first in line to another worker, if it waits for room there and finds it here."""
        if other is worker or not other.queue or (other.slots.free and not other.is_full and not other.proving):
            return False
        choice = other.queue.first(lambda _: False, 0)
        size = worker.block_size
        chained = choice is not None and (
            not self._settings.enable_prefix_caching or (size in choice.chains and choice.chains[size].complete)
        )
        if choice is None or not chained or not worker.can_hold(choice) or choice.swap is not None:
            return False
        if worker.queue.tokens + choice.length > worker.blocks.available * size:
            return False
        other.queue.remove(choice)
        if choice.worker is not None:
            choice.worker.drop_record(choice)
        worker.queue.add(choice)
        return True

    def waiting_for(self, model: Model) -> int:
        """Choices of a model that wait."""
        arriving = sum(choice.request.model is model for choice, _ in self._entries)
        return len(model.queue) + sum(len(worker.queue) for worker in model.workers) + arriving

    def waiting(self) -> tuple[int, int]:
        """Choices that wait, and their tokens."""
        queues = [model.queue for model in self._models.values()]
        queues += [worker.queue for model in self._models.values() for worker in model.workers]
        return sum(len(queue) for queue in queues) + len(self._entries), sum(queue.tokens for queue in queues) + self._tokens
