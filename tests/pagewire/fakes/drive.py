"""Runs a Supervisor over fake services: python drive.py RUN_DIR [FLAGS] NAME=BEHAVIOUR …

Flags set what is a matter of seconds, for tests that must not hurry: --shutdown-timeout; --delay, from every death to the next
start; --last-stacks, for one that hangs.
"""

import argparse
import os
import sys
from pathlib import Path

from pagewire import restart, supervisor
from pagewire.supervisor import Spec, Supervisor
from protocol.rundir import RunDir

parser = argparse.ArgumentParser()
parser.add_argument("run_dir")
parser.add_argument("--shutdown-timeout", type=float, default=1.0)
parser.add_argument("--delay", type=float)
parser.add_argument("--last-stacks", type=float, default=supervisor.LAST_STACKS)
parser.add_argument("services", nargs="+")
given = parser.parse_args()

os.environ["PYTHONPATH"] = str(Path(__file__).parent)
if given.delay is not None:
    restart.FIRST_DELAY = restart.LONGEST_DELAY = given.delay
supervisor.LAST_STACKS = given.last_stacks
rundir = RunDir(given.run_dir)
specs = []
for argument in given.services:
    name, behaviour = argument.split("=")
    specs.append(Spec(name.partition("-")[0], name, "fake_service", (behaviour,)))


def all_ready() -> bool:
    return len(rundir.services()) == len(specs) and all(record.state == "ready" for record in rundir.services())


code = Supervisor(specs, rundir, all_ready, "fakes", given.shutdown_timeout).run()
rundir.clean()
sys.exit(code)
