"""What a scheduler has counted it keeps, also when another one takes over and it takes charge again."""

from __future__ import annotations

import pytest

from scheduler_svc.core import Core
from tests.simulation.mixes import MIXES, Mix
from tests.simulation.world import World

COUNTERS = ("requests_finished", "requests_failed", "requests_aborted", "preemptions", "prefix_queries", "prefix_hits")
FAMILIES = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions", "vllm:iteration_tokens_total")


class Counted(World):
    """Sees that no scheduler ever tells less than it has told; `yielded` is how many requests one that has yielded has told."""

    def __init__(self, seed: int, mix: Mix) -> None:
        self.told: dict[tuple[Core, str], float] = {}
        self.yielded = 0.0
        super().__init__(seed, mix)

    def _check(self) -> None:
        super()._check()
        for node in self.schedulers.values():
            if node.alive:
                self._compare(node.core)

    def _compare(self, core: Core) -> None:
        now = {name: core.engine.stats()[name] for name in COUNTERS}
        now |= {series.family: series.value for series in core.engine.series() if series.family in FAMILIES}
        for name, value in now.items():
            assert value >= self.told.get((core, name), 0.0), f"{name} fell"
            self.told[core, name] = value
        if core.counters.get("epoch_yielded"):
            self.yielded = max(self.yielded, now["requests_finished"])


@pytest.mark.slow
def test_counters_only_grow_while_schedulers_take_turns() -> None:
    for seed in range(10, 60):
        world = Counted(seed, MIXES["standby, long pauses"])
        world.run()
        if world.yielded:
            return
    pytest.fail("no scheduler that yielded had finished a request before")
