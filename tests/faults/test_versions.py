"""Peers one minor version of the protocol apart work together; two apart are refused.

A service of another version is made of this one: everything it sends is rewritten as that version would say it.
"""

from __future__ import annotations

import sys

import pytest

from protocol.messages import PROTOCOL, PROTOCOL_OLDEST
from tests.e2e.stack import Process, eventually
from tests.faults.fleet import Fleet, fleet
from tests.faults.load import Load
from tests.faults.test_replace import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Runs first in such a service: HELLO and WELCOME name its versions; a newer one has one field more in every message,
# an older one lacks what protocol 2 appended.
SPEAK = """
import msgpack
import protocol.codec as codec
import protocol.messages.base as base
import protocol.messages as messages

oldest, newest = {oldest}, {newest}
encode = codec.encode

def speak(message):
    if not isinstance(message, messages.Message):
        return encode(message)
    row = msgpack.unpackb(encode(message))
    if row[0] == "hello":
        row[5:7] = [oldest, newest]
    elif row[0] == "attach" and newest < 2:
        del row[3:]
    elif newest > base.PROTOCOL:
        row.append("a field of tomorrow")
    if row[0] == "hello" and newest > base.PROTOCOL:
        row.append({{"what": "nobody knows yet"}})
    return msgpack.packb(row)

codec.encode = speak
"""
UP, DOWN = (PROTOCOL, PROTOCOL + 1), (0, 1)
TWO_UP, TWO_DOWN = (PROTOCOL + 1, PROTOCOL + 2), (-1, 0)


def speaking(running: Fleet, role: str, name: str, versions: tuple[int, int]) -> Process:
    """Start a frontend or worker of other versions (oldest, newest)."""
    module = {"frontend": "frontend", "worker": "gpu_worker"}[role]
    script = SPEAK.format(oldest=versions[0], newest=versions[1]) + f"import sys, {module}.cli\nsys.argv[0] = '{role}'\n{module}.cli.main()"
    flags = ["--run-dir", str(running.stack.run_dir), "--name", name]
    flags += ["--port", "0"] if role == "frontend" else ["--runner", "oracle", "--max-num-batched-tokens", "128"]
    process = running.stack.program([sys.executable, "-P", "-c", script, *flags], {"PAGEWIRE_ORACLE_STEP_TIME": "0.02"})
    running.services[name] = process
    return process


@pytest.mark.parametrize("versions", [UP, DOWN], ids=["up", "down"])
def test_peers_one_version_apart_serve_together(versions: tuple[int, int]) -> None:
    with fleet(step=0.02) as running:
        running.scheduler()
        speaking(running, "worker", "worker-0", versions)
        speaking(running, "frontend", "frontend-0", versions)
        running.frontend("frontend-1")
        running.worker("worker-1")
        running.ready(2)
        load = Load(running.urls, 24)
        load.well_underway()
        eventually(lambda: all(running.figure(f"worker-{i}", "worker_tokens") > 0 for i in range(2)))
        load.finish()
        running.at_rest()
        running.answered(load)


@pytest.mark.parametrize("versions", [TWO_UP, TWO_DOWN], ids=["up", "down"])
def test_peers_two_versions_apart_are_refused_and_say_why(versions: tuple[int, int]) -> None:
    with fleet() as running:
        running.scheduler()
        running.worker("worker-0")
        worker = speaking(running, "worker", "worker-1", versions)
        frontend = speaking(running, "frontend", "frontend-0", versions)
        said = rf"speaks protocol {versions[0]} to {versions[1]}, this scheduler {PROTOCOL_OLDEST} to {PROTOCOL}"
        worker.line(said)
        frontend.line(said)
        eventually(lambda: running.figure("scheduler-0", "wire_session_refused") >= 2)
        eventually(lambda: running.sum("workers_ready", "scheduler") == 1)


def test_an_older_worker_leaves_at_once_when_it_is_drained() -> None:
    with fleet() as running:
        running.scheduler()
        running.worker("worker-0")
        speaking(running, "worker", "worker-1", DOWN)
        running.frontend("frontend-0")
        running.ready(2)
        load = Load(running.urls, 8)
        load.well_underway()
        assert command(running.stack, "drain", "worker-1").returncode == 0
        load.finish()
        running.at_rest()
