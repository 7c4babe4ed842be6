"""Each rule that recovery rests on, switched off: the simulation must notice, and in the way that rule is for."""

from __future__ import annotations

import pytest

from tests.simulation.broken import Broken
from tests.simulation.rules import RULES, Rule
from tests.simulation.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SEEDS = range(19, 39)  # enough for the rarest


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_the_simulation_fails_without_the_rule_that(rule: Rule) -> None:
    for seed in SEEDS:
        with pytest.MonkeyPatch.context() as patch:
            rule.off(patch)
            try:
                World(seed, rule.mix).run()
                continue
            except Broken as broken:
                found = broken
        assert found.kind in rule.kinds, found
        World(seed, rule.mix).run()  # and it passes with the rule on
        return
    pytest.fail(f"{len(SEEDS)} seeds of {rule.mix.name!r} keep every rule without it")
