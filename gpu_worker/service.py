"""The worker's process: three threads around `WorkerCore` and a runner.

    network   all sockets, acknowledgements, heartbeats, progress (`network.py`)
    main      loads the runner; plan → step → `runner.start`, in plan order
    output    `runner.finish` → result, in the same order, while the main thread starts the next step

The main thread is the runner's own: whatever a library keeps per thread (a CUDA context, an OpenMP pool) stays there.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from gpu_worker.core import WorkerCore, scored
from gpu_worker.errors import LoadError
from gpu_worker.faults import KillSwitch
from gpu_worker.inbox import Item, PlanArrived, SessionClosed, SessionOpened, Stop
from gpu_worker.network import Network
from gpu_worker.runner import Runner, Step
from gpu_worker.runners import make_runner
from gpu_worker.settings import WorkerSettings
from protocol.messages import Plan
from protocol.service import CannotRun, Service

IDLE_AFTER = 0.02  # seconds without a plan, and without a step in flight, before idle work is done
SWITCH_INTERVAL = 0.0001  # seconds; at Python's 5 ms the output thread waited that long for a busy main thread


def run(settings: WorkerSettings) -> None:
    """Run a worker until it is asked to stop. Raises CannotRun, RunDirError."""
    with Service("worker", settings.name, settings.run_dir, settings.log_level, drains=True, log_format=settings.log_format) as service:
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            runner = make_runner(settings, os.environ)
            switch = KillSwitch.parse(os.environ.get("PAGEWIRE_KILL", ""))
        except (LoadError, ValueError) as error:
            raise CannotRun(str(error)) from None
        network = Network(settings, service, runner)
        network.open()
        try:
            _serve(service, runner, network, switch)
        finally:
            network.close()


def _serve(service: Service, runner: Runner, network: Network, switch: KillSwitch) -> None:
    try:
        description = runner.load()
    except LoadError as error:
        raise CannotRun(str(error)) from None
    g = description.geometry
    service.log.info("loaded %s: %d blocks of %d tokens, %d slots", description.model, g.blocks, g.block_size, g.slots)
    network.loaded(description)
    # A full collection visits all that torch has made, 171,000 objects, and stops every thread for 0.1 s meanwhile.
    gc.collect()
    gc.freeze()
    output = _Output(WorkerCore(description), runner, network, switch)
    output.start()
    _Loop(service, output).run()  # if this raises, a step may never end: nobody waits for it
    output.close()


class _Output(threading.Thread):
    """Finishes steps in the order of their starts and hands the results to the network thread."""

    def __init__(self, core: WorkerCore, runner: Runner, network: Network, switch: KillSwitch) -> None:
        super().__init__(name="output", daemon=True)
        self.core = core
        self.runner = runner
        self.network = network
        self.switch = switch
        self._steps: SimpleQueue[tuple[int, Step] | threading.Event | None] = SimpleQueue()
        self._failed = False
        self._given = self._finished = 0  # steps; the first is the main thread's to count, the second this one's

    @property
    def at_rest(self) -> bool:
        """Whether every step handed over is finished."""
        return self._given == self._finished

    def finish(self, session: int, step: Step) -> None:
        """Finish a step that has been started; its result goes to `session`."""
        self._given += 1
        self._steps.put((session, step))

    def drain(self) -> None:
        """Wait until every step handed over is finished."""
        drained = threading.Event()
        self._steps.put(drained)
        drained.wait()

    def close(self) -> None:
        """Finish what has been started, then end the thread."""
        self._steps.put(None)
        self.join()

    def run(self) -> None:
        """The thread. A step that fails here has failed on the device: the process ends."""
        while (item := self._steps.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif not self._failed:
                try:
                    self._finish(*item)
                    self._finished += 1
                except Exception as error:
                    self._failed = True
                    self.network.inbox.put(Stop(error))

    def _finish(self, session: int, step: Step) -> None:
        outcome = self.runner.finish(step)
        ended = time.monotonic()
        self.switch.finished(step, outcome)
        result = self.core.result(step, outcome)
        if (trace := self.network.trace).on:
            key = f"{session}:{step.plan.step}"
            trace.note("device", "forward", ended - outcome.seconds, ended, key)
            trace.note("output", "sample", ended, time.monotonic(), key)
        self.switch.reached("result_unsent")
        for message in scored(step, outcome):
            self.network.send(session, message)
        self.network.send(session, result)


class _Loop:
    """The main thread: one item after another, in the order in which they arrived."""

    def __init__(self, service: Service, output: _Output) -> None:
        self._service = service
        self._output = output
        self._core = output.core
        self._runner = output.runner
        self._network = output.network
        self._switch = output.switch
        self._session = 0  # the session in which READY was said and nothing has failed
        self._idle_work = True  # whether the runner may have some

    def run(self) -> None:
        """Until asked to stop: the running step is finished, plans not begun are left. Raises what a thread raised."""
        while True:
            item = self._next()
            if isinstance(item, Stop) and item.error is not None:
                raise item.error
            if isinstance(item, Stop) or self._service.stopping.is_set():
                return
            match item:
                case PlanArrived(session, plan):
                    if session == self._session == self._network.session:
                        self._step(plan)
                case SessionOpened(session, hash_key):
                    if session == self._network.session:
                        self._core.welcome(hash_key)
                        self._network.send(session, self._core.ready())
                        self._session = session
                case SessionClosed():
                    self._reset()

    def _next(self) -> Item:
        """The next item, waited for; as long as the runner has idle work, that is done meanwhile, a slice at a time."""
        inbox = self._network.inbox
        while self._idle_work:
            try:
                return inbox.get(timeout=IDLE_AFTER)
            except Empty:
                if self._output.at_rest:
                    self._idle(lambda: not inbox.empty())
        return inbox.get()

    def _idle(self, interrupted: Callable[[], bool]) -> None:
        try:
            self._idle_work = self._runner.idle(interrupted)
        except Exception as error:
            if _device_is_lost(error):
                raise
            self._service.log.exception("idle work failed, no more is done")
            self._idle_work = False

    def _step(self, plan: Plan) -> None:
        self._switch.reached("plan_received")
        begun = time.monotonic()
        try:
            step = self._core.apply(plan)
            self._runner.start(step)
        except Exception as error:
            if _device_is_lost(error):
                raise
            self._service.log.exception("step %d failed", plan.step)
            self._output.drain()  # the steps before it are good
            self._network.fail(self._session, plan.step, f"step {plan.step} raised {type(error).__name__}: {error}")
            self._session = 0
            return
        if self._network.trace.on:
            self._network.trace.note("main", "start", begun, time.monotonic(), f"{self._session}:{plan.step}")
        self._switch.started(step)
        self._output.finish(self._session, step)

    def _reset(self) -> None:
        self._output.drain()
        self._session = 0
        self._core.reset()
        self._runner.reset()
        self._network.settled()


def _device_is_lost(error: Exception) -> bool:
    """Whether a CUDA context has gone with this error: no call of this process will work on it again."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
