"""Who runs next. Continuous batching: after every step the batch is made up anew, so nobody waits for a batch to end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from simple_cache import SimpleCache


@dataclass
class Request:
    """A prompt and what has become of it."""

    id: str
    tokens: list[int]  # the prompt, then what was generated
    prompt_length: int
    max_tokens: int
    started: float  # seconds, on the caller's clock
    computed: int = 0  # tokens whose keys and values are in the cache
    text: str = ""  # the generated text, once it is complete

    @property
    def generated(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]


@dataclass
class Statistics:
    """What has been finished, and how long it took from arrival to end."""

    completed: int = 0
    total_duration: float = 0.0
    preemptions: int = 0

    @property
    def average_duration(self) -> float:
        """Seconds; 0 before anything has ended."""
        return self.total_duration / self.completed if self.completed else 0.0


@dataclass
class SimpleScheduler:
    """First come, first served, as far as the batch and the cache have room."""

    cache: SimpleCache
    max_batch_size: int = 4
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        """Raises ValueError for a batch that nobody fits in."""
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size: {self.max_batch_size} is less than 1")

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it could never run, not even alone."""
        needed = self.cache.blocks_for(request.prompt_length + request.max_tokens)
        if needed > self.cache.num_blocks:
            raise ValueError(f"prompt and max_tokens need {needed} blocks of the cache, which has {self.cache.num_blocks}")
        self.waiting.append(request)

    def has_unfinished(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self.waiting or self.running)

    def schedule(self) -> list[Request]:
        """The batch of the next step, oldest first; each request has blocks for all its tokens.

        Those that run go on. If one needs a block and none is free, the newest one has to step back: its blocks are
        freed, its tokens are kept, and it waits at the head of the queue until it can be computed again. Nobody new is
        admitted in such a step, or two requests could throw each other out for ever.
        """
        preempted = False
        for request in list(self.running):
            while request in self.running and not self.cache.grow(request.id, len(request.tokens)):
                self._preempt(self.running[-1])
                preempted = True
        while not preempted and self.waiting and len(self.running) < self.max_batch_size:
            request = self.waiting[0]
            if not self.cache.grow(request.id, len(request.tokens)):
                break
            self.running.append(self.waiting.popleft())
        return list(self.running)

    def complete_request(self, request: Request, duration: float) -> None:
        """Take a request out of the batch and free its blocks. duration: seconds since it came."""
        self.running.remove(request)
        self.cache.free(request.id)
        self.statistics.completed += 1
        self.statistics.total_duration += duration

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.free(request.id)
        request.computed = 0
        self.waiting.appendleft(request)
        self.statistics.preemptions += 1
