"""The deterministic simulation (DESIGN §7): real cores, every fault, one seed each; a seed that fails tells its story."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.simulation.broken import Broken
from tests.simulation.mixes import MIXES, Mix
from tests.simulation.world import World

SEEDS = 7  # per mix in `make test`; `make simulate SEEDS=N` runs more


@pytest.mark.parametrize("name", ["calm", "link", "workers crash", "scheduler crashes"])
def test_a_seed_keeps_every_rule(name: str) -> None:
    World(1, MIXES[name]).run()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(MIXES))
def test_seeds_keep_every_rule(name: str) -> None:
    for seed in range(1000, 1000 + SEEDS):
        World(seed, MIXES[name]).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param("everything", 1, id="a loop late at every turn still judges silence"),
        pytest.param("everything", 53, id="a scheduler that awaits a worker does not spin"),
        pytest.param("standby, long pauses", 13, id="whoever is no longer in charge keeps no request"),
    ],
)
def test_a_seed_that_once_failed_passes(name: str, seed: int) -> None:
    World(seed, replace(MIXES[name], seconds=6.0)).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("link", ["lost", "duplicated", "reordered", "link_resent", "link_duplicate", "link_reordered"]),
        ("cuts", ["held"]),
        ("small pool", ["scheduler_preemptions"]),
        ("swaps", ["scheduler_swaps_out", "scheduler_swaps_in"]),
        ("swaps, workers crash", ["scheduler_swaps_out", "scheduler_swaps_in", "scheduler_workers_lost"]),
        ("swaps, scheduler crashes", ["scheduler_swaps_out", "scheduler_host_blocks_adopted", "scheduler_host_hits"]),
        ("swaps, poison raises", ["scheduler_swaps_out", "scheduler_host_blocks_adopted", "scheduler_host_hits"]),
        ("workers crash", ["scheduler_workers_lost"]),
        ("scheduler crashes", ["scheduler_blocks_adopted"]),
        ("pauses", ["session_closed", "session_stale"]),
        ("nan", ["scheduler_nan_rows"]),
        ("nan once", ["scheduler_nan_rows"]),
        ("frontends crash", ["resumed"]),
        ("clients move", ["resumed"]),
        ("drains", ["scheduler_workers_drained"]),
        ("rolled", ["scheduler_workers_drained"]),
        ("pauses, little credit", ["scheduler_rows_without_credit"]),
        ("two in charge at the start", ["epoch_yielded"]),
        ("everything", ["resumed", "lost", "held", "scheduler_workers_lost", "scheduler_workers_leaving"]),
    ],
)
def test_faults_really_happen(name: str, counted: list[str]) -> None:
    happened: dict[str, int] = {}
    for seed in range(6):
        world = World(seed, MIXES[name])
        world.run()
        for what, n in world.happened().items():
            happened[what] = happened.get(what, 0) + n
    assert all(happened.get(what, 0) > 0 for what in counted), happened


def test_one_seed_gives_one_run() -> None:
    def trace(seed: int) -> list[tuple[float, int]]:
        world = World(seed, MIXES["everything"])
        world.run()
        return [(client.entry.submitted, client.entry.choices and len(client.entry.choices[0].tokens)) for client in world.clients.all]

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)


def test_a_wrong_stream_is_seen() -> None:
    """The judge itself: a stream that differs from the oracle's must be called broken."""
    world = World(1, Mix("calm", requests=4, seconds=1.0))
    while len(world.clients.all) < 4:
        world.clock.step()
    for client in world.clients.all:
        client.owed[0].tokens[0] = 255
    with pytest.raises(Broken, match="is no beginning of"):
        world.run()
