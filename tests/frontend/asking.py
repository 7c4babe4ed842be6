"""Asks a frontend whose scheduler is a fake, over HTTP without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from frontend.server import make_app
from protocol.messages import ModelInfo, Submit
from tests.frontend.fakes import MODEL, Engine, LocalClient, settings_for

Scenario = Callable[[httpx.AsyncClient, LocalClient], Awaitable[Any]]


def serve(scenario: Scenario, tmp_path: Path, engine: Engine | None = None, info: ModelInfo = MODEL, **settings: object) -> Any:
    """Run a scenario against the application."""

    async def main() -> Any:
        client = LocalClient(settings_for(tmp_path, **settings), engine or Engine(), info)
        await client.start()
        transport = httpx.ASGITransport(make_app(client), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
            result = await asyncio.wait_for(scenario(http, client), 60)
        await client.stop()
        return result

    return asyncio.run(main())


def post(
    path: str, body: Any, tmp_path: Path, engine: Engine | None = None, headers: dict[str, str] | None = None, **more: Any
) -> httpx.Response:
    """The response to one POST. `body` is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
        return await http.post(path, content=content, headers=headers)

    return serve(scenario, tmp_path, engine, **more)


def get(path: str, tmp_path: Path, **more: Any) -> httpx.Response:
    async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
        return await http.get(path)

    return serve(scenario, tmp_path, **more)


def complete(tmp_path: Path, engine: Engine | None = None, **fields: Any) -> httpx.Response:
    return post("/v1/completions", {"prompt": "hi", **fields}, tmp_path, engine)


def chat(tmp_path: Path, engine: Engine | None = None, **fields: Any) -> httpx.Response:
    return post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}, tmp_path, engine)


def submitted(engine: Engine) -> Submit:
    return next(m for m in engine.messages if isinstance(m, Submit))


def events(response: httpx.Response) -> list[Any]:
    """The data of each event: JSON, or the string [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def error(response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["param"] == param, body
    return body
