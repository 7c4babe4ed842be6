"""Each rule that recovery rests on, switched off: the simulation must notice, or it would prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gpu_worker.core import WorkerCore
from protocol.links import Link, Receiver
from scheduler_svc.core import Core
from scheduler_svc.epochs import Epochs
from scheduler_svc.suspects import Suspects
from tests.simulation.world import MIXES, Mix, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SEEDS = range(19, 39)  # enough for the rarest
Patch = pytest.MonkeyPatch


def link_delivers_in_order_and_once(patch: Patch) -> None:
    def take(self: Receiver, sequence: int, body: bytes, now: float) -> list[bytes]:
        self.last = max(self.last, sequence)
        return [body]

    patch.setattr(Receiver, "take", take)


def silence_ends_a_session(patch: Patch) -> None:
    patch.setattr(Link, "broken", lambda self, now: None)


def a_lower_epoch_stands_by(patch: Patch) -> None:
    patch.setattr(Epochs, "_stand_by", lambda self, now: None)


def who_stands_by_drops_everything(patch: Patch) -> None:
    patch.setattr(Core, "_yield_if_standing_by", lambda self, now: None)


def suspects_run_alone(patch: Patch) -> None:
    patch.setattr(Suspects, "group_at", lambda self, worker, frontends: 0)


def a_lost_session_resets_the_worker(patch: Patch) -> None:
    patch.setattr(WorkerCore, "reset", lambda self: None)


def an_assigned_block_loses_its_hash(patch: Patch) -> None:
    apply = WorkerCore.apply

    def without_forgetting(self: WorkerCore, plan: Any) -> Any:
        forget = self._sealed.forget
        self._sealed.forget = lambda blocks: None  # type: ignore[method-assign]
        try:
            return apply(self, plan)
        finally:
            self._sealed.forget = forget  # type: ignore[method-assign]

    patch.setattr(WorkerCore, "apply", without_forgetting)


def forks_get_their_own_copy_of_the_partial_block(patch: Patch) -> None:
    patch.setattr("scheduler_svc.draft._living_copies", lambda worker, copies: [])


# More prefixes than the pool can hold: blocks are evicted, given away, and asked for again.
MANY_PREFIXES = replace(
    MIXES["scheduler crashes"], scheduler_crashes=6, blocks=24, slots=4, workers=1, requests=60, forks=0.0, prefixes=6, prefix=(20,)
)

RULES: list[tuple[Callable[[Patch], None], Mix]] = [
    (link_delivers_in_order_and_once, MIXES["link"]),
    (silence_ends_a_session, replace(MIXES["cuts"], holds=12, requests=40)),
    (a_lower_epoch_stands_by, MIXES["standby, long pauses"]),
    (who_stands_by_drops_everything, MIXES["standby, long pauses"]),
    (suspects_run_alone, MIXES["poison raises"]),
    (a_lost_session_resets_the_worker, MIXES["scheduler crashes"]),
    (an_assigned_block_loses_its_hash, MANY_PREFIXES),
    (forks_get_their_own_copy_of_the_partial_block, replace(MIXES["calm"], forks=0.8)),
]


@pytest.mark.parametrize(("off", "mix"), RULES, ids=[off.__name__.replace("_", " ") for off, _ in RULES])
def test_the_simulation_fails_without_the_rule_that(off: Callable[[Patch], None], mix: Mix, monkeypatch: Patch) -> None:
    off(monkeypatch)
    for seed in SEEDS:
        try:
            World(seed, mix).run()
        except Exception as error:
            print(type(error).__name__, str(error)[:200])
            return
    pytest.fail(f"{len(SEEDS)} seeds of {mix.name!r} keep every rule without it")
