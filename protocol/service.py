"""What every service does from its start to its end: logging, signals, its file in the run directory.

    with Service("scheduler", settings.name, settings.run_dir, settings.log_level) as service:
        ...bind, connect...
        service.state("ready")
        while not service.stopping.is_set():
            poller.poll()           # `service.stop_fd` is among its sockets

A service dies with the process that started it if that process asked for it (`PAGEWIRE_PARENT`), and never outlives
a request to stop by more than a few seconds, even if its main thread hangs: a thread of its own sees to that.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import logging.handlers
import math
import os
import signal
import sys
import threading
import time
from io import TextIOWrapper
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from protocol.files import RunDirError
from protocol.flight import FlightRecorder
from protocol.log_format import Json, Text
from protocol.registration import new_incarnation
from protocol.rundir import RunDir

LOG_BYTES = 50_000_000  # of one log file
LOG_FILES = 3  # rotated ones kept
STOP_LIMIT = 5.0  # seconds from the request to stop to SIGKILL
STOP_SLICE = 0.1  # seconds; of a time in which the whole process stood still, no more than this counts towards the limit
PARENT = "PAGEWIRE_PARENT"  # environment: pid of the supervisor whose death ends this process
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
DRAIN_SIGNAL = signal.SIGUSR2  # hand over what runs here, then end

EXIT_FAILED = 1  # the service died; starting it again may help
EXIT_REFUSED = 78  # it cannot run as configured (EX_CONFIG); starting it again will not help


class CannotRun(Exception):
    """The service cannot run as configured; the message is one line and says what would help."""


class Service:
    """The process as a service: a context manager around its whole life, entered in the main thread.

    Raises RunDirError on entry if the run directory or the name is not to be had. If an exception ends it, that is
    logged with its stack, the flight recorder is written and the process exits with EXIT_FAILED; CannotRun and
    RunDirError pass through.

    Attributes
        stopping: set when SIGTERM, SIGINT or SIGHUP asked the service to stop.
        stop_fd: a file descriptor that is readable from then on, for pollers and event loops.
        drain_fd: readable once SIGUSR2 has asked it to drain, that is to end when what it does is done or elsewhere. For
            a service that has no such thing (`drains` is false) that is a request to stop.
        rundir, incarnation, log, flight: the run directory, the random number of this start, the logger, the recorder.
    """

    def __init__(
        self,
        role: str,
        name: str,
        run_dir: Path,
        log_level: str = "info",
        stop_limit: float = STOP_LIMIT,
        *,
        drains: bool = False,
        log_format: str = "text",
    ) -> None:
        self.role = role
        self.name = name
        self.incarnation = new_incarnation()
        self.stopping = threading.Event()
        self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.draining = threading.Event()
        self.drain_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.log = logging.getLogger(role)
        self._drains = drains
        self._log_level = log_level
        self._log_format = log_format
        self._stop_limit = stop_limit
        self._waiting = ""
        self.rundir = RunDir(run_dir)
        self.flight = FlightRecorder(self.rundir.flight, name)

    def __enter__(self) -> Service:
        die_with_parent()
        self._catch_signals()
        self._registration = self.rundir.register(self.role, self.name, self.incarnation)
        start_logging(self.rundir.logs / f"{self.name}.log", self.name, self._log_level, log_format=self._log_format)
        self.log.info("started: pid %d, incarnation %d, run directory %s", os.getpid(), self.incarnation, self.rundir.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        crashed = isinstance(error, Exception) and not isinstance(error, CannotRun | RunDirError)
        if crashed:
            self.log.critical("died of %s", type(error).__name__, exc_info=error)
            self.log.critical("flight recorder: %s", self.flight.dump(f"{type(error).__name__}: {error}"))
        else:
            self.log.info("ended" if error is None else f"ended: {error}")
        if crashed:
            # The file stays, as after a kill: the supervisor reads from it how far this start got.
            raise SystemExit(EXIT_FAILED) from error
        self._registration.remove()
        self.rundir.tidy()

    def state(self, state: str) -> None:
        """Tell `pagewire ps` and the supervisor what this service is doing: loading, waiting, ready, stopping."""
        self._registration.state(state)

    def serves(self, url: str) -> None:
        """Tell the commands of this run directory where this service answers HTTP."""
        self._registration.serves(url)

    def waiting(self, peers: str) -> None:
        """Say, once, that peers are missing; `present` says that they have come."""
        if self._waiting != peers:
            self._waiting = peers
            self.log.info("waiting for %s", peers)

    def present(self, peers: str) -> None:
        """Say, once, that the peers that were waited for are there."""
        if self._waiting:
            self._waiting = ""
            self.log.info("found %s", peers)

    def fenced(self, reason: str) -> None:
        """Note that a session ended otherwise than by a goodbye, with the messages that led to it."""
        self.log.warning("session over: %s; flight recorder: %s", reason, self.flight.dump(f"session over: {reason}"))

    def request_stop(self) -> None:
        """Ask the service to stop, as SIGTERM does. May be called from any thread, and repeated."""
        if not self.stopping.is_set():
            self.stopping.set()
            os.eventfd_write(self.stop_fd, 1)
            threading.Thread(target=self._end_in_time, name="stop-limit", daemon=True).start()

    def request_drain(self) -> None:
        """Ask the service to drain, as SIGUSR2 does. May be called from any thread, and repeated."""
        if not self._drains:
            self.request_stop()
        elif not self.draining.is_set():
            self.draining.set()
            os.eventfd_write(self.drain_fd, 1)

    def _catch_signals(self) -> None:
        """Notice signals in a thread as well: the main thread may be deep in a library and run no Python for long."""
        reader, self._signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(reader, True)
        for number in (*stop_signals(), DRAIN_SIGNAL):
            signal.signal(number, self._on_signal)
        self.hear_signals()
        threading.Thread(target=self._await_signals, args=(reader,), name="signals", daemon=True).start()

    def hear_signals(self) -> None:
        """Have that thread told of signals again: to be called in an event loop that has itself told of them instead, as uvloop does.

        Such a loop hears of what the signal asks for through `stop_fd` and `drain_fd`.
        """
        signal.set_wakeup_fd(self._signals, warn_on_full_buffer=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._heed(number)

    def _heed(self, number: int) -> None:
        if number == DRAIN_SIGNAL:
            self.request_drain()
        else:
            self.request_stop()

    def _await_signals(self, reader: int) -> None:
        while data := os.read(reader, 64):
            for number in {*STOP_SIGNALS, DRAIN_SIGNAL} & set(data):
                self._heed(number)

    def _end_in_time(self) -> None:
        for _ in range(math.ceil(self._stop_limit / STOP_SLICE)):
            time.sleep(STOP_SLICE)
        self.log.critical("did not stop within %.1f s: killed; stacks follow", self._stop_limit)
        faulthandler.dump_traceback(_log_stream(), all_threads=True)
        os.kill(os.getpid(), signal.SIGKILL)


def stop_signals() -> frozenset[signal.Signals]:
    """The signals that ask a program to stop. SIGHUP is none where it is ignored: nohup keeps its promise."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return STOP_SIGNALS - ignored


