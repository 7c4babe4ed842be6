"""Links over TCP under CURVE: who has the right key for the right role gets in, and nobody else."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from pagewire.keys import make_keys, parse_clients
from protocol.codec import encode
from protocol.endpoints import check_endpoint
from protocol.keys import AllowList, ClientKeys, KeyPair, client_keys, make_pair, read_pair
from protocol.messages import Hello
from protocol.options import Usage
from protocol.service import CannotRun
from protocol.sessions import UNSEQUENCED
from tests.e2e.stack import eventually
from tests.faults.fleet import Fleet, fleet
from tests.faults.load import Load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", parse_clients(["frontend-0", "frontend-1"], ["worker-0"]))
    return tmp_path / "keys"


def client_flags(folder: Path, name: str) -> tuple[str, ...]:
    return ("--key-file", str(folder / f"{name}.key"), "--server-key", str(folder / "scheduler.pub"))


def scheduler_flags(folder: Path) -> tuple[str, ...]:
    return ("--key-file", str(folder / "scheduler.key"), "--allow-file", str(folder / "allowed"))


def keyed(running: Fleet, folder: Path) -> None:
    """Start a scheduler, a worker and a frontend under keys."""
    running.scheduler("scheduler-0", *scheduler_flags(folder))
    running.worker("worker-0", "--scheduler", running.workers_endpoint, *client_flags(folder, "worker-0"))
    running.frontend("frontend-0", "--scheduler", running.frontends_endpoint, *client_flags(folder, "frontend-0"))
    running.ready(1)


@contextlib.contextmanager
def knock(endpoint: str, keys: ClientKeys | None) -> Iterator[zmq.Socket[bytes]]:
    """A stranger's socket that says HELLO as soon as it is connected."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            keys.apply(socket)
        socket.connect(endpoint)
        socket.send_multipart([UNSEQUENCED, encode(Hello("frontend", "stranger", 7, 1))])
        yield socket


# ---------------------------------------------------------------- files


def test_secret_keys_are_their_owners_alone_and_never_overwritten(folder: Path) -> None:
    for name in ("scheduler", "frontend-0", "worker-0"):
        assert os.stat(folder / f"{name}.key").st_mode & 0o777 == 0o600
    before = (folder / "scheduler.key").read_bytes()
    make_keys(folder, [("worker", "worker-1")])
    assert (folder / "scheduler.key").read_bytes() == before
    with pytest.raises(Usage, match="exists"):
        make_keys(folder, [("worker", "worker-0")])


def test_a_secret_key_that_others_may_read_is_not_used(folder: Path) -> None:
    os.chmod(folder / "worker-0.key", 0o644)
    with pytest.raises(CannotRun, match="chmod 600"):
        read_pair(folder / "worker-0.key", "--key-file")


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, b"a" * 41])
def test_a_file_without_a_key_is_named(folder: Path, content: bytes) -> None:
    (folder / "scheduler.pub").write_bytes(content)
    with pytest.raises(CannotRun, match=r"--server-key .* holds no key"):
        client_keys(str(folder / "worker-0.key"), str(folder / "scheduler.pub"))


def test_half_of_the_keys_is_none(folder: Path) -> None:
    with pytest.raises(CannotRun, match="belong together"):
        client_keys(str(folder / "worker-0.key"), "")


def test_the_allow_list_follows_its_file(folder: Path) -> None:
    allowed = AllowList(folder / "allowed")
    worker = read_pair(folder / "worker-0.key", "").public
    assert allowed.who(worker) == ("worker", "worker-0")
    newcomer = make_pair().public
    assert allowed.who(newcomer) is None
    with (folder / "allowed").open("ab") as file:
        file.write(b"# a comment\n\nfrontend %b late\n" % newcomer)
    assert allowed.who(newcomer) == ("frontend", "late")
    lines = (folder / "allowed").read_bytes().splitlines(keepends=True)
    (folder / "allowed").write_bytes(b"".join(line for line in lines if worker not in line))
    assert allowed.who(worker) is None
    (folder / "allowed").write_bytes(b"frontend nonsense\n")
    assert allowed.who(newcomer) is None, "a list that cannot be read lets nobody in"
    with pytest.raises(CannotRun, match="line 1"):
        AllowList(folder / "allowed")


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("tcp://10.0.0.1:7001", "must be encrypted"),
        ("tcp://example.org:7001", "must be encrypted"),
        ("tcp://*:7001", "name the one address"),
        ("tcp://0.0.0.0:7001", "name the one address"),
        ("tcp://[::]:7001", "name the one address"),
        ("tcp://127.0.0.1", "an endpoint is"),
        ("tcp://127.0.0.1:x", "an endpoint is"),
        ("udp://127.0.0.1:7001", "an endpoint is"),
        ("ipc://", "an endpoint is"),
    ],
)
def test_endpoints_that_are_none_or_would_leave_the_host_in_plain_text_are_refused(endpoint: str, why: str) -> None:
    with pytest.raises(CannotRun, match=why):
        check_endpoint(endpoint, "--bind-workers", secured=False, binds=True)


