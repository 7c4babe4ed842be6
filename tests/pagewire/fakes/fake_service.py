"""A service with nothing to serve, started by the supervisor in its tests: python -m fake_service BEHAVIOUR …

Behaviours: serve; slow (takes a second to leave) and held (leaves when the file `leave` is there); helper (has a child that heeds no
signal); hang; crash, once it is ready; stillborn; refuse; alone (refuses beside another of its role); first (waits beside another).
"""

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

from protocol.service import STOP_LIMIT, CannotRun, Service, die_with_parent, refuse

parser = argparse.ArgumentParser()
parser.add_argument("behaviour")
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--name")
parser.add_argument("--listen-fd", type=int, default=-1)
given = parser.parse_args()

LONG = 600.0  # seconds: whoever stays so long was not ended
stop_limit = LONG if given.behaviour == "held" else STOP_LIMIT

die_with_parent()
try:
    with Service(given.name.partition("-")[0], given.name, given.run_dir, stop_limit=stop_limit) as service:
        if given.behaviour == "refuse":
            raise CannotRun("no such model: somewhere/nothing")
        role = given.name.partition("-")[0]
        if given.behaviour == "alone" and any(r.role == role and r.name != given.name for r in service.rundir.services()):
            raise CannotRun("no memory beside the other one")
        if given.behaviour == "stillborn":
            os._exit(7)
        if given.behaviour == "helper" and os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(LONG)
            os._exit(0)
        if given.behaviour == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
        # Whoever reads this may act on it at once: all that the behaviour needs is done.
        if given.behaviour == "first" and any(r.role == role and r.name != given.name for r in service.rundir.services()):
            service.state("waiting")
        else:
            service.state("ready")
        if given.behaviour == "crash":
            raise RuntimeError("a fault of its own")
        if given.behaviour == "hang":
            time.sleep(LONG)
        if given.listen_fd >= 0:
            listening = socket.socket(fileno=given.listen_fd)
            listening.setblocking(True)
        service.stopping.wait()
        if given.behaviour == "slow":
            time.sleep(1.0)
        while given.behaviour == "held" and not (given.run_dir / "leave").exists():
            time.sleep(0.02)
        print(f"{given.name} stops", file=sys.stderr, flush=True)
except CannotRun as error:
    refuse(error)
