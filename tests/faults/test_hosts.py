"""Four hosts, as network namespaces joined by a bridge: scheduler, frontend, two workers, over CURVE."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagewire.keys import make_keys, parse_clients
from tests.e2e.stack import Process, eventually
from tests.faults.fleet import ORACLE, Fleet, fleet
from tests.faults.load import Load
from tests.faults.test_keys import client_flags, scheduler_flags
from tests.faults.test_replace import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

HOSTS = ("scheduler", "frontend", "worker-a", "worker-b")
NET = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"  # of this run's bridge


def ip(*arguments: str) -> None:
    """Run `ip ARGUMENTS`. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=60)


class Hosts:
    """The namespaces; the test's own sees them through the bridge, as .254."""

    def __init__(self) -> None:
        self.tag = f"pw{os.getpid()}"
        self.bridge = self.tag

    def open(self) -> None:
        """Make them."""
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{NET}.254/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number, host in enumerate(HOSTS):
            ip("netns", "add", self.space(host))
            ip("link", "add", f"{self.tag}v{number}", "type", "veth", "peer", "name", "eth0", "netns", self.space(host))
            ip("link", "set", f"{self.tag}v{number}", "master", self.bridge, "up")
            for words in (
                ("addr", "add", f"{self.address(host)}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", self.space(host), *words)

    def space(self, host: str) -> str:
        return f"{self.tag}-{host}"

    def address(self, host: str) -> str:
        return f"{NET}.{HOSTS.index(host) + 1}"

    def close(self) -> None:
        for host in HOSTS:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", self.space(host))
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", self.bridge)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    why = ""
    if shutil.which("ip") is None:
        why = "there is no `ip` (apt-get install iproute2)"
    else:
        tried = subprocess.run(["ip", "netns", "add", f"pw{os.getpid()}-try"], capture_output=True, text=True, timeout=20)
        why = f"no right to make network namespaces: {tried.stderr.strip()}" if tried.returncode else ""
        if not why:
            ip("netns", "del", f"pw{os.getpid()}-try")
    if why and os.environ.get("CI") == "true":
        pytest.fail(why)
    if why:
        pytest.skip(why)
    made = Hosts()
    try:
        made.open()
        yield made
    finally:
        made.close()


def start(running: Fleet, hosts: Hosts, host: str, name: str, *arguments: str) -> Process:
    """Start a service on a host. Its run directory is shared, so that the test sees its figures; its links are TCP."""
    program = [sys.executable, "-P", "-m", "pagewire", *arguments, "--name", name, "--run-dir", str(running.stack.run_dir)]
    process = running.stack.program(["ip", "netns", "exec", hosts.space(host), *program], {"PAGEWIRE_ORACLE_STEP_TIME": "0.04"})
    running.services[name] = process
    return process


def test_a_worker_moves_from_one_host_to_another_under_load(hosts: Hosts, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_keys(keys, parse_clients(["frontend-0"], ["worker-0", "worker-1", "worker-2"]))
    frontends, workers = (f"tcp://{hosts.address('scheduler')}:{port}" for port in (7001, 7002))

    def worker(host: str, name: str) -> None:
        start(running, hosts, host, name, "worker", *ORACLE, "--scheduler", workers, *client_flags(keys, name))

    with fleet() as running:
        binds = ("--bind-frontends", frontends, "--bind-workers", workers, "--max-num-batched-tokens", "128")
        start(running, hosts, "scheduler", "scheduler-0", "scheduler", *binds, *scheduler_flags(keys))
        worker("worker-a", "worker-0")
        worker("worker-b", "worker-1")
        listens = ("--host", hosts.address("frontend"), "--port", "8000", "--no-auth")
        start(running, hosts, "frontend", "frontend-0", "frontend", *listens, "--scheduler", frontends, *client_flags(keys, "frontend-0"))
        running.ready(2)
        load = Load(running.urls)
        load.well_underway()
        # worker-0 leaves host a; its successor joins on host b.
        worker("worker-b", "worker-2")
        eventually(lambda: running.state("worker-2") == "ready")
        assert command(running.stack, "drain", "worker-0").returncode == 0
        eventually(lambda: running.figure("worker-2", "worker_tokens") > 0)
        # And host b loses its other worker without notice.
        running.kill("worker-1")
        load.finish()
        running.at_rest()
        running.answered(load)
        assert running.figure("scheduler-0", "wire_connection_refused") == 0