@pytest.mark.parametrize("endpoint", ["ipc:///run/x.sock", "tcp://127.0.0.1:7001", "tcp://[::1]:7001", "tcp://localhost:7001"])
def test_links_within_the_host_need_no_keys(endpoint: str) -> None:
    check_endpoint(endpoint, "--bind-workers", secured=False, binds=True)


# ---------------------------------------------------------------- processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("scheduler", "--bind-workers", "tcp://10.1.2.3:7002"),
        ("scheduler", "--bind-frontends", "tcp://10.1.2.3:7001"),
        ("worker", "--runner", "oracle", "--scheduler", "tcp://10.1.2.3:7002"),
        ("frontend", "--port", "0", "--scheduler", "tcp://10.1.2.3:7001"),
        ("worker", "--runner", "oracle", "--telemetry", "tcp://10.1.2.3:7003"),
    ],
)
def test_a_service_does_not_start_with_a_plain_link_off_its_host(tmp_path: Path, command: tuple[str, ...]) -> None:
    full = [sys.executable, "-P", "-m", "pagewire", *command, "--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(full, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 78
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("pagewire: ")]
    assert "tcp://10.1.2.3" in line


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_strangers_are_refused_and_counted_while_streams_run_under_keys(folder: Path) -> None:
    def own(name: str) -> KeyPair:
        return read_pair(folder / f"{name}.key", "")

    with fleet(tcp=True, step=0.02) as running:
        keyed(running, folder)
        load = Load(running.urls, 8)
        load.well_underway()
        server = (folder / "scheduler.pub").read_bytes().strip()
        strangers = {
            "no key": None,
            "an unknown key": ClientKeys(make_pair(), server),
            "another scheduler's key": ClientKeys(own("frontend-1"), make_pair().public),
            "a worker's key": ClientKeys(own("worker-0"), server),
        }
        scheduler = psutil.Process(running.services["scheduler-0"].popen.pid)
        before = (0, 0)

        def refused() -> bool:
            counters = ("key_unknown", "key_of_a_worker_refused", "connection_refused")
            return all(running.figure("scheduler-0", f"wire_{counter}") >= 12 for counter in counters)

        deadline = time.monotonic() + 60
        for round in itertools.count():
            if round >= 12 and refused():
                break
            assert time.monotonic() < deadline, "strangers are not refused, or not counted"
            with contextlib.ExitStack() as stack:
                sockets = [stack.enter_context(knock(running.frontends_endpoint, keys)) for keys in strangers.values()]
                time.sleep(0.3)
                assert not any(socket.poll(0) for socket in sockets)
            if round == 2:
                before = (scheduler.memory_info().rss, scheduler.num_fds())
        with knock(running.frontends_endpoint, ClientKeys(own("frontend-1"), server)) as socket:
            assert socket.poll(60_000), "the right key does not get in either"
        load.finish()
        eventually(lambda: scheduler.memory_info().rss < before[0] + (8 << 20))
        eventually(lambda: scheduler.num_fds() < before[1] + 8)


@pytest.mark.slow
def test_a_frontend_with_a_workers_key_says_so_and_does_not_get_ready(folder: Path) -> None:
    with fleet(tcp=True) as running:
        keyed(running, folder)
        wrong = running.frontend("frontend-1", "--scheduler", running.frontends_endpoint, *client_flags(folder, "worker-0"))
        wrong.line("lets nobody in with this key")
        time.sleep(1)
        eventually(lambda: running.state("frontend-1") == "waiting")
        assert wrong.output().count("lets nobody in") == 1


@pytest.mark.slow
def test_a_key_gets_in_as_soon_as_it_is_listed(folder: Path) -> None:
    whole = (folder / "allowed").read_bytes()
    (folder / "allowed").write_bytes(b"".join(line for line in whole.splitlines(keepends=True) if b"frontend-1" not in line))
    with fleet(tcp=True) as running:
        keyed(running, folder)
        late = running.frontend("frontend-1", "--scheduler", running.frontends_endpoint, *client_flags(folder, "frontend-1"))
        late.line("lets nobody in with this key")
        (folder / "allowed").write_bytes(whole)
        eventually(lambda: running.state("frontend-1") == "ready")
