"""Taking a running choice's place away. It recomputes its tokens when its turn comes again."""

from __future__ import annotations

from scheduler_svc.requests import Choice, State
from scheduler_svc.worker import DRAIN, Worker


def preempt(worker: Worker, choice: Choice) -> None:
    """Take a running choice's blocks now and its slot once its last row is acknowledged; then it waits again."""
    s, slot = worker.slots, choice.slot
    detach_forks(worker, choice)
    if s.known[slot] == s.length[slot]:
        worker.unbind(slot)
        worker.queue.add(choice)
        return
    worker.drop_blocks(slot)
    s.state[slot] = DRAIN
    worker.prefilling.discard(slot)
    s.computed[slot] = 0
    choice.state = State.DRAINING
    worker.draining.add(slot)
    worker.decoding = None


def detach_forks(worker: Worker, choice: Choice) -> None:
    """Siblings that hoped to share the choice's prefill wait on their own again."""
    for sibling in choice.forks:
        worker.queue.add(sibling)
    choice.forks = []
