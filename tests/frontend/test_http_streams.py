"""Streamed answers, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from frontend.errors import ApiError
from frontend.server import make_app
from protocol.messages import Abort, Done, Failed
from tests.frontend.asking import chat, complete, error, events, serve
from tests.frontend.fakes import Engine, LocalClient, settings_for, text


class TestStreams:
    def test_the_transcript_of_a_chat(self, tmp_path):
        response = chat(tmp_path, stream=True, max_tokens=2, stream_options={"include_usage": True})
        lines = response.text.split("\n\n")
        name = lines[0].split(":")[1].strip()
        data = events(response)
        about = {key: data[0][key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
        assert about["id"] == f"chatcmpl-{name}"

        def chunk(delta: dict[str, str], **end: Any) -> dict[str, Any]:
            return {**about, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **end}], "usage": None}

        usage = {"prompt_tokens": 20, "completion_tokens": 2, "total_tokens": 22, "prompt_tokens_details": {"cached_tokens": 0}}
        assert data == [
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "a"}),
            chunk({"content": "b"}),
            chunk({}, finish_reason="length", stop_reason=None),
            {**about, "choices": [], "usage": usage},
            "[DONE]",
        ]
        ids = [line.split("\n")[0] for line in lines if line.startswith("id: ")]
        assert ids == [f"id: {name}:0:{place}" for place in ("0:0", "1:1", "2:2", "3:2")]

    def test_the_transcript_of_a_completion(self, tmp_path):
        data = events(complete(tmp_path, stream=True, max_tokens=2))
        assert [d["choices"][0] for d in data[:-1]] == [
            {"index": 0, "text": "a", "logprobs": None, "finish_reason": None},
            {"index": 0, "text": "b", "logprobs": None, "finish_reason": None},
            {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None},
        ]
        assert "usage" not in data[0]

    def test_every_choice_has_one_role_and_one_end(self, tmp_path):
        data = events(chat(tmp_path, stream=True, n=3, max_tokens=3))
        for index in range(3):
            mine = [d["choices"][0] for d in data[:-1] if d["choices"][0]["index"] == index]
            assert [c["delta"].get("role") for c in mine] == ["assistant", None, None, None, None]
            assert [c["finish_reason"] for c in mine] == [None, None, None, None, "length"]
            assert "".join(c["delta"].get("content", "") for c in mine) == text(3, index)

    def test_many_prompts_share_one_stream(self, tmp_path):
        data = events(complete(tmp_path, prompt=["x", "y"], n=2, stream=True, max_tokens=2))
        assert {d["choices"][0]["index"] for d in data[:-1]} == {0, 1, 2, 3}
        assert data[-1] == "[DONE]"

    def test_withheld_text_is_let_out_at_the_end(self, tmp_path):
        engine = Engine(lambda submit, choice, i: "é".encode()[0])
        data = events(complete(tmp_path, engine, stream=True, max_tokens=1))
        assert [d["choices"][0]["text"] for d in data[:-1]] == ["\ufffd", ""]

    def test_a_stop_string_never_leaks(self, tmp_path):
        data = events(complete(tmp_path, stream=True, max_tokens=20, stop="defg"))
        assert "".join(d["choices"][0]["text"] for d in data[:-1]) == "abc"
        assert data[-2]["choices"][0]["stop_reason"] == "defg"

    def test_logprobs_and_ids_come_with_their_tokens(self, tmp_path):
        data = events(chat(tmp_path, stream=True, max_tokens=2, logprobs=True, return_token_ids=True))
        assert data[0]["prompt_token_ids"] == [*b"user: hi\nassistant: "]
        content = [d["choices"][0] for d in data[1:3]]
        assert [c["token_ids"] for c in content] == [[97], [98]]
        assert [c["logprobs"]["content"][0]["token"] for c in content] == ["a", "b"]

    def test_a_refusal_before_the_first_token_is_a_status_not_an_event(self, tmp_path):
        engine = Engine(refuse=lambda submit: Failed(submit.request, 429, "queue_full", "the queue is full", retry_after=2.4))
        for streaming in (False, True):
            response = chat(tmp_path, engine, stream=streaming)
            assert error(response, 429, None)["code"] == "queue_full"
            assert response.headers["retry-after"] == "2"

    def test_an_error_in_mid_stream_is_an_object_then_done(self, tmp_path):
        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
            task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 400}))
            while not (entries := client.journal.entries()) or len(entries[0].choices[0].tokens) < 3:
                await asyncio.sleep(0)
            client.engine.out.append(Failed(entries[0].request, 500, "nan", "the model gave no number"))
            client.engine.live.clear()
            client._pump()
            return await task

        data = events(serve(scenario, tmp_path))
        assert data[-2]["error"] == {"message": "the model gave no number", "type": "server_error", "param": None, "code": "nan"}
        assert data[-1] == "[DONE]"
        assert all(d["choices"][0]["finish_reason"] is None for d in data[:-2])

    def test_a_shutdown_ends_streams_with_an_error(self, tmp_path):
        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
            client.engine.paused = True
            task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "stream": True}))
            while not client.journal.entries():
                await asyncio.sleep(0)
            client.quiet_streams(0.0)
            for _ in range(100):  # until it has been sent; a time might be over before its turn
                await asyncio.sleep(0)
            client.end_streams(ApiError(503, "the server is shutting down", code="shutting_down"))
            return await task

        response = serve(scenario, tmp_path)
        assert response.text.startswith(": waiting\n\n"), "a client that waits long hears that it is not forgotten"
        assert [d if d == "[DONE]" else d["error"]["code"] for d in events(response)] == ["shutting_down", "[DONE]"]

    def test_stream_options_need_a_stream(self, tmp_path):
        error(chat(tmp_path, stream_options={"include_usage": True}), 400, "stream_options")


class TestDisconnects:
    @pytest.mark.parametrize("streaming", [True, False])
    def test_a_client_that_leaves_is_aborted_at_once(self, streaming, tmp_path):
        async def main() -> list[object]:
            client = LocalClient(settings_for(tmp_path), Engine())
            await client.start()
            body = json.dumps({"prompt": "x", "stream": streaming, "max_tokens": 400}).encode()
            arrived = asyncio.Queue()
            arrived.put_nowait({"type": "http.request", "body": body, "more_body": False})
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)
                await asyncio.sleep(0)

            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"", "http_version": "1.1"}
            task = asyncio.create_task(make_app(client)(scope, arrived.get, send))
            while not (entries := client.journal.entries()) or len(entries[0].choices[0].tokens) < 5:
                await asyncio.sleep(0)
            arrived.put_nowait({"type": "http.disconnect"})
            await asyncio.wait_for(task, 60)
            assert not client.journal.entries()
            assert client.totals.aborted == 1
            await client.stop()
            return client.engine.messages

        messages = asyncio.run(main())
        assert isinstance(messages[-2], Abort)
        assert isinstance(messages[-1], Done)
