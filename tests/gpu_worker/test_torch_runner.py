"""What the torch runner does about ends: stop ids, dead slots, NaNs, sessions that are over, steps without rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.columns import pack, unpack
from protocol.messages import DEAD, NAN, STOPPED, Admit, Plan, SamplingParams
from tests.gpu_worker.model_driver import Loaded, generate, greedy, load_tiny

PROMPT = [4, 90, 11, 12]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_tiny(tmp_path_factory.mktemp("tiny"))


def _plan(step: int, start: int, count: int, slots: tuple[int, ...] = (0,), params: SamplingParams | None = None) -> Plan:
    """A step of slots that run alike; with params, the step that binds them, two blocks each."""
    n = len(slots)
    opening = {}
    if params is not None:
        opening = {
            "admits": [Admit(s, pack(PROMPT), b"", s, params) for s in slots],
            "bind_slots": pack(slots),
            "bind_generations": pack([1] * n),
            "bind_records": pack(slots),
            "assign_slots": pack([s for s in slots for _ in range(2)]),
            "assign_indices": pack([0, 1] * n),
            "assign_blocks": pack([2 * s + i for s in slots for i in range(2)]),
        }
    rows = {"slots": pack(slots), "generations": pack([1] * n), "starts": pack([start] * n), "counts": pack([count] * n)}
    return Plan(step, **opening, **rows, outputs=pack([1] * n))  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "announced"), [(0, 512), (2000, 2000)])
def test_a_cpu_announces_short_steps_unless_the_settings_name_a_size(tmp_path: Path, asked: int, announced: int) -> None:
    loaded = load_tiny(tmp_path, max_num_batched_tokens=asked, device="cpu")
    assert loaded.description.geometry.max_step_tokens == announced


def test_a_stop_id_ends_the_choice_and_later_rows_of_its_slot_are_dead(tiny: Loaded) -> None:
    tokens = generate(tiny, [PROMPT], [greedy(5)], [0])[0]
    stop = tokens[2]
    core = tiny.open()
    results = [tiny.step(core, _plan(1, 0, 4, params=SamplingParams(max_tokens=9, temperature=0.0, stop_ids=pack([1002, stop]))))]
    results += [tiny.step(core, _plan(k, 2 + k, 1)) for k in range(2, 6)]
    ended = tokens.index(stop)
    assert [unpack(r.ids).tolist() for r in results[: ended + 1]] == [[t] for t in tokens[: ended + 1]]
    assert [r.flags[0] for r in results] == [0] * ended + [STOPPED] + [DEAD] * (4 - ended)
    assert [len(r.ids) for r in results[ended + 1 :]] == [0] * (4 - ended)


def test_a_nan_flags_its_own_row_and_leaves_its_neighbours_their_tokens(tiny: Loaded) -> None:
    alone = generate(tiny, [PROMPT], [greedy(3)], [0])[0]
    core = tiny.open()
    cache = tiny.runner._step._cache  # type: ignore[attr-defined]
    results = [tiny.step(core, _plan(1, 0, 4, (0, 1), greedy(9)))]
    with torch.inference_mode():
        cache[:, 2] = float("nan")  # the first block of slot 1
    results += [tiny.step(core, _plan(k, 2 + k, 1, (0, 1))) for k in (2, 3)]
    assert [list(r.flags) for r in results] == [[0, 0], [0, NAN], [0, DEAD]]
    assert [int(unpack(r.ids)[0]) for r in results] == alone
    # the next owner of the poisoned block is not harmed by what is left in it
    assert generate(tiny, [PROMPT] * 8, [greedy(3)] * 8, [0] * 8) == [alone] * 8


def test_a_step_without_rows_only_changes_tables(tiny: Loaded) -> None:
    core = tiny.open()
    result = tiny.step(core, Plan(1, copy_from=pack([1]), copy_to=pack([2])))
    assert (result.counts, result.copied) == (b"", 1)


def test_a_chunk_that_does_not_end_its_prefill_samples_nothing(tiny: Loaded) -> None:
    core = tiny.open()
    plan = _plan(1, 0, 2, params=greedy(3))
    first = tiny.step(core, Plan(**{f: getattr(plan, f) for f in plan.__struct_fields__} | {"outputs": pack([0])}))
    assert first.counts == b""
    assert unpack(tiny.step(core, _plan(2, 2, 2)).ids).tolist() == generate(tiny, [PROMPT], [greedy(1)], [0])[0]


def test_outcomes_of_a_session_that_is_over_are_forgotten(tiny: Loaded) -> None:
    core = tiny.open()
    tiny.runner.start(core.apply(_plan(1, 0, 4, params=greedy(9))))
    core = tiny.open()
    result = tiny.step(core, _shorter())
    assert unpack(result.ids).tolist() == generate(tiny, [PROMPT[:3]], [greedy(1)], [0])[0]


def _shorter() -> Plan:
    plan = _plan(1, 0, 3, params=greedy(9))
    admit = Admit(0, pack(PROMPT[:3]), b"", 0, greedy(9))
    return Plan(**{f: getattr(plan, f) for f in plan.__struct_fields__} | {"admits": [admit]})


def test_the_counter_moves_with_every_layer(tiny: Loaded) -> None:
    before = tiny.runner.counter
    generate(tiny, [PROMPT], [greedy(2)], [0])
    assert tiny.runner.counter - before == 2 * 3


def test_seconds_are_those_of_the_step(tiny: Loaded) -> None:
    core = tiny.open()
    step = core.apply(_plan(1, 0, 4, params=greedy(9)))
    tiny.runner.start(step)
    outcome = tiny.runner.finish(step)
    assert outcome.seconds > 0
    assert outcome.idle >= 0
    assert outcome.tokens.dtype == np.int32
