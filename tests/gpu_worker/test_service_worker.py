"""The worker's process, over real sockets, with a scheduler that the test plays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from gpu_worker.oracle import expected
from protocol.columns import pack, unpack
from protocol.messages import Admit, FileChunk, FileRequest, Phase, Plan, Progress, Ready, Result, SamplingParams
from protocol.rundir import RunDir
from protocol.times import Times
from protocol.tokenizer_files import bundle_hash, open_bundle
from tests.gpu_worker.fake_scheduler import SILENCE, FakeScheduler
from tests.gpu_worker.worker_plans import rows_of

pytestmark = pytest.mark.slow

WORKER = """
import json
import sys
from pathlib import Path
from gpu_worker.service import run
from gpu_worker.settings import WorkerSettings
from protocol.times import Times
settings = {"block_size": 4, "num_gpu_blocks": 32, "max_num_seqs": 4, "max_model_len": 64, **json.loads(sys.argv[3])}
times = Times(progress=float(sys.argv[4]), silence=float(sys.argv[5]), window=float(sys.argv[5]))
run(WorkerSettings(run_dir=Path(sys.argv[1]), name="worker-7", runner=sys.argv[2], times=times, **settings))
"""
MOVING = """
import time
from gpu_worker.oracle import OracleRunner
start = OracleRunner.start
def move(self, step):
    for _ in range(120):
        time.sleep(0.1)
        self.counter += 1
    start(self, step)
