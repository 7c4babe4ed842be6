"""Every way in which a request can end is counted once: one HTTP ending, and one reason of each output that was begun."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from frontend.access import MAX_HEADERS
from frontend.errors import ApiError
from frontend.server import make_app
from protocol.messages import Failed, Gone, Moved, Submit
from tests.frontend.fakes import EOS, Engine, LocalClient, letter, settings_for

COMPLETIONS = "/v1/completions"
Sample = tuple[str, ...]  # family, labels
KEY = "a-key-of-the-endings-test"


class Server:
    """The application around a client with a scripted scheduler, and what its counters say."""

    def __init__(self, folder: Path, engine: Engine, **settings: object) -> None:
        self.engine = engine
        self.client = LocalClient(settings_for(folder, **settings), engine)
        self.app = make_app(self.client)
        self.answered = asyncio.Event()  # set once part of an answer has been sent
        transport = httpx.ASGITransport(self._watched, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def seen(message: Message) -> None:
            await send(message)
            if message.get("body"):
                self.answered.set()

        await self.app(scope, receive, seen)

    def counters(self) -> Counter[Sample]:
        samples = self.client.series() + self.app.state.accounts.series()
        counted = ("pagewire_http_requests", "vllm:request_success")
        return Counter({(s.family, *s.labels): int(s.value) for s in samples if s.family in counted})

    async def complete(self, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
        return await self.http.post(path, json={"prompt": "hi", "max_tokens": 3, **fields})

    async def leave(self, stream: bool) -> None:
        """A client that goes while its answer is made."""
        body = json.dumps({"prompt": "hi", "max_tokens": 500, "ignore_eos": True, "stream": stream}).encode()
        sent = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            if stream:
                await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                sent.set()

        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b"", "http_version": "1.1"}
        await self.app(scope, receive, send)

    async def while_it_runs(self, act: Callable[[], object], stream: bool) -> None:
        """A request that would go on for ever, and something that happens to it."""
        self.engine.paused = not stream
        asked = asyncio.ensure_future(self.complete(max_tokens=500, ignore_eos=True, stream=stream))
        if stream:
            await self.answered.wait()
        while not self.client.journal.entries():
            await asyncio.sleep(0.001)
        act()
        with contextlib.suppress(AssertionError):  # httpx's transport objects to a stream that is cut off: one that moved is
            await asked

    def say(self, message: Any) -> None:
        """Something the scheduler says."""
        now = self.client._loop.time()
        self.client.journal.message(message, now)
        self.client._pump()


def request_of(server: Server) -> bytes:
    return server.client.journal.entries()[0].request


def http(status: int, code: str = "ok", path: str = COMPLETIONS) -> Sample:
    return ("pagewire_http_requests", path, str(status), code)


def output(reason: str) -> Sample:
    return ("vllm:request_success", "oracle", reason)


def refusing(status: int, code: str) -> Engine:
    return Engine(refuse=lambda submit: Failed(submit.request, status, code, "no"))


def eos_third(submit: Submit, choice: int, position: int) -> int:
    return EOS if position == 2 else letter(submit, choice, position)


def raise_defect(*_: object) -> None:
    raise RuntimeError("a defect")


class Broken:
    """A detokenizer with a defect."""

    stop = None
    text_length = 0
    push = raise_defect


async def ask_ready(server: Server) -> None:
    server.client.why_not_ready = lambda: "no worker is ready"  # type: ignore[method-assign]
    assert (await server.http.get("/ready")).status_code == 503


async def cancel(server: Server) -> None:
    asked = asyncio.ensure_future(server.complete(max_tokens=500, ignore_eos=True))
    while not server.client.journal.entries():
        await asyncio.sleep(0.001)
    asked.cancel()
    assert (await asked).json()["error"]["code"] == "shutting_down"


Act = Callable[[Server], Awaitable[object]]
WAYS: dict[str, tuple[Act, list[Sample], Engine | None]] = {
    "length": (lambda s: s.complete(), [http(200), output("length")], None),
    "length, streamed": (lambda s: s.complete(stream=True), [http(200), output("length")], None),
    "generate": (lambda s: s.complete("/generate"), [http(200, path="/generate"), output("length")], None),
    "end of sequence": (lambda s: s.complete(max_tokens=9), [http(200), output("stop")], Engine(eos_third)),
    "stop string": (lambda s: s.complete(max_tokens=9, stop="cd"), [http(200), output("stop")], None),
    "the client leaves a stream": (lambda s: s.leave(True), [http(200, "client_gone"), output("abort")], None),
    "the client leaves before its answer": (lambda s: s.leave(False), [http(499, "client_gone"), output("abort")], None),
    "asked whether it is ready": (ask_ready, [http(503, "not_ready", "/ready")], None),
    "the server ends while it answers": (cancel, [http(503, "cancelled"), output("abort")], None),
    "no room in the queue": (lambda s: s.complete(), [http(429, "queue_full"), output("error")], refusing(429, "queue_full")),
    "too long for every worker": (
        lambda s: s.complete(),
        [http(400, "context_length_exceeded"), output("error")],
        refusing(400, "context_length_exceeded"),
    ),
    "held too long for a worker": (lambda s: s.complete(), [http(503, "no_worker"), output("error")], refusing(503, "no_worker")),
    "too long in the queue": (
        lambda s: s.complete(stream=True),
        [http(503, "queue_timeout"), output("error")],
        refusing(503, "queue_timeout"),
    ),
    "its steps fail": (lambda s: s.complete(), [http(500, "step_failed"), output("error")], refusing(500, "step_failed")),
    "an error in mid-stream": (
        lambda s: s.while_it_runs(lambda: s.say(Failed(request_of(s), 500, "nan", "no number")), True),
        [http(200, "nan"), output("error")],
        None,
    ),
    "its text cannot be made": (
        lambda s: s.while_it_runs(lambda: setattr(s.client.journal.entries()[0].choices[0], "text", Broken()), True),
        [http(200, "internal_error"), output("error")],
        None,
    ),
    "too long in the queue, without a scheduler": (
        lambda s: s.while_it_runs(lambda: overdue(s), False),
        [http(503, "queue_timeout"), output("error")],
        None,
    ),
    "no field that is needed": (lambda s: s.http.post(COMPLETIONS, json={}), [http(400, "missing_required_parameter")], None),
    "a field that nobody knows": (lambda s: s.complete(what=1), [http(400, "unknown_parameter")], None),
    "not ready": (lambda s: unready(s), [http(503, "not_ready")], None),
    "no scheduler for too long": (
        lambda s: s.while_it_runs(lambda: (s.client.journal.closed(0.0), s.client.journal.tick(1e9), s.client._pump()), False),
        [http(503, "no_scheduler"), output("error")],
        None,
    ),
    "the server ends before the answer": (
        lambda s: s.while_it_runs(lambda: s.client.end_streams(ApiError(503, "bye", code="shutting_down")), False),
        [http(503, "shutting_down"), output("abort")],
        None,
    ),
    "the server ends in mid-stream": (
        lambda s: s.while_it_runs(lambda: s.client.end_streams(ApiError(503, "bye", code="shutting_down")), True),
        [http(200, "shutting_down"), output("abort")],
        None,
    ),
    "another frontend goes on": (
        lambda s: s.while_it_runs(lambda: s.say(Moved(request_of(s))), True),
        [http(200, "moved")],  # there its outputs will end
        None,
    ),
    "a stream that nobody has": (lambda s: resume_gone(s), [http(404, "stream_gone")], None),
    "compressed": (
        lambda s: s.http.post(COMPLETIONS, content=b"x", headers={"content-encoding": "gzip"}),
        [http(415, "unsupported_encoding")],
        None,
    ),
    "not JSON": (lambda s: s.http.post(COMPLETIONS, content=b"{"), [http(400, "invalid_json")], None),
    "a wrong value": (lambda s: s.complete(temperature=-1), [http(400, "invalid_value")], None),
    "an unknown model": (lambda s: s.complete(model="nobody"), [http(404, "model_not_found")], None),
    "a body too large": (lambda s: s.complete(prompt="x" * 3000), [http(413, "body_too_large")], None),
    "headers too large": (lambda s: header(s, {"x": "y" * MAX_HEADERS}), [http(431, "headers_too_large", "/version")], None),
    "more than a frame holds": (lambda s: oversized(s), [http(413, "request_too_large"), output("error")], None),
    "no key": (lambda s: header(s, {"authorization": ""}), [http(401, "invalid_api_key", "/version")], None),
    "a path that is not there": (lambda s: s.http.get("/v1/responses"), [http(404, "not_found", "other")], None),
    "a wrong method": (lambda s: s.http.get(COMPLETIONS), [http(405, "method_not_allowed")], None),
    "one of many models": (lambda s: s.http.get("/v1/models/oracle"), [http(200, path="/v1/models/{name}")], None),
    "a defect of ours": (lambda s: defect(s), [http(500, "internal_error", "/load")], None),
}


async def header(server: Server, headers: dict[str, str]) -> None:
    await server.http.get("/version", headers=headers)


async def oversized(server: Server) -> None:
    with patch("frontend.journal.MAX_SUBMIT", 100):
        await server.complete()


async def defect(server: Server) -> None:
    server.client.journal.entries = raise_defect  # type: ignore[method-assign, assignment]
    await server.http.get("/load")


async def unready(server: Server) -> None:
    server.client.journal.models = {}
    await server.complete()


def overdue(server: Server) -> None:
    journal = server.client.journal
    [entry] = journal.entries()
    entry.new = dataclasses.replace(entry.new, deadline=0.5)
    journal.closed(entry.submitted)
    journal.tick(entry.submitted + 1)
    server.client._pump()


async def resume_gone(server: Server) -> None:
    event = bytes(16).hex() + ":0:1:1"
    asked = asyncio.ensure_future(server.http.post(COMPLETIONS, content=b"{}", headers={"last-event-id": event}))
    while not server.client.journal.entries():
        await asyncio.sleep(0.001)
    server.say(Gone(bytes(16)))
    await asked


@pytest.mark.parametrize("way", WAYS)
def test_each_end_is_counted_once(way: str, tmp_path: Path) -> None:
    act, expected, engine = WAYS[way]
    keys = tmp_path / "keys"
    keys.write_text(f"tester {KEY}\n")

    async def main() -> Counter[Sample]:
        server = Server(tmp_path, engine or Engine(), max_body=2048, api_key_file=str(keys) if way == "no key" else "")
        await server.client.start()
        try:
            before = server.counters()
            await asyncio.wait_for(act(server), 60)
            return server.counters() - before
        finally:
            await server.http.aclose()
            await server.client.stop()

    assert asyncio.run(main()) == Counter(expected)


def test_every_code_of_the_sources_has_a_way() -> None:
    """A new kind of end is not to be forgotten here."""
    told = {sample[-1] for _, expected, _ in WAYS.values() for sample in expected if sample[0] == "pagewire_http_requests"}
    alike = {  # refused like others that stand above, before anything is begun
        *("invalid_token", "stream_open", "no_chat_template", "unsupported", "invalid_http"),
    }
    known = told | alike
    for folder in ("frontend", "scheduler_svc"):
        for file in Path(__file__).parents[2].joinpath(folder).rglob("*.py"):
            for code in codes_of(file.read_text()):
                assert code in known, f"{file.name}: code {code!r} has no row in WAYS"


def codes_of(source: str) -> set[str]:
    """The codes that a source gives to ApiError, Failed and `fail`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        place = {"Failed": 2, "fail": 3, "ApiError": 3}.get(name)
        if place is None:
            continue
        given = [node.args[place]] if len(node.args) > place else [k.value for k in node.keywords if k.arg == "code"]
        found |= {str(value.value) for value in given if isinstance(value, ast.Constant) and value.value}
    return found
