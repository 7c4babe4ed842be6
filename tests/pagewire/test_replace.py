"""What `drain` and `roll` do when they are ended, repeated, or have nothing to wait for."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pagewire import replace
from pagewire.control import ask
from pagewire.replace import NotDone, drain, roll
from protocol.files import RunDirError
from protocol.rundir import RunDir
from tests.pagewire.processes import eventually, running
from tests.pagewire.test_supervisor import LONG, record, supervised

pytestmark = pytest.mark.slow


def command(run_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pagewire", *arguments, "--run-dir", str(run_dir)]


def names(run_dir: Path) -> list[str]:
    return [service.name for service in RunDir(run_dir).services()]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_roll_that_is_ended_leaves_no_second_service_behind(run_dir: Path, end: signal.Signals) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=first") as program:
        program.read_until("ready: fakes")
        before = record(run_dir, "worker-0")
        with running(command(run_dir, "roll", "worker-0")) as rolling:
            eventually(lambda: any((r.name, r.state) == ("worker-1", "waiting") for r in RunDir(run_dir).services()))
            for number in (signal.SIGSTOP, signal.SIGCONT) * 3:  # as Ctrl-Z and `fg` do, which end no wait
                os.kill(rolling.pid, number)
                time.sleep(0.2)
            os.kill(rolling.pid, end)
            assert rolling.wait() == 1
            assert "worker-1 is told to leave again; worker-0 stays" in rolling.output
            assert f"Error: {end.name}: no longer waited for" in rolling.output
        program.read_until("worker-1 (pid")
        eventually(lambda: names(run_dir) == ["scheduler-0", "worker-0"])
        assert record(run_dir, "worker-0") == before


class Heard(Exception):
    pass


def test_a_roll_says_what_it_waits_for(run_dir: Path) -> None:
    said = list[str]()

    def say(line: str) -> None:
        said.append(line)
        if line == "waiting for frontend-1: no worker is ready":
            raise Heard

    with supervised(run_dir, "scheduler-0=serve", "frontend-0=first") as program:
        program.read_until("ready: fakes")
        with pytest.raises(Heard):
            roll(RunDir(run_dir), ["frontend-0"], LONG, LONG, say)
        assert said[-1] == "frontend-1 is told to leave again; frontend-0 stays"
        eventually(lambda: names(run_dir) == ["frontend-0", "scheduler-0"])
        # by then it may have begun to start
        why = "it has not started yet|it is starting|no worker is ready"
        with pytest.raises(NotDone, match=rf"frontend-\d is not ready after 0 s: ({why}); see "):
            roll(RunDir(run_dir), ["frontend-0"], LONG, 0.0, say)


def test_one_that_is_leaving_already_is_waited_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = list[object]()

    def asked(*question: Any) -> dict[str, str] | None:
        answers.append(answer := ask(*question))
        if len(answers) == 2:  # it leaves as soon as both wait for it, and no sooner
            (run_dir / "leave").touch()
        return answer

    monkeypatch.setattr(replace, "ask", asked)
    with supervised(run_dir, "scheduler-0=serve", "worker-0=held", "worker-1=serve") as program:
        program.read_until("ready: fakes")
        record(run_dir, "worker-0")
        rundir, said, others = RunDir(run_dir), list[str](), list[str]()
        first = threading.Thread(target=lambda: drain(rundir, "worker-0", LONG, others.append))
        ask(rundir, "retire", "worker-0")
        first.start()
        try:
            assert drain(rundir, "worker-0", LONG, said.append)
        finally:
            first.join()
        assert len(said) == len(others) == 1
        assert said[0].endswith("has left")


def test_one_that_is_leaving_has_no_replacement(run_dir: Path) -> None:
    with supervised(run_dir, "scheduler-0=serve", "worker-0=held") as program:
        program.read_until("ready: fakes")
        record(run_dir, "worker-0")
        ask(RunDir(run_dir), "retire", "worker-0")
        with pytest.raises(RunDirError, match="worker-0 is leaving"):
            roll(RunDir(run_dir), ["worker-0"], LONG, LONG, lambda _: None)


def test_what_has_nothing_to_hand_over_is_not_drained(run_dir: Path) -> None:
    with supervised(run_dir, "worker-0=serve", "admin=serve") as program:
        program.read_until("ready: fakes")
        record(run_dir, "admin")
        with pytest.raises(RunDirError, match="admin has nothing to hand over, only a worker or frontend has; `pagewire roll admin`"):
            drain(RunDir(run_dir), "admin", LONG, lambda _: None)


def test_a_restart_asked_for_between_a_crash_and_the_next_start_is_that_start(run_dir: Path) -> None:
    delay = 2 * LONG  # nothing starts of itself while this test runs
    with supervised(run_dir, "--delay", str(delay), "scheduler-0=serve", "worker-0=crash") as program:
        for crashes in (1, 2):
            program.read_until(f"starting it again in {delay} s", lines=crashes)
            log = (run_dir / "logs" / "worker-0.log").read_text()
            assert log.count("started: pid") == crashes  # none went without its delay
            ask(RunDir(run_dir), "restart", "worker-0")


def test_one_that_was_started_by_hand_beside_a_supervisor_is_drained_and_left_out_of_a_roll(run_dir: Path) -> None:
    said = list[str]()
    by_hand = command(run_dir, "worker", "--runner", "oracle", "--name", "hand")
    with supervised(run_dir, "scheduler-0=serve", "worker-0=serve") as program, contextlib.ExitStack() as stack:
        program.read_until("ready: fakes")
        hand = stack.enter_context(running(by_hand))
        eventually(lambda: "hand" in names(run_dir))
        roll(RunDir(run_dir), [], LONG, LONG, said.append)
        assert said[0] == f"hand (pid {hand.pid}) was not started by `pagewire up`: it stays as it is"
        assert [line.split(" (")[0] for line in said[1:]] == ["worker worker-0", "scheduler scheduler-0"]
        with pytest.raises(RunDirError, match="this supervisor has no service 'hand'"):
            roll(RunDir(run_dir), ["hand"], LONG, LONG, said.append)
        assert drain(RunDir(run_dir), "hand", LONG, said.append)
        assert said[-1] == f"hand (pid {hand.pid}) has left"
        assert hand.wait() == 0