OracleRunner.start = move
"""
PROMPT = list(b"once upon a time")
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def rundir(tmp_path: Path) -> Iterator[RunDir]:
    rundir = RunDir(tmp_path / "run")
    yield rundir
    rundir.clean()  # a long path has its sockets elsewhere, and killed workers leave them
    rundir.tidy()


@pytest.fixture
def start(rundir: RunDir) -> Iterator[Start]:
    """Starts worker processes, and ends them. `patch` is Python that runs before the worker, `more` are settings."""
    with ExitStack() as stack:

        def start(
            runner: str = "oracle",
            patch: str = "",
            more: dict | None = None,
            progress: float = 2.0,
            silence: float = SILENCE,
            **environment: str,
        ) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-c", patch + WORKER, str(rundir.path), runner, json.dumps(more or {}), str(progress), str(silence)],
                env={**os.environ, **environment},
                stderr=subprocess.PIPE,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def scheduler(rundir: RunDir) -> Iterator[FakeScheduler]:
    scheduler = FakeScheduler(rundir.workers)
    yield scheduler
    scheduler.close()


def first_plan(prompt: list[int], step: int = 1, seals: dict[str, bytes] | None = None, max_tokens: int = 20) -> Plan:
    n = -(-(len(prompt) + max_tokens) // 4)
    params = SamplingParams(max_tokens, stop_ids=pack([256]))
    columns = rows_of(
        bind_slots=[2],
        bind_generations=[1],
        bind_records=[5],
        assign_slots=[2] * n,
        assign_indices=[*range(n)],
        assign_blocks=[*range(3, 3 + n)],
        slots=[2],
        generations=[1],
        starts=[0],
        counts=[len(prompt)],
        outputs=[1],
    )
    return Plan(step, admits=[Admit(5, pack(prompt), b"", 11, params)], **columns, **(seals or {}))


def next_plan(step: int, start: int, **more: bytes) -> Plan:
    return Plan(step, **rows_of(slots=[2], generations=[1], starts=[start], counts=[1], outputs=[1]), **more)


def test_a_worker_announces_itself_and_streams_what_the_oracle_computes(start, scheduler):
    start()
    ready = scheduler.expect(Ready)
    assert ready.geometry.blocks == 32
    assert scheduler.hellos[0].name == "worker-7"
    want = expected(PROMPT, 11, 20)
    scheduler.send(first_plan(PROMPT))
    for step in range(2, len(want) + 1):  # two plans in flight
        scheduler.send(next_plan(step, len(PROMPT) + step - 2))
    got = [unpack(scheduler.expect(Result).ids).tolist() for _ in want]
    assert [t for ids in got for t in ids] == want


def test_tokenizer_files_come_over_the_wire(start, scheduler):
    start()
    ready = scheduler.expect(Ready)
    scheduler.send(FileRequest(ready.tokenizer, 0))
    chunk = scheduler.expect(FileChunk)
    assert bundle_hash(chunk.data) == ready.tokenizer
    assert chunk.total == len(chunk.data)
    assert open_bundle(chunk.data) == {"bytes.tokenizer": b""}
    scheduler.send(FileRequest(b"?" * 16, 0))
    assert scheduler.expect(FileChunk).total == -1


def test_a_new_scheduler_gets_the_sealed_hashes_and_the_stream_goes_on(start, scheduler, rundir):
    start()
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    tokens = unpack(scheduler.expect(Result).ids).tolist()
    scheduler.send(next_plan(2, len(PROMPT), seals=pack([3, 4]), seal_hashes=b"A" * 16 + b"B" * 16))
    tokens += unpack(scheduler.expect(Result).ids).tolist()
    scheduler.close()
    successor = FakeScheduler(rundir.workers, epoch=2)
    try:
        ready = successor.expect(Ready)
        assert unpack(ready.blocks).tolist() == [3, 4]
        assert ready.hashes == b"A" * 16 + b"B" * 16
        n = 9
        params = SamplingParams(20, stop_ids=pack([256]))
        columns = rows_of(
            bind_slots=[0],
            bind_generations=[1],
            bind_records=[1],
            share_slots=[0, 0],
            share_indices=[0, 1],
            share_blocks=[3, 4],
            assign_slots=[0] * (n - 2),
            assign_indices=[*range(2, n)],
            assign_blocks=[*range(10, 8 + n)],
            slots=[0],
            generations=[1],
            starts=[8],
            counts=[len(PROMPT) + 2 - 8],
            outputs=[1],
        )
        successor.send(Plan(1, admits=[Admit(1, pack(PROMPT), pack(tokens), 11, params)], **columns))
        tokens += unpack(successor.expect(Result).ids).tolist()
    finally:
        successor.close()
    assert tokens == expected(PROMPT, 11, 20)[:3]


def test_a_worker_with_another_hash_key_drops_its_hashes(start, scheduler, rundir):
    start()
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    scheduler.send(next_plan(2, len(PROMPT), seals=pack([3]), seal_hashes=b"A" * 16))
    scheduler.expect(Result)
    scheduler.expect(Result)
    scheduler.close()
    successor = FakeScheduler(rundir.workers, epoch=2)
    successor.key = b"another key     "
    try:
        assert successor.expect(Ready).blocks == b""
    finally:
        successor.close()


def test_a_step_that_raises_ends_the_session_and_the_next_hello_names_it(start, scheduler):
    process = start(PAGEWIRE_ORACLE_MARKS="33=raise")
    scheduler.expect(Ready)
    failed = scheduler.session
    scheduler.send(first_plan(PROMPT))
    assert unpack(scheduler.expect(Result).ids).tolist() == expected(PROMPT, 11, 1)  # what has not left yet ends with the session
    scheduler.send(
        Plan(
            2,
            admits=[Admit(6, pack([33]), b"", 1, SamplingParams(2))],
            **rows_of(
                frees=[2],
                bind_slots=[2],
                bind_generations=[2],
                bind_records=[6],
                assign_slots=[2],
                assign_indices=[0],
                assign_blocks=[0],
                slots=[2],
                generations=[2],
                starts=[0],
                counts=[1],
                outputs=[1],
            ),
        )
    )
    scheduler.expect(Ready)
    assert (scheduler.hellos[-1].failed_session, scheduler.hellos[-1].failed_step) == (failed, 2)
    scheduler.send(first_plan(PROMPT))  # it serves again, from step 1
    assert unpack(scheduler.expect(Result).ids).tolist() == expected(PROMPT, 11, 1)
    assert process.poll() is None


def test_a_plan_that_contradicts_the_slots_is_a_failed_step(start, scheduler):
    start()
    scheduler.expect(Ready)
    scheduler.send(next_plan(1, 5))
    scheduler.until(lambda: len(scheduler.hellos) >= 2)
    assert scheduler.hellos[-1].failed_step == 1


def test_a_long_step_is_acknowledged_and_reported_while_it_runs(start, scheduler):
    start(PAGEWIRE_ORACLE_STEP_TIME=str(SILENCE + 3))
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    scheduler.send(next_plan(2, len(PROMPT)))
    assert scheduler.expect(Progress).step == 1
    peer = scheduler.listener.peers[scheduler.session]
    scheduler.until(lambda: peer.link.sender.idle)
    assert scheduler.expect(Progress).step == 1, "the plans were acknowledged only when it was over"
    assert scheduler.expect(Result).step == 1
    assert not scheduler.closed  # longer than the silence and the window time


def test_progress_stands_still_while_the_main_thread_hangs(start, scheduler):
    start(PAGEWIRE_ORACLE_MARKS="33=hang")
    scheduler.expect(Ready)
    scheduler.send(first_plan([33, *PROMPT]))
    counters = [scheduler.expect(Progress).counter for _ in range(4)]
    assert len(set(counters)) == 1
    assert not scheduler.closed


def test_a_hung_worker_ends_itself_with_its_stacks_once_its_session_is_over(start, scheduler, rundir):
    process = start(PAGEWIRE_ORACLE_MARKS="33=hang", progress=0.4)
    scheduler.expect(Ready)
    scheduler.send(first_plan([33, *PROMPT]))
    scheduler.expect(Progress)
    scheduler.closed += scheduler.listener.close(scheduler.session, "the progress deadline")
    scheduler.until(lambda: process.poll() is not None)
    assert process.returncode == 1
    log = (rundir.logs / "worker-7.log").read_text()
    assert "a step hangs" in log
    assert "in _fault" in log


def test_a_long_step_that_moves_outlives_its_session(start, scheduler):
    process = start(patch=MOVING, progress=0.4)
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    scheduler.expect(Progress)
    scheduler.closed += scheduler.listener.close(scheduler.session, "for the test")
    scheduler.expect(Ready)
    assert process.poll() is None


@pytest.mark.parametrize("phase", ["plan_received", "result_unsent"])
def test_the_kill_switch_kills_at_its_phase_once(start, scheduler, tmp_path, phase):
    fired = tmp_path / "fired"
    process = start(PAGEWIRE_KILL=f"{phase}:1:{fired}")
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    scheduler.until(lambda: process.poll() is not None)
    assert process.returncode == -signal.SIGKILL
    assert fired.exists()
    scheduler.until(lambda: True)
    assert not any(isinstance(m, Result) for m in scheduler.messages)
    start(PAGEWIRE_KILL=f"{phase}:1:{fired}")
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    assert unpack(scheduler.expect(Result).ids).tolist() == expected(PROMPT, 11, 1)


def test_sigterm_finishes_the_running_step_and_leaves_nothing(start, scheduler, rundir):
    process = start(PAGEWIRE_ORACLE_STEP_TIME="2.0")
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    scheduler.expect(Progress)
    process.send_signal(signal.SIGTERM)
    assert scheduler.expect(Result).step == 1
    scheduler.until(lambda: process.poll() is not None)
    assert process.returncode == 0
    assert not rundir.services()
    assert not list(rundir.sockets.glob("tap-*"))


def test_a_worker_waits_for_its_scheduler_without_using_the_processor_and_says_so_once(start, rundir):
    process = start()
    deadline = time.monotonic() + 60
    while [s.state for s in rundir.services()] != ["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert idles(process, lambda: time.sleep(2))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert stderr.count(b"waiting for a scheduler") == 1


def idles(process: subprocess.Popen[bytes], meanwhile: Callable[[], object]) -> bool:
    """Whether a process uses next to no processor while something is done; looked at thrice, since it may still be starting.

    A look at which that returns False does not count.
    """

    def idle() -> bool:
        before = sum(psutil.Process(process.pid).cpu_times()[:2])
        counts = meanwhile() is not False
        return counts and sum(psutil.Process(process.pid).cpu_times()[:2]) - before <= 0.06

    return any(idle() for _ in range(3))


def test_an_idle_session_uses_no_processor_to_speak_of(start, rundir):
    scheduler = FakeScheduler(rundir.workers, times=Times())

    def idle() -> bool:
        end, closed = time.monotonic() + 3, len(scheduler.closed)
        scheduler.until(lambda: time.monotonic() > end)
        return len(scheduler.closed) == closed  # the session lasts

    try:
        process = start(silence=Times().silence)
        scheduler.expect(Ready)
        assert idles(process, idle)
    finally:
        scheduler.close()


def test_an_unknown_runner_is_refused_in_one_line(start):
    process = start("abacus")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert b"--runner abacus" in stderr
    assert b"torch, oracle, simulated" in stderr


SLOW_LOAD = """
import time
from gpu_worker.oracle import OracleRunner
load = OracleRunner.load
OracleRunner.load = lambda self: time.sleep(7) or load(self)
"""
FAILED_LOAD = """
from gpu_worker.errors import LoadError
from gpu_worker.oracle import OracleRunner
def load(self):
    raise LoadError("no room for the weights: give it a smaller model")
