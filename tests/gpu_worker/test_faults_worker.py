"""The kill switch and the options from the environment: what they refuse and when the switch counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu_worker.core import WorkerCore
from gpu_worker.faults import KillSwitch
from gpu_worker.oracle import OracleRunner
from gpu_worker.runner import Outcome
from gpu_worker.runners import make_runner
from gpu_worker.settings import WorkerSettings
from gpu_worker.simulated import SimulatedRunner
from protocol.columns import pack
from protocol.messages import STOPPED, Admit, Plan, SamplingParams
from tests.gpu_worker.worker_plans import rows_of

SETTINGS = WorkerSettings(run_dir=Path(), runner="oracle", block_size=4, num_gpu_blocks=8, max_num_seqs=2, max_model_len=32)


class Counting(KillSwitch):
    """A switch that counts its shots instead of firing."""

    fired = 0

    def _fire(self) -> None:
        self.fired += 1
        self.count = 1


def shots(phase: str, flags: tuple[int, ...] = (0, 0, 0)) -> list[int]:
    """How often the phase was reached after each of three steps: a chunk, the prefill's end, the second and last token."""
    core = WorkerCore(OracleRunner(SETTINGS).load())
    switch = Counting(phase)
    binds = rows_of(
        bind_slots=[0], bind_generations=[1], bind_records=[1], assign_slots=[0, 0], assign_indices=[0, 1], assign_blocks=[0, 1]
    )
    rows = [(0, 2, 0), (2, 3, 1), (5, 1, 1)]
    counts = []
    for i, (start, count, output) in enumerate(rows):
        columns = rows_of(slots=[0], generations=[1], starts=[start], counts=[count], outputs=[output])
        admits = [Admit(1, pack([97] * 5), b"", 7, SamplingParams(2))]
        step = core.apply(Plan(i + 1, admits=admits, **binds, **columns) if i == 0 else Plan(i + 1, **columns))
        switch.started(step)
        switch.finished(step, Outcome(np.full(output, 97, np.int32), np.full(output, flags[i], np.uint8)))
        counts.append(switch.fired)
    return counts


@pytest.mark.parametrize(
    ("phase", "reached"),
    [
        ("prefill_chunk", [1, 1, 1]),
        ("step_started", [1, 2, 3]),
        ("forward_done", [1, 2, 3]),
        ("first_token", [0, 1, 1]),
        ("last_token", [0, 0, 1]),
    ],
)
def test_each_phase_is_reached_where_its_name_says(phase, reached):
    assert shots(phase) == reached


def test_a_stop_id_makes_the_last_token_too():
    assert shots("last_token", (0, STOPPED, 0)) == [0, 1, 2]


def test_the_switch_fires_at_the_count_it_was_given():
    switch = Counting("plan_received", 3)
    for _ in range(2):
        switch.reached("plan_received")
        switch.reached("forward_done")
    assert switch.fired == 0
    switch.reached("plan_received")
    assert switch.fired == 1


def test_a_file_that_is_there_disarms_the_switch(tmp_path):
    fired = tmp_path / "fired"
    fired.touch()
    switch = KillSwitch.parse(f"plan_received:1:{fired}")
    switch.reached("plan_received")  # or this process would be dead


@pytest.mark.parametrize(("text", "names"), [("lunch", "plan_received"), ("forward_done:often", "'often'")])
def test_a_switch_that_cannot_be_read_is_refused(text, names):
    with pytest.raises(ValueError, match=names):
        KillSwitch.parse(text)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"PAGEWIRE_ORACLE_STEP_TIME": "soon"}, "PAGEWIRE_ORACLE_STEP_TIME=soon"),
        ({"PAGEWIRE_ORACLE_MARKS": "33"}, "'explode'|can be marked"),
        ({"PAGEWIRE_ORACLE_MARKS": "!=raise"}, "'!=raise'"),
        ({"PAGEWIRE_ORACLE_MARKS": "33=explode"}, "'explode'"),
    ],
)
def test_options_that_cannot_be_read_are_refused(environ, names):
    with pytest.raises(ValueError, match=names):
        make_runner(SETTINGS, environ)


def test_runners_take_their_options_from_the_environment():
    oracle = make_runner(SETTINGS, {"PAGEWIRE_ORACLE_STEP_TIME": "0.5", "PAGEWIRE_ORACLE_MARKS": "33=raise,34=nan"})
    assert isinstance(oracle, OracleRunner)
    assert (oracle._step_time, oracle._marks) == (0.5, {33: "raise", 34: "nan"})
    simulated = make_runner(WorkerSettings(run_dir=Path(), runner="simulated", step_time=0.25), {"PAGEWIRE_SIMULATED_PER_TOKEN": "0.001"})
    assert isinstance(simulated, SimulatedRunner)
    assert (simulated._step_time.base, simulated._step_time.per_token) == (0.25, 0.001)
