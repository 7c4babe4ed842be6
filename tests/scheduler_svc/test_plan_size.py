"""A plan has a bound: choices that it has no room for are admitted by the next one."""

from __future__ import annotations

import pytest

from protocol.codec import MAX_FRAME, MAX_SUBMIT
from protocol.columns import unpack
from protocol.messages import Plan
from scheduler_svc import draft
from tests.scheduler_svc.play import PROMPT, Stage

ROOM = 200  # bytes: two prompts and a part of a third


def size(plan: Plan) -> int:
    """Bytes of what admissions bring into a plan."""
    return sum(admit.size for admit in plan.admits) + 3 * len(plan.share_slots)


def test_a_choice_that_goes_over_the_room_leaves_some_for_the_rest() -> None:
    assert draft.ROOM + MAX_SUBMIT <= MAX_FRAME * 3 // 4


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("requests", "n"), [(8, 1), (1, 8), (3, 4)])
def test_admissions_are_spread_over_plans(requests: int, n: int, caching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "ROOM", ROOM)
    stage = Stage(enable_prefix_caching=caching)
    stage.worker(max_step_tokens=512)
    frontend = stage.frontend()
    streams = [frontend.submit(PROMPT, stage.now, n=n, seed=seed) for seed in range(requests)]
    stage.run()
    frontend.verify()
    assert all(stream.complete for stream in streams)
    one = max(size(plan) for plan in stage.plans) - ROOM
    assert one < 4 * len(PROMPT) + 4 + 12 * 5, "no more than one choice may go over it"
    assert sum(len(plan.admits) for plan in stage.plans) == requests * n
    assert max(len(plan.admits) for plan in stage.plans) in (2, 3)


def test_a_prompt_that_fills_the_room_alone_is_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "ROOM", 1)
    stage = Stage()
    stage.worker()
    frontend = stage.frontend()
    frontend.submit(PROMPT, stage.now, n=2)
    frontend.submit(PROMPT, stage.now, seed=2)
    stage.run()
    frontend.verify()
    assert max(len(unpack(plan.bind_slots)) for plan in stage.plans) == 1
