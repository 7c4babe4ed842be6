"""The services find each other in whatever order they start, over TCP, and by `honcho`."""

from __future__ import annotations

import itertools
import re
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from protocol.rundir import RunDir
from tests.e2e.stack import Stack, eventually, oracle_texts, stack, stream_completion

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "in any order", "max_tokens": 20, "seed": 5}


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def answers(url: str) -> None:
    def ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    eventually(ready)
    seen = stream_completion(url, BODY)
    assert seen.error is None
    ((text, reason, _),) = oracle_texts(BODY)
    assert (seen.texts.get(0, ""), seen.reasons[0]) == (text, [reason])


@pytest.mark.parametrize("order", list(itertools.permutations(("frontend", "scheduler", "worker"))), ids="-".join)
def test_services_started_by_hand_over_tcp_answer(order: tuple[str, ...]) -> None:
    http, frontends, workers = free_ports(3)
    arguments = {
        "frontend": ["--port", str(http), "--scheduler", f"tcp://127.0.0.1:{frontends}"],
        "scheduler": ["--bind-frontends", f"tcp://127.0.0.1:{frontends}", "--bind-workers", f"tcp://127.0.0.1:{workers}"],
        "worker": ["--runner", "oracle", "--scheduler", f"tcp://127.0.0.1:{workers}"],
    }
    with stack() as made:
        for role in order:
            # each has a run directory of its own, as on hosts of their own
            process = made.start(role, *arguments[role], run_dir=made.folder / role)
            process.line("started: pid")
        answers(f"http://127.0.0.1:{http}")


def test_a_service_alone_waits_for_its_peers_and_says_so_once() -> None:
    with stack() as made:
        processes = [made.start(role, *more) for role, more in (("frontend", ["--port", "0"]), ("worker", ["--runner", "oracle"]))]
        for process in processes:
            process.line("waiting for a scheduler")
        _nothing_happens(made)
        for process in processes:
            assert process.output().count("waiting for a scheduler") == 1


def _nothing_happens(made: Stack) -> None:
    time.sleep(2.5)
    assert all(process.popen.poll() is None for process in made.processes)


def test_honcho_starts_the_procfile() -> None:
    (port,) = free_ports(1)
    with stack() as made:
        env = {"PAGEWIRE_PORT": str(port), "PAGEWIRE_RUNNER": "oracle", "PAGEWIRE_RUN_DIR": str(made.run_dir)}
        env["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        made.program([sys.executable, "-m", "honcho", "-f", str(ROOT / "procfile"), "start"], env, cwd=ROOT)
        answers(f"http://127.0.0.1:{port}")
        names = {service.name for service in RunDir(made.run_dir).services()}
        assert {re.sub(r"-\d+$", "", name) for name in names} == {"frontend", "scheduler", "worker"}
