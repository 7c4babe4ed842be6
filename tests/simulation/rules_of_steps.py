"""Rules of steps, blocks and slots (DESIGN §3), each as a patch that switches it off."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler_svc import draft
from scheduler_svc.outcomes import Outcomes
from scheduler_svc.requests import Choice
from scheduler_svc.suspects import Suspects
from scheduler_svc.swap import HostBlocks
from scheduler_svc.worker import Worker

Patch = pytest.MonkeyPatch


def a_slots_generation_moves_with_its_owner(patch: Patch) -> None:
    unbind = Worker.unbind

    def unmoved(self: Worker, slot: int) -> Any:
        choice = unbind(self, slot)
        self.slots.generation[slot] -= 1
        return choice

    patch.setattr(Worker, "unbind", unmoved)


def forks_get_their_own_copy_of_the_partial_block(patch: Patch) -> None:
    living = draft._living_copies

    def none(worker: Any, copies: Any) -> list[Any]:
        living(worker, copies)
        return []

    patch.setattr(draft, "_living_copies", none)


def a_copy_under_way_holds_its_host_blocks(patch: Patch) -> None:
    swap_in = HostBlocks.swap_in

    def at_once(self: HostBlocks, *arguments: Any) -> list[int]:
        host = swap_in(self, *arguments)
        self.pool.release(self.returning.pop()[1])
        return host

    patch.setattr(HostBlocks, "swap_in", at_once)


def suspects_run_alone(patch: Patch) -> None:
    patch.setattr(Suspects, "group_at", lambda self, worker, frontends: 0)


def a_nan_that_came_with_a_shared_block_ends_nobody(patch: Patch) -> None:
    nan = Outcomes._nan

    def harsh(self: Outcomes, worker: Any, choice: Any, now: float) -> None:
        choice.no_hits = True
        nan(self, worker, choice, now)

    patch.setattr(Outcomes, "_nan", harsh)


def a_nan_withdraws_the_hashes_of_its_table(patch: Patch) -> None:
    nan = Outcomes._nan

    def kept(self: Outcomes, worker: Any, choice: Any, now: float) -> None:
        forget, worker.blocks.forget = worker.blocks.forget, lambda block: False
        choice.no_hits = True
        try:
            nan(self, worker, choice, now)
        finally:
            worker.blocks.forget = forget

    patch.setattr(Outcomes, "_nan", kept)


def a_leaving_worker_goes_empty(patch: Patch) -> None:
    patch.setattr("scheduler_svc.fleet.is_empty", lambda worker: True)


def positions_to_be_told_are_not_taken_from_a_cache(patch: Patch) -> None:
    patch.setattr(Choice, "most_cached", property(lambda self: self.length - 1))