OracleRunner.load = load
"""
LOST_DEVICE = """
from gpu_worker.oracle import OracleRunner
def METHOD(self, step):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
OracleRunner.METHOD = METHOD
"""


def test_a_worker_that_loads_keeps_its_session_and_says_that_it_loads(start, scheduler):
    start(patch=SLOW_LOAD)
    assert scheduler.expect(Phase).name == "loading"
    scheduler.send(FileRequest(b"t" * 16, 0))
    assert scheduler.expect(FileChunk).total == -1
    scheduler.expect(Ready)
    assert not scheduler.closed  # longer than the silence time
    assert len({h.incarnation for h in scheduler.hellos}) == 1


def test_a_model_that_cannot_be_loaded_ends_the_worker_in_one_line(start):
    process = start(patch=FAILED_LOAD)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert b"no room for the weights" in stderr


@pytest.mark.parametrize("method", ["start", "finish"])
def test_a_lost_device_ends_the_process_with_its_stack_in_the_log(start, scheduler, rundir, method):
    process = start(patch=LOST_DEVICE.replace("METHOD", method))
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    scheduler.until(lambda: process.poll() is not None)
    assert process.returncode == 1
    log = (rundir.logs / "worker-7.log").read_text()
    assert "illegal memory access" in log
    assert "Traceback" in log
    assert not list(rundir.sockets.glob("tap-*"))


def test_a_refusal_is_said_once(start, scheduler, rundir):
    scheduler.refusal = "a worker of another protocol"
    start()

    def said() -> int:
        log = rundir.logs / "worker-7.log"
        return log.exists() and log.read_text().count("refuses this worker: a worker of another protocol")

    scheduler.until(said)
    hellos = len(scheduler.hellos)
    scheduler.until(lambda: len(scheduler.hellos) >= hellos + 2)
    scheduler.refusal = ""
    scheduler.expect(Ready)
    assert said() == 1


def test_plans_not_begun_are_left_when_the_session_ends(start, scheduler):
    start(PAGEWIRE_ORACLE_STEP_TIME="0.8")
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT, max_tokens=45))
    for step in range(2, 45):
        scheduler.send(next_plan(step, len(PROMPT) + step - 2))
    assert scheduler.expect(Result).step == 1
    scheduler.closed += scheduler.listener.close(scheduler.session, "for the test")
    began = time.monotonic()
    scheduler.expect(Ready)  # after the silence time and the running step, not after all of them
    assert time.monotonic() - began < 25
    assert not any(isinstance(m, Result) for m in scheduler.messages)
    scheduler.send(first_plan(PROMPT))
    result = scheduler.expect(Result)
    assert (result.step, unpack(result.ids).tolist()) == (1, expected(PROMPT, 11, 1))


def test_an_endpoint_that_is_none_is_refused_in_one_line(start):
    process = start(more={"schedulers": ["carrier-pigeon://coop"]})
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert b"--scheduler carrier-pigeon://coop: an endpoint is ipc://PATH or tcp://ADDRESS:PORT" in stderr


def test_of_two_schedulers_the_one_with_the_higher_epoch_is_served(start, rundir, tmp_path):
    endpoints = [rundir.workers, f"ipc://{tmp_path}/other"]
    old, new = FakeScheduler(endpoints[0], epoch=3), FakeScheduler(endpoints[1], epoch=4)
    new.refusal = "not yet"
    try:
        start(more={"schedulers": endpoints})
        old.expect(Ready)
        new.refusal = ""
        new.until(lambda: new.session or old.turn())
        assert new.expect(Ready).geometry.blocks == 32
        new.send(first_plan(PROMPT))
        assert unpack(new.expect(Result).ids).tolist() == expected(PROMPT, 11, 1)
    finally:
        old.close()
        new.close()


def test_the_simulated_runner_streams_letters_and_reports_its_time(start, scheduler):
    start("simulated")
    scheduler.expect(Ready)
    scheduler.send(first_plan(PROMPT))
    for step in range(2, 20):
        scheduler.send(next_plan(step, len(PROMPT) + step - 2))
    results = [scheduler.expect(Result) for _ in range(1, 20)]
    assert all(r.seconds == 0.002 for r in results)
    assert {len(unpack(r.ids)) for r in results} == {1}
    assert not any(isinstance(m, Phase) for m in scheduler.messages)
