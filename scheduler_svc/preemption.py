"""Taking a running choice's place away, and what becomes of its blocks.

It drains: rows already sent are valid, no new ones are planned, and it waits again once the last is acknowledged.
"""

from __future__ import annotations

from scheduler_svc.requests import Choice, State
from scheduler_svc.slots import DRAIN, blocks_for
from scheduler_svc.worker import Worker


def preempt(worker: Worker, choice: Choice, swap_at: int = 0) -> None:
    """Take a running choice's blocks now and its slot once its last row is acknowledged; then it waits again.

    `swap_at` is the step whose plan copies the blocks to the host, after all rows of the choice; 0: it recomputes.
    """
    s, slot = worker.slots, choice.slot
    detach_forks(worker, choice)
    if swap_at:
        _move_out(worker, choice, swap_at)
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


def swaps(worker: Worker, choice: Choice) -> bool:
    """Whether the choice is better swapped than recomputed, and can be.

    A scorer cannot: it must compute again from the first position that has not been told, which its blocks are beyond.
    """
    if choice.scores:
        return False
    s, size = worker.slots, worker.block_size
    computed = int(s.computed[choice.slot])
    n = blocks_for(computed, size)
    if not n or n > worker.host.pool.available or any(copy.slot == choice.slot for copy in worker.copies):
        return False
    # what others share stays, and would be found again
    own = sum(worker.blocks.refs[block] == 1 for block in s.table[choice.slot, :n].tolist())
    return worker.costs.prefers_copies(2 * n, min(own * size, computed))


def _move_out(worker: Worker, choice: Choice, step: int) -> None:
    """The slot's table becomes the swap's."""
    s, slot = worker.slots, choice.slot
    computed = int(s.computed[slot])
    table = s.table[slot, : s.blocks[slot]].tolist()
    n = blocks_for(computed, worker.block_size)
    worker.blocks.release(table[n:])
    worker.host.swap_out(choice, computed, table[:n], step)
    s.blocks[slot] = s.capacity[slot] = 0


def detach_forks(worker: Worker, choice: Choice) -> None:
    """Siblings that hoped to share the choice's prefill wait on their own again."""
    for sibling in choice.forks:
        worker.queue.add(sibling)
    choice.forks = []
