"""A frontend dies; its clients repeat their POST at another one, with the id of the last event they saw."""

from __future__ import annotations

import http.client
import itertools
import json
import signal
import time
from typing import Any

import psutil
import pytest

from protocol.rundir import RunDir
from tests.e2e.stack import eventually, is_over, stack
from tests.faults.fleet import fleet, serving
from tests.faults.load import TIMEOUT, Load, Seen, mixed_body

LONG = 200  # tokens of streams that are cut; at 0.04 s each they outlast a machine that stands still for seconds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


class Resuming(Seen):
    """A client that goes on where its stream broke off, at the next of its URLs. `resumed` counts how often."""

    resumed = 0
    last_id = ""

    def took(self) -> None:
        """An event has been taken; tests let things happen here."""

    def read_on(self, urls: list[str]) -> None:
        """Read the stream to its end, over as many connections as that takes."""
        deadline = time.monotonic() + TIMEOUT
        for url in itertools.cycle(urls):
            assert time.monotonic() < deadline, "the stream could not be resumed"
            try:
                self._connect(url)
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
            if self.done or self.error is not None:
                return

    def _connect(self, url: str) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)
        try:
            full = {**self.body, "stream": True, "stream_options": {"include_usage": True}}
            headers = {"Content-Type": "application/json", **({"Last-Event-ID": self.last_id} if self.last_id else {})}
            connection.request("POST", "/v1/completions", json.dumps(full), headers)
            response = connection.getresponse()
            if response.status == 503:
                raise http.client.HTTPException("not ready")
            if response.status != 200:
                self.error = json.loads(response.read())["error"]
                return
            self.resumed += bool(self.last_id)
            id, data = "", b""
            for line in response:
                if line.startswith(b"id: "):
                    id = line[4:].strip().decode()
                elif line.startswith(b"data: "):
                    data = line[6:]
                elif line == b"\n" and data:  # an event counts once it is whole
                    self._event(data.strip())
                    self.last_id, data = id or self.last_id, b""
                    self.took()
        finally:
            connection.close()


class ResumingLoad(Load):
    """Streams that outlive their frontends."""

    def _client(self, name: str, urls: dict[str, str]) -> None:
        left = self._rounds or -1
        while left:
            left -= 1
            seen = Resuming(self._bodies(next(self._numbers), self._max_tokens), name)
            if not self._begins(seen):
                return
            try:
                seen.read_on([urls[name], *(url for other, url in urls.items() if other != name)])
            except BaseException as error:
                self._broken.append((seen, error))

    @property
    def resumed(self) -> int:
        return sum(seen.resumed for seen in self.seen if isinstance(seen, Resuming))


def test_one_of_two_frontends_is_killed_and_its_streams_go_on_at_the_other() -> None:
    with fleet() as running:
        running.scheduler()
        for i in range(2):
            running.worker(f"worker-{i}")
            running.frontend(f"frontend-{i}")
        running.ready(2)
        load = ResumingLoad(running.urls, max_tokens=LONG)
        load.well_underway()
        running.kill("frontend-0")
        load.finish()
        assert load.resumed >= 12, "hardly any stream was cut"
        running.at_rest()
        assert running.figure("scheduler-0", "wire_scheduler_orphans_aborted") == 0


def test_a_killed_frontend_of_a_shared_port_is_replaced_and_its_clients_go_on_at_the_same_url() -> None:
    with stack() as made:
        made.up("--runner", "oracle", "--frontends", "2", env={"PAGEWIRE_ORACLE_STEP_TIME": "0.04"})

        def ready() -> dict[str, int]:
            return {s.name: s.pid for s in RunDir(made.run_dir).services() if s.role == "frontend" and s.state == "ready"}

        eventually(lambda: len(ready()) == 2)
        process = psutil.Process(ready()["frontend-1"])
        load = ResumingLoad({"shared": made.url}, max_tokens=LONG)
        load.well_underway()
        eventually(lambda: made.metrics().get('pagewire_requests{name="frontend-1",status="running"}', 0) > 4)
        process.kill()
        eventually(lambda: is_over(process))
        load.finish()
        assert load.resumed > 0
        eventually(lambda: made.metrics().get('pagewire_blocks{name="scheduler-0",state="used"}') == 0)


def test_a_stream_that_its_owner_still_has_moves_and_the_old_one_breaks_off() -> None:
    with serving(workers=1, frontends=2, streams=2) as (running, load):
        body = {**mixed_body(6, 60), "max_tokens": LONG}
        first = Resuming(body, "frontend-0")
        process = psutil.Process(running.services["frontend-0"].popen.pid)

        def cut() -> None:
            if len(first.times) == 20 and not first.resumed:
                process.send_signal(signal.SIGSTOP)
                raise ConnectionResetError

        first.took = cut  # type: ignore[method-assign]
        try:
            first.read_on([running.urls["frontend-0"], *[running.urls["frontend-1"]] * 1000])  # the stopped one would let it wait
        finally:
            process.send_signal(signal.SIGCONT)
        assert first.resumed == 1
        first.check()
        load.finish()
        running.at_rest()


def post(url: str, last_id: str, tenant: str = "") -> tuple[int, dict[str, Any]]:
    """Ask for the rest of a stream; asked again as long as the frontend is not ready. Status and body."""

    def answer() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=TIMEOUT)
        try:
            headers = {"Last-Event-ID": last_id, "X-Tenant": tenant}
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "x", "stream": True}), headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    status, body = eventually(lambda: found if (found := answer())[0] != 503 else None)
    return status, json.loads(body)


def test_a_stream_that_nobody_has_or_that_is_somebody_elses_is_gone() -> None:
    with serving(workers=1, frontends=2, streams=4) as (running, load):
        url = running.urls["frontend-1"]
        status, body = post(url, "ab" * 16 + ":0:3:3")
        assert (status, body["error"]["code"]) == (404, "stream_gone")
        status, body = post(url, "nonsense")
        assert (status, body["error"]["param"]) == (400, "Last-Event-ID")

        theirs = Resuming({"prompt": "mine", "max_tokens": 150, "seed": 1, "ignore_eos": True}, "frontend-0")
        seen: list[str] = []

        def steal() -> None:
            if len(theirs.times) == 10:
                seen.append(theirs.last_id)
                assert post(url, theirs.last_id, "somebody else")[1]["error"]["code"] == "stream_gone"

        theirs.took = steal  # type: ignore[method-assign]
        theirs.read_on([running.urls["frontend-0"]])
        assert seen
        assert not theirs.resumed
        theirs.check()
        behind = Seen({"prompt": "behind it", "max_tokens": 1, "seed": 2}, "frontend-0")
        behind.read(running.urls["frontend-0"])  # a link keeps the order: the scheduler has heard that the client has everything
        behind.check()
        status, body = post(url, theirs.last_id)
        assert (status, body["error"]["code"]) == (404, "stream_gone"), "it was told to its end"
        load.finish()