def die_early(run_dir: Path, name: str, log_format: str, error: Exception) -> NoReturn:
    """End a service that fails before its logging has started: its stack goes where later ones would, in the same form.

    Raises the error itself if there can be no log.
    """
    try:
        start_logging(RunDir(run_dir).logs / f"{name}.log", name, "info", log_format=log_format)
    except (OSError, RunDirError):
        raise error from None
    logging.critical("died of %s before it had started", type(error).__name__, exc_info=error)
    raise SystemExit(EXIT_FAILED) from error


def leave() -> NoReturn:
    """End the process after its orderly end, without the interpreter's teardown: on a busy machine it takes a second."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is where a shell has closed it
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(0)


def tell(line: str) -> None:
    """Print a line for people. Whoever read the output may be gone, or its disk full: the service goes on."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the supervisor named in the environment dies; exit if it is dead already."""
    parent = os.environ.pop(PARENT, "")
    if parent.isdigit():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != int(parent):
            sys.exit(EXIT_FAILED)


class _File(logging.handlers.RotatingFileHandler):
    """A rotated log that stack dumps go to as well, wherever it has been rotated to."""

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        faulthandler.enable(stream, all_threads=True)
        faulthandler.register(signal.SIGUSR1, stream, all_threads=True, chain=False)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:  # logging names it so
        """A disk that is full is no reason for a stack for each line: stderr has the line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def start_logging(path: Path, name: str, level: str, *, log_format: str = "text") -> None:
    """Send the process's logging to a rotated file and to stderr; fatal signals and SIGUSR1 write all stacks there."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise RunDirError(f"log level {level!r}: name one of debug, info, warning, error")
    file = _File(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
    handlers: list[logging.Handler] = [file, logging.StreamHandler(sys.stderr)]
    for handler in handlers:
        handler.setFormatter(Json(name) if log_format == "json" else Text(name))
    logging.basicConfig(level=number, handlers=handlers, force=True)
    logging.captureWarnings(True)


def _log_stream() -> TextIO:
    files = (handler.stream for handler in logging.getLogger().handlers if isinstance(handler, _File))
    return next((stream for stream in files if stream is not None), sys.stderr)


def refuse(error: Exception) -> None:
    """End the process with one line on stderr, as one that cannot run as it is configured."""
    with contextlib.suppress(OSError):
        print(f"pagewire: {error}", file=sys.stderr)
    sys.exit(EXIT_REFUSED)
