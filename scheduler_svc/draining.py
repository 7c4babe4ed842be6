"""A worker that leaves on purpose: it gets nothing new, what it has goes elsewhere, and then it may go."""

from __future__ import annotations

import numpy as np

from scheduler_svc.arrivals import Arrivals
from scheduler_svc.preemption import preempt
from scheduler_svc.slots import DECODE, PREFILL
from scheduler_svc.worker import Worker


def move_away(worker: Worker, arrivals: Arrivals, now: float) -> None:
    """Take from a leaving worker whatever can be taken now.

    While its model has no other worker, what runs goes on running: to stop it would only make its clients wait.
    """
    s = worker.slots
    if worker.model.workers:
        copied = {copy.slot for copy in worker.copies}  # these wait for the plan that has their copy
        for slot in np.flatnonzero((s.state == PREFILL) | (s.state == DECODE)).tolist():
            choice = s.choice[slot]
            if choice is not None and slot not in copied:
                preempt(worker, choice)
    for choice in list(worker.queue):
        worker.queue.remove(choice)
        if choice.worker is not None:
            choice.worker.host.void(choice)
            choice.worker.drop_record(choice)
        arrivals.enqueue(choice, now)


def is_empty(worker: Worker) -> bool:
    """Whether nothing of any request is left at a worker."""
    return not (worker.in_flight or worker.running or worker.queue)
