"""An engine in a fork of the process that made it: its thread is not there, so nothing may wait for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
# The fork ends as any program does, with its handlers of the end; behind it the engine still serves.
FORKED = """
import os, sys
from pagewire import LLMEngine, SamplingParams
engine = LLMEngine(runner="oracle")
engine.add_request([1, 2, 3], SamplingParams(max_tokens=2))
if not (child := os.fork()):
    for ask in (engine.step, lambda: engine.add_request([1]), lambda: engine.abort_request("request-0")):
        try:
            ask()
        except RuntimeError as error:
            assert f"process {os.getppid()}" in str(error), error
        else:
            os._exit(3)
    engine.close()
    sys.exit(4)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
while engine.has_unfinished_requests():
    assert all(step.finish_reason != "error" for step in engine.step())
"""


def test_a_fork_is_refused_the_engine_and_ends_without_waiting_for_it():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
