"""Runs a Supervisor over fake services: python drive.py RUN_DIR NAME=BEHAVIOUR …"""

import os
import sys
from pathlib import Path

from pagewire.supervisor import Spec, Supervisor
from protocol.rundir import RunDir

os.environ["PYTHONPATH"] = str(Path(__file__).parent)
rundir = RunDir(sys.argv[1])
specs = []
for argument in sys.argv[2:]:
    name, behaviour = argument.split("=")
    specs.append(Spec(name.partition("-")[0], name, "fake_service", (behaviour,)))


def all_ready() -> bool:
    return len(rundir.services()) == len(specs) and all(record.state == "ready" for record in rundir.services())


code = Supervisor(specs, rundir, all_ready, "fakes", shutdown_timeout=1.0).run()
rundir.clean()
sys.exit(code)
