"""A service with nothing to serve, started by the supervisor in its tests: python -m fake_service BEHAVIOUR …"""

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

from protocol.service import CannotRun, Service, die_with_parent, refuse

parser = argparse.ArgumentParser()
parser.add_argument("behaviour")
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--name")
parser.add_argument("--listen-fd", type=int, default=-1)
given = parser.parse_args()

die_with_parent()
try:
    with Service(given.name.partition("-")[0], given.name, given.run_dir) as service:
        if given.behaviour == "refuse":
            raise CannotRun("no such model: somewhere/nothing")
        role = given.name.partition("-")[0]
        if given.behaviour == "alone" and any(r.role == role and r.name != given.name for r in service.rundir.services()):
            raise CannotRun("no memory beside the other one")
        if given.behaviour == "stillborn":
            os._exit(7)
        if given.behaviour == "first" and any(r.role == role and r.name != given.name for r in service.rundir.services()):
            service.state("waiting")
        else:
            service.state("ready")
        if given.behaviour == "crash":
            raise RuntimeError("a fault of its own")
        if given.behaviour == "helper" and os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
            os._exit(0)
        if given.behaviour == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
            time.sleep(60)
        if given.listen_fd >= 0:
            listening = socket.socket(fileno=given.listen_fd)
            listening.setblocking(True)
        service.stopping.wait()
        time.sleep(1.0 if given.behaviour == "slow" else 0.0)
        print(f"{given.name} stops", file=sys.stderr, flush=True)
except CannotRun as error:
    refuse(error)
