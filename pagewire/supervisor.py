"""`pagewire up`: starts the services, restarts what dies, and ends everything.

The supervisor does no work of its own: it holds the listening sockets, so that a restarted frontend refuses no
connection, and sleeps until a signal, a death or the next restart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

from pagewire.control import Control
from pagewire.restart import LONG_LIFE, Restarts
from protocol.guardian import Guardian
from protocol.rundir import RunDir
from protocol.service import DRAIN_SIGNAL, EXIT_FAILED, PARENT, stop_signals

READY = ("ready", "waiting")  # states of a service that has started well
STOP_MARGIN = 0.9  # seconds from the streams' end to SIGKILL
LAST_FIGURES = 0.4  # of these, the admin server waits so long for what the others say at their end
LAST_STACKS = 0.1  # seconds that one which hangs gets to log its stacks before SIGKILL
LOOK_EVERY = 0.05  # seconds between two looks at `probe` and at dying processes


@dataclass(frozen=True)
class Spec:
    """A service to run: `python -P -m MODULE ARGUMENTS --run-dir … --name …`."""

    role: str  # frontend, scheduler, worker, admin
    name: str
    module: str
    arguments: tuple[str, ...] = ()
    listen_fd: int = -1  # a listening socket to hand over

    def command(self, run_dir: str) -> list[str]:
        """The command line. `-P` keeps the working directory out of the module path."""
        listening = ["--listen-fd", str(self.listen_fd)] if self.listen_fd >= 0 else []
        return [sys.executable, "-P", "-m", self.module, *self.arguments, "--run-dir", run_dir, "--name", self.name, *listening]


@dataclass
class _Child:
    spec: Spec
    restarts: Restarts = field(default_factory=Restarts)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float | None = 0.0  # when to start it; None: it runs, or never again
    retired: bool = False  # it leaves on purpose, or has left; it is started again only when somebody asks
    renewed: bool = False  # it was told to stop, and is started again at once
    added: bool = False  # it was asked for while others serve, and has not been ready yet: if it cannot run, they go on
    failure: str = ""  # why it has been given up
    twin: str = ""  # of a roll, which takes its place when it leaves


class Supervisor:
    """Runs services until told to stop. `probe` says whether the whole answers; `say` prints a line for the user."""

    def __init__(
        self,
        specs: Sequence[Spec],
        rundir: RunDir,
        probe: Callable[[], bool],
        ready: str,
        shutdown_timeout: float = 3.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self._children = [_Child(spec) for spec in specs]
        self._rundir = rundir
        self._probe = probe
        self._ready = ready
        self._shutdown_timeout = shutdown_timeout
        self._print = say
        self._stopping = 0.0  # when the first request to stop came
        self._hurry = False  # the user pressed Ctrl-C again
        self._failure = ""

    def run(self) -> int:
        """Start everything and stay until SIGTERM, SIGINT or SIGHUP (not under nohup), or until a service cannot be kept running.

        Must be called from the main thread: services die with the thread that started them. Returns the exit code.
        """
        begun = time.monotonic()
        answering = False
        with (
            self._signal_pipe() as wakeups,
            contextlib.closing(Guardian(self._rundir.path)) as self._guardian,
            contextlib.closing(Control(self._rundir, self._command)) as self._control,
        ):
            try:
                while not self._stopping and not self._failure:
                    self._start_due()
                    if not answering and self._probe():
                        answering = True
                        self._say(f"ready: {self._ready} (in {time.monotonic() - begun:.1f} s)")
                    self._sleep(wakeups, LOOK_EVERY if not answering else self._until_next_start())
                    self._bury()
            finally:
                if self._failure:
                    self._say(f"pagewire up: {self._failure}")
                self._stop(wakeups)
        return 1 if self._failure else 0

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # whoever read the output is gone, the services are not
            self._print(line)
            if sys.stdout is not None:  # it is where a shell has closed it
                sys.stdout.flush()

    # ------------------------------------------------------------ starting

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.start_at is not None and child.start_at <= now:
                child.start_at = None
                child.started = now
                spec = child.spec
                try:
                    child.process = subprocess.Popen(
                        spec.command(str(self._rundir.path)),
                        env={**os.environ, PARENT: str(os.getpid())},
                        stdin=subprocess.DEVNULL,
                        pass_fds=(spec.listen_fd,) if spec.listen_fd >= 0 else (),
                        process_group=0,  # a Ctrl-C in the terminal reaches the supervisor alone
                    )
                except OSError as error:  # no process or no memory to be had; that says nothing about the service
                    delay = child.restarts.died(EXIT_FAILED, 0.0, was_ready=True) or 0.0
                    child.start_at = now + delay
                    self._say(f"pagewire up: {spec.name} could not be started: {error.strerror}; trying again in {delay:.1f} s")
                    continue
                self._guardian.watch(child.process.pid)

    # ------------------------------------------------------------ planned replacement

    def _command(self, command: str, name: str) -> dict[str, str]:
        """What `pagewire drain`, `start` and `roll` ask for. Raises ValueError."""
        child = next((child for child in self._children if child.spec.name == name), None)
        running = child is not None and child.process is not None
        if command == "has":
            return {"has": "yes" if child is not None else ""}
        if child is None or (child.retired and not running and command != "start"):
            raise ValueError(child.failure if child is not None and child.failure else f"this supervisor has no service {name!r}")
        if child.retired and command not in ("start", "retire"):
            raise ValueError(f"{name} is leaving")
        match command:
            case "twin":
                child.twin = self._add_twin(child.spec)
                return {"name": child.twin}
            case "start":
                if not child.retired:
                    raise ValueError(f"{name} has not been drained: there is nothing to start")
                if (successor := self._successor(child)) is not None:
                    raise ValueError(f"{name} was replaced by {successor.spec.name}")
                # One that is still leaving is started again when it has left.
                child.retired, child.renewed, child.start_at = False, running, None if running else 0.0
                child.added, child.failure, child.restarts = True, "", Restarts()
            case "retire":
                child.retired, child.start_at = True, None
                for other in self._children:
                    other.twin = "" if other.twin == name and not other.retired else other.twin
                if child.process is not None:
                    child.process.send_signal(DRAIN_SIGNAL)
            case "restart":
                child.renewed, child.start_at = running, None if running else 0.0  # one that waits after a crash waits no longer
                if child.process is not None:
                    child.process.send_signal(DRAIN_SIGNAL)  # who has nothing to hand over just stops
            case "look":
                pass
            case _:
                raise ValueError(f"there is no command {command!r}")
        return {}

    def _successor(self, child: _Child) -> _Child | None:
        """Who has taken a service's place, after however many rolls, and has not left."""
        while child.retired and child.twin:
            child = next(other for other in self._children if other.spec.name == child.twin)
        return None if child.retired else child

    def _add_twin(self, spec: Spec) -> str:
        """Have another service like this one, under the first name of its role that nobody bears."""
        taken = {child.spec.name for child in self._children if child.process is not None or not child.retired}
        name = next(n for i in itertools.count() if (n := f"{spec.role}-{i}") not in taken)
        others = [child for child in self._children if child.spec.name != name]
        self._children = [*others, _Child(dataclasses.replace(spec, name=name), added=True)]
        return name

    def _until_next_start(self) -> float | None:
        due = [child.start_at for child in self._children if child.start_at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    # ------------------------------------------------------------ deaths

    def _bury(self) -> None:
        """Notice deaths, and settle what follows."""
        for child in list(self._children):
            if child.process is not None and (code := child.process.poll()) is not None:
                pid = child.process.pid
                self._end_group(child.process)
                child.process = None
                if child.retired or child.renewed:
                    self._rundir.forget(child.spec.name, pid)
                if child.retired:
                    self._say(f"pagewire up: {child.spec.name} (pid {pid}) has left")
                    continue
                if child.renewed:
                    child.renewed, child.start_at = False, 0.0
                    continue
                lived = time.monotonic() - child.started
                was_ready = self._was_ready(child.spec.name, pid, code, lived)
                child.added = child.added and not was_ready
                delay = child.restarts.died(code, lived, was_ready)
                self._rundir.forget(child.spec.name, pid)
                if delay is None:
                    self._give_up(child, f"{child.spec.name} cannot run: it {_how(code)}; see {self._rundir.logs}")
                else:
                    child.start_at = time.monotonic() + delay
                    self._say(f"pagewire up: {child.spec.name} (pid {pid}) {_how(code)}; starting it again in {delay:.1f} s")

    def _give_up(self, child: _Child, why: str) -> None:
        """Without a service that was there from the start, end everything; without one that was added, go on."""
        if child.added:
            child.retired, child.failure = True, why
            self._say(f"pagewire up: {why}; the others go on")
        else:
            self._failure = self._failure or why

    def _was_ready(self, name: str, pid: int, code: int, lived: float) -> bool:
        """Whether the service had started: one that was killed or crashed leaves its last state behind."""
        record = self._rundir.last_record(name)
        return code == 0 or lived >= LONG_LIFE or (record is not None and record.pid == pid and record.state in READY)

    def _end_group(self, process: subprocess.Popen[bytes]) -> None:
        """Kill what a dead service left in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        self._guardian.forget(process.pid)

    # ------------------------------------------------------------ the end

    def _stop(self, wakeups: int) -> None:
        """Frontends first, which stop accepting and see their streams out; then who serves them; then the admin server, which
        counts what those say at their end; then by force."""
        streams_end = time.monotonic() + self._shutdown_timeout
        self._end([child for child in self._children if child.spec.role == "frontend"], wakeups, streams_end)
        self._end([child for child in self._children if child.spec.role != "admin"], wakeups, streams_end + LAST_FIGURES)
        self._end(self._children, wakeups, streams_end + STOP_MARGIN)
        left = [child.process for child in self._children if child.process is not None and child.process.poll() is None]
        for process in left:
            process.send_signal(signal.SIGUSR1)  # its log gets the stacks of what hangs
        if left:
            time.sleep(LAST_STACKS)
        for child in self._children:
            if child.process is not None:
                self._end_group(child.process)
                child.process.wait()
                child.process = None

    def _end(self, children: list[_Child], wakeups: int, deadline: float) -> None:
        """Tell services to stop, and wait for them; to be told twice harms none."""
        running = [child.process for child in children if child.process is not None]
        for process in running:
            if process.poll() is None:
                process.terminate()
        while any(process.poll() is None for process in running) and time.monotonic() < deadline and not self._hurry:
            self._sleep(wakeups, LOOK_EVERY)

    # ------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _signal_pipe(self) -> Iterator[int]:
        """A file descriptor that is readable after a signal, while the supervisor runs."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous = {number: signal.signal(number, self._on_stop) for number in stop_signals()}
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        # `make` and process groups may repeat a signal at once; only a person repeats it later, in impatience.
        if not self._stopping:
            self._stopping = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._stopping + 0.5:
            self._hurry = True

    def _sleep(self, wakeups: int, seconds: float | None) -> None:
        ready, _, _ = select.select([wakeups, self._control.socket.fileno()], [], [], seconds)
        if wakeups in ready:
            os.read(wakeups, 4096)
        if self._control.socket.fileno() in ready:
            self._control.answer()


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"
