"""What a runner prepares while nothing is in flight: when it is asked, and when no more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from gpu_worker.inbox import Stop
from gpu_worker.service import _Loop


class Idler:
    """Has so many slices to do; an item arrives during the slice named in `arrives`, and once there are none, or one fails."""

    def __init__(self, slices: int, arrives: int = 0, fails: bool = False) -> None:
        self.left, self.arrives, self.fails = slices, arrives, fails
        self.inbox: SimpleQueue[Stop] = SimpleQueue()
        self.interrupted: list[bool] = []

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        if self.fails or not self.left:
            self.inbox.put(Stop())
            if self.fails:
                raise ValueError("no")
            return False
        self.left -= 1
        if len(self.interrupted) + 1 == self.arrives:
            self.inbox.put(Stop())
        self.interrupted.append(interrupted())
        return True


def loop(runner: Idler, at_rest: bool = True) -> _Loop:
    network = SimpleNamespace(inbox=runner.inbox)
    output = SimpleNamespace(core=None, runner=runner, network=network, switch=None, at_rest=at_rest)
    return _Loop(SimpleNamespace(log=logging.getLogger("test")), output)  # type: ignore[arg-type]


def test_slices_are_done_until_something_arrives_which_the_runner_is_told() -> None:
    runner = Idler(10, arrives=3)
    assert loop(runner)._next() == Stop()
    assert runner.interrupted == [False, False, True]


def test_nothing_is_prepared_while_a_step_is_in_flight() -> None:
    runner = Idler(10)
    threading.Timer(0.15, runner.inbox.put, (Stop(),)).start()
    assert loop(runner, at_rest=False)._next() == Stop()
    assert runner.left == 10


@pytest.mark.parametrize("runner", [Idler(2), Idler(2, fails=True)], ids=["done", "failed"])
def test_with_nothing_left_to_prepare_it_is_asked_no_more(runner: Idler) -> None:
    made = loop(runner)
    assert made._next() == Stop()
    assert not made._idle_work
    runner.inbox.put(Stop())
    assert made._next() == Stop()
    assert len(runner.interrupted) == (0 if runner.fails else 2)
