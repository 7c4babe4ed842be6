"""The supervisor over services that do nothing but live and die."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pagewire.control import LONGEST, ask, control_path
from pagewire.replace import drain, roll, start
from pagewire.supervisor import Spec, Supervisor
from protocol import guardian
from protocol.files import RunDirError
from protocol.locks import Lock
from protocol.registration import ServiceRecord
from protocol.rundir import RunDir
from tests.pagewire.processes import Program, eventually, gone, left_in, running

FAKES = Path(__file__).parent / "fakes"
FOUR = ("worker-0=serve", "scheduler-0=serve", "frontend-0=serve", "admin=serve")
UNHURRIED = ("--shutdown-timeout", "600")  # nobody is told to stop, or killed, because another took its time
LONG = 100.0  # seconds for what must come about

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def supervised(run_dir: Path, *services: str, under: tuple[str, ...] = ()) -> Iterator[Program]:
    with running([*under, sys.executable, str(FAKES / "drive.py"), str(run_dir), *services]) as program:
        yield program


def record(run_dir: Path, name: str) -> ServiceRecord:
    """The service's record, once it is ready."""
    return eventually(lambda: next((r for r in RunDir(run_dir).services() if r.name == name and r.state == "ready"), None))


def command(process: psutil.Process) -> list[str]:
    """Its command line; empty once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def test_sigterm_ends_every_process_and_leaves_no_file(run_dir: Path) -> None:
    with supervised(run_dir, *FOUR) as program:
        program.read_until("ready: fakes")
        family = program.family()
        assert len(family) == 6  # four services, the supervisor, the guardian
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0
        assert gone(family)
        assert left_in(run_dir) == []


def test_frontends_end_before_the_services_they_need(run_dir: Path) -> None:
    with supervised(run_dir, *UNHURRIED, *FOUR) as program:
        program.read_until("ready: fakes")
        os.kill(program.pid, signal.SIGINT)
        program.wait()
        said = program.output
        assert 0 < said.index("frontend-0 stops") < said.index("scheduler-0 stops")
        assert said.index("frontend-0 stops") < said.index("worker-0 stops")


def test_the_admin_server_ends_last_and_counts_what_the_others_said_at_their_end(run_dir: Path) -> None:
    with supervised(run_dir, *UNHURRIED, "scheduler-0=serve", "worker-0=slow", "frontend-0=serve", "admin=serve") as program:
        program.read_until("ready: fakes")
        os.kill(program.pid, signal.SIGTERM)
        program.wait()
        assert max(program.output.index(f"{name} stops") for name in ("scheduler-0", "worker-0")) < program.output.index("admin stops")


def test_a_hung_service_is_killed_in_time_and_its_stacks_are_logged(run_dir: Path) -> None:
    with supervised(run_dir, "--last-stacks", "5", "scheduler-0=serve", "worker-0=hang") as program:
        program.read_until("ready: fakes")
        family = program.family()
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0  # long before the hung one would end of itself
        assert gone(family)
        assert "fake_service.py" in (run_dir / "logs" / "worker-0.log").read_text()
        assert left_in(run_dir) == []


def test_after_sigkill_of_the_supervisor_everything_is_gone_before_it_would_end_of_itself(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=hang", "worker-1=serve", "worker-2=helper") as program:
        program.read_until("ready: fakes")
        family = program.family()
        assert len(family) == 7
        os.kill(record(run_dir, "worker-1").pid, signal.SIGSTOP)
        os.kill(program.pid, signal.SIGKILL)
        eventually(lambda: gone(family))  # long before they would end of themselves
    assert guardian.PATIENCE < 6 - 1


def test_after_sigkill_of_the_supervisor_the_folder_of_its_sockets_goes_too(run_dir: Path) -> None:
    long = run_dir / ("a-folder-whose-path-no-socket-can-have-" * 3)
    with supervised(long, "scheduler-0=serve", "worker-0=hang") as program:
        program.read_until("ready: fakes")
        sockets = RunDir(long, make=False).sockets
        assert sockets.is_dir()
        assert sockets.parent != run_dir
        family = program.family()
        os.kill(program.pid, signal.SIGKILL)
        eventually(lambda: gone(family))
        assert not sockets.exists()
        assert left_in(long) == []


def test_a_guardian_that_stood_still_while_it_started_guards_all_the_same(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=hang") as program:
        [guard] = eventually(lambda: [p for p in program.family() if "protocol.guardian" in command(p)])
        guard.suspend()  # before it could ask for anything: it has just begun
        program.read_until("ready: fakes")
        family = program.family()
        os.kill(program.pid, signal.SIGKILL)  # whereupon the kernel continues it, with a SIGHUP
        eventually(lambda: gone(family))
        assert left_in(run_dir) == []


def test_stale_files_are_removed_at_the_next_start(run_dir: Path) -> None:
    with supervised(run_dir, "worker-0=hang") as program:
        program.read_until("ready: fakes")
        family = program.family()
        for process in family:
            process.suspend()  # else the guardian might clean up before it is killed
        for process in family:
            process.kill()
        eventually(lambda: gone(family))
    assert (run_dir / "services" / "worker-0.json").exists()
    assert RunDir(run_dir).services() == []
    RunDir(run_dir).clean()
    assert left_in(run_dir) == []


def test_a_killed_service_is_started_again_under_its_name(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=serve") as program:
        program.read_until("ready: fakes")
        before = record(run_dir, "worker-0")
        other = record(run_dir, "scheduler-0")
        os.kill(before.pid, signal.SIGKILL)
        program.read_until("worker-0 (pid")
        after = eventually(lambda: next((r for r in RunDir(run_dir).services() if r.name == "worker-0" and r.pid != before.pid), None))
        assert after.incarnation != before.incarnation
        assert record(run_dir, "scheduler-0") == other
        assert "was killed by SIGKILL; starting it again in 0.1 s" in program.output
        assert program.process.poll() is None


def test_a_service_that_dies_after_it_was_ready_is_restarted_ever_later_and_never_given_up(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=crash") as program:
        program.read_until("starting it again in 0.8 s")
        program.read_until("starting it again in 1.6 s")
        assert program.process.poll() is None
        assert "a fault of its own" in (run_dir / "logs" / "worker-0.log").read_text()
        assert any((run_dir / "flight").iterdir())


def test_a_service_that_never_gets_ready_ends_the_whole_with_a_failure(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=stillborn") as program:
        family = program.family()
        assert program.wait() == 1
        assert "worker-0 cannot run: it ended with code 7" in program.output
        assert gone(family)
        assert left_in(run_dir) == []


def test_a_service_that_refuses_its_configuration_is_not_tried_again(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=refuse") as program:
        assert program.wait() == 1
        assert program.output.count("pagewire: no such model: somewhere/nothing") == 1
        assert "starting it again" not in program.output


def test_a_drained_service_stays_away_until_it_is_started_again(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=serve") as program:
        program.read_until("ready: fakes")
        before, rundir, said = record(run_dir, "worker-0"), RunDir(run_dir), list[str]()
        with pytest.raises(RunDirError, match="worker-0 has not been drained"):
            start(rundir, "worker-0", LONG, said.append)
        assert drain(rundir, "worker-0", LONG, said.append)
        assert "is the only worker" in said[0]
        program.read_until("worker-0 (pid")
        with pytest.raises(RunDirError, match="no service 'worker-0'"):
            drain(rundir, "worker-0", LONG, said.append)
        start(rundir, "worker-0", LONG, said.append)
        assert record(run_dir, "worker-0").pid != before.pid
        assert said[-1].startswith(f"worker-0 (pid {record(run_dir, 'worker-0').pid}) is ready")
        with pytest.raises(RunDirError, match="no service 'worker-9'"):
            start(rundir, "worker-9", LONG, said.append)
        os.kill(record(run_dir, "worker-0").pid, signal.SIGKILL)  # it is kept running as before
        program.read_until("starting it again in 0.1 s")


def test_a_service_that_is_still_leaving_is_started_again_when_it_has_left(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=slow") as program:
        program.read_until("ready: fakes")
        before = record(run_dir, "worker-0")
        ask(RunDir(run_dir), "retire", "worker-0")
        start(RunDir(run_dir), "worker-0", LONG, lambda _: None)
        assert record(run_dir, "worker-0").pid != before.pid
        assert [r.name for r in RunDir(run_dir).services()] == ["scheduler-0", "worker-0"]


def test_a_replacement_that_cannot_run_is_given_up_at_once_and_what_it_was_to_replace_stays(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=alone") as program:
        program.read_until("ready: fakes")
        before = record(run_dir, "worker-0")
        with pytest.raises(RunDirError, match="worker-1 cannot run: it ended with code 78"):
            roll(RunDir(run_dir), ["worker-0"], LONG, LONG, lambda _: None)
        program.read_until("the others go on")
        assert record(run_dir, "worker-0") == before
        assert program.process.poll() is None
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0


def test_a_rolled_service_has_the_first_name_that_nobody_bears(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=serve") as program:
        program.read_until("ready: fakes")
        for name, fresh in (("worker-0", "worker-1"), ("worker-1", "worker-0"), ("worker-0", "worker-1")):
            pid = record(run_dir, name).pid
            roll(RunDir(run_dir), [name], LONG, LONG, lambda _: None)
            program.read_until(f"{name} (pid {pid}) has left")
            assert [r.name for r in RunDir(run_dir).services()] == ["scheduler-0", fresh]


def test_one_that_a_roll_replaced_is_not_started_again(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=serve") as program:
        program.read_until("ready: fakes")
        roll(RunDir(run_dir), ["worker-0", "worker-0"], LONG, LONG, lambda _: None)
        program.read_until("worker-0 (pid")
        with pytest.raises(RunDirError, match="worker-0 was replaced by worker-1"):
            start(RunDir(run_dir), "worker-0", LONG, lambda _: None)
        assert [r.name for r in RunDir(run_dir).services()] == ["scheduler-0", "worker-1"]
        roll(RunDir(run_dir), ["worker-1"], LONG, LONG, lambda _: None)
        with pytest.raises(RunDirError, match="worker-1 was replaced by worker-0"):
            start(RunDir(run_dir), "worker-1", LONG, lambda _: None)
        drain(RunDir(run_dir), "worker-0", LONG, lambda _: None)
        start(RunDir(run_dir), "worker-1", LONG, lambda _: None)  # its place is free again
        eventually(lambda: [r.name for r in RunDir(run_dir).services()] == ["scheduler-0", "worker-1"])


def test_two_rolls_at_once_are_kept_apart(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=serve") as program:
        program.read_until("ready: fakes")
        with Lock(run_dir / "roll.lock"), pytest.raises(RunDirError, match=f"another roll is under way: process {os.getpid()}"):
            roll(RunDir(run_dir), [], LONG, LONG, lambda _: None)
        assert [r.name for r in RunDir(run_dir).services()] == ["scheduler-0", "worker-0"]


def test_a_service_ended_in_order_by_somebody_else_is_started_again(run_dir: Path) -> None:
    with supervised(run_dir, "worker-0=serve") as program:
        program.read_until("ready: fakes")
        before = record(run_dir, "worker-0")
        os.kill(before.pid, signal.SIGTERM)
        eventually(lambda: any(r.pid != before.pid and r.state == "ready" for r in RunDir(run_dir).services()))


def test_a_command_that_is_none_gets_an_answer_and_harms_nobody(run_dir: Path) -> None:
    with supervised(run_dir, "worker-0=serve") as program:
        program.read_until("ready: fakes")
        for line in (b"[" * (LONGEST - 1), b"{}", b"\xff"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
                asking.settimeout(LONG)
                asking.connect(str(control_path(RunDir(run_dir))))
                asking.sendall(line + b"\n")
                assert "error" in json.loads(asking.recv(4096))
        assert ask(RunDir(run_dir), "look", "worker-0") == {}


def test_under_nohup_the_terminal_may_go(run_dir: Path) -> None:
    with supervised(run_dir, "worker-0=serve", under=("nohup",)) as program:
        program.read_until("ready: fakes")
        before = record(run_dir, "worker-0")
        os.kill(program.pid, signal.SIGHUP)
        assert ask(RunDir(run_dir), "restart", "worker-0") == {}
        eventually(lambda: any(r.pid != before.pid and r.state == "ready" for r in RunDir(run_dir).services()))
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait() == 0


def test_a_system_that_has_no_process_to_give_is_asked_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refusals = subprocess.Popen, iter((BlockingIOError(errno.EAGAIN, "no process"), OSError(errno.ENOMEM, "no memory")))

    def popen(command: list[str], **how: Any) -> Any:
        if "fake_service" in command and (refusal := next(refusals, None)) is not None:
            raise refusal
        return start(command, **how)

    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setattr(subprocess, "Popen", popen)
    rundir, said = RunDir(run_dir), []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("ready:"):
            os.kill(os.getpid(), signal.SIGTERM)

    spec = Spec("worker", "worker-0", "fake_service", ("serve",))
    code = Supervisor([spec], rundir, lambda: any(r.state == "ready" for r in rundir.services()), "fakes", 1.0, say).run()
    assert code == 0
    assert [line.partition(":")[2].partition(";")[0] for line in said[:2]] == [
        " worker-0 could not be started: no process",
        " worker-0 could not be started: no memory",
    ]
