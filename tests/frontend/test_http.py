"""The HTTP API over a client whose scheduler is scripted: bodies in, bodies and events out."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontend.errors import ApiError
from frontend.server import make_app
from protocol.columns import pack, unpack, unpack_floats
from protocol.messages import Abort, Defaults, Done, Failed, ModelInfo, Models, Submit
from tests.frontend.fakes import EOS, MODEL, Engine, LocalClient, letter, model_info, settings_for, text

Scenario = Callable[[httpx.AsyncClient, LocalClient], Awaitable[Any]]


def serve(scenario: Scenario, tmp_path: Path, engine: Engine | None = None, info: ModelInfo = MODEL, **settings: object) -> Any:
    """Run a scenario against the application."""

    async def main() -> Any:
        client = LocalClient(settings_for(tmp_path, **settings), engine or Engine(), info)
        await client.start()
        transport = httpx.ASGITransport(make_app(client), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as http:
            result = await asyncio.wait_for(scenario(http, client), 20)
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


def test_a_body_that_is_no_utf_8_is_told_where(tmp_path):
    body = b'{"prompt": "caf\xe9", "max_tokens": 3}'
    assert error(post("/v1/completions", body, tmp_path), 400, None)["message"] == "the body is not UTF-8: byte 0xe9 at offset 15"


def test_a_compressed_body_is_refused_and_not_misread(tmp_path):
    body = json.dumps({"prompt": "hi", "max_tokens": 3}).encode()
    refused = error(post("/v1/completions", gzip.compress(body), tmp_path, headers={"content-encoding": "gzip"}), 415, None)
    assert "gzip" in refused["message"]
    assert post("/v1/completions", body, tmp_path, headers={"content-encoding": "identity"}).status_code == 200


class TestCompletions:
    def test_a_completion_has_openais_shape(self, tmp_path):
        body = complete(tmp_path, max_tokens=5).json()
        assert body.pop("id").startswith("cmpl-")
        assert isinstance(body.pop("created"), int)
        assert body == {
            "object": "text_completion",
            "model": "oracle",
            "choices": [{"index": 0, "text": "abcde", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}},
        }

    def test_sixteen_tokens_are_the_default(self, tmp_path):
        assert complete(tmp_path).json()["usage"]["completion_tokens"] == 16

    def test_the_default_never_exceeds_the_context(self, tmp_path):
        assert complete(tmp_path, prompt="x" * 505).json()["usage"]["completion_tokens"] == 7

    @pytest.mark.parametrize(
        ("prompt", "ids"),
        [("hi", [[104, 105]]), (["a", "bc"], [[97], [98, 99]]), ([5, 6], [[5, 6]]), ([[1], [2, 3]], [[1], [2, 3]])],
    )
    def test_prompts_come_as_text_or_ids_one_or_many(self, prompt, ids, tmp_path):
        engine = Engine()
        body = complete(tmp_path, engine, prompt=prompt, max_tokens=2, n=2).json()
        assert [unpack(m.prompt).tolist() for m in engine.messages if isinstance(m, Submit)] == ids
        assert [(c["index"], c["text"]) for c in body["choices"]] == [(i, text(2, i % 2)) for i in range(2 * len(ids))]
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert body["usage"]["completion_tokens"] == 4 * len(ids)

    def test_eos_ends_a_choice_unless_it_is_ignored(self, tmp_path):
        engine = Engine(lambda submit, choice, i: EOS if i == 2 else letter(submit, choice, i))
        [choice] = complete(tmp_path, engine, max_tokens=5).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", None)
        [choice] = complete(tmp_path, engine, max_tokens=5, ignore_eos=True).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("abde", "length")

    def test_a_stop_id_is_named_as_the_reason(self, tmp_path):
        [choice] = complete(tmp_path, max_tokens=5, stop_token_ids=[ord("c")]).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", ord("c"))

    def test_a_stop_string_is_cut_off_or_kept(self, tmp_path):
        [choice] = complete(tmp_path, max_tokens=9, stop="cd").json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "cd")
        [choice] = complete(tmp_path, max_tokens=9, stop=["x", "cd"], include_stop_str_in_output=True).json()["choices"]
        assert choice["text"] == "abcd"

    def test_no_stop_string_is_found_within_min_tokens(self, tmp_path):
        [choice] = complete(tmp_path, max_tokens=40, stop="c", min_tokens=5).json()["choices"]
        assert choice["text"] == text(28)

    def test_echo_gives_the_prompt_back(self, tmp_path):
        assert complete(tmp_path, max_tokens=2, echo=True).json()["choices"][0]["text"] == "hiab"
        streamed = events(complete(tmp_path, max_tokens=2, echo=True, stream=True))
        assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == "hiab"

    def test_logprobs_have_the_form_of_completions(self, tmp_path):
        [choice] = complete(tmp_path, max_tokens=2, logprobs=1).json()["choices"]
        assert choice["logprobs"] == {
            "tokens": ["a", "b"],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{"a": -0.5, "A": -1.0}, {"b": -0.5, "A": -1.0}],
            "text_offset": [0, 1],
        }

    def test_token_ids_are_returned_on_request(self, tmp_path):
        [choice] = complete(tmp_path, max_tokens=2, return_token_ids=True).json()["choices"]
        assert (choice["token_ids"], choice["prompt_token_ids"]) == ([97, 98], [104, 105])

    def test_generate_is_the_simplest_way(self, tmp_path):
        body = post("/generate", {"prompt": "hi", "max_tokens": 3}, tmp_path).json()
        assert len(body.pop("request_id")) == 32
        assert body == {"text": "abc", "tokens_generated": 3}
        assert post("/generate", {"prompt": "hi"}, tmp_path).json()["tokens_generated"] == 100


class TestChat:
    def test_a_chat_has_openais_shape(self, tmp_path):
        body = chat(tmp_path).json()
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        message = {"role": "assistant", "content": "abcd", "refusal": None}
        assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}]

    def test_the_template_is_rendered_with_the_turn_of_the_assistant(self, tmp_path):
        engine = Engine()
        chat(tmp_path, engine)
        assert bytes(unpack(submitted(engine).prompt).tolist()).decode() == "user: hi\nassistant: "

    def test_an_answer_may_take_the_rest_of_the_context(self, tmp_path):
        engine = Engine(lambda submit, choice, i: EOS if i else ord("a"))
        chat(tmp_path, engine, max_tokens=None)
        submit = submitted(engine)
        assert submit.params.max_tokens == 512 - len(submit.prompt) // 4

    def test_max_completion_tokens_is_the_newer_name(self, tmp_path):
        assert chat(tmp_path, max_tokens=None, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2

    def test_logprobs_have_the_form_of_chats(self, tmp_path):
        [choice] = chat(tmp_path, max_tokens=1, logprobs=True, top_logprobs=1).json()["choices"]
        own = {"token": "a", "logprob": -0.5, "bytes": [97]}
        assert choice["logprobs"] == {"content": [own | {"top_logprobs": [{"token": "A", "logprob": -1.0, "bytes": [65]}]}]}

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"messages": []}, "messages"),
            ({"messages": [{"content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
            ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
            ({"max_tokens": 10**30}, "max_tokens"),
            ({"max_tokens": 10**9}, "max_tokens"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
            ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
            ({"functions": []}, "functions"),
        ],
    )
    def test_what_is_not_done_is_refused_by_name(self, fields, param, tmp_path):
        error(chat(tmp_path, **fields), 400, param)

    @pytest.mark.parametrize("role", ["system", "developer", "tool", "function", "assistant"])
    def test_every_role_of_openai_reaches_the_template(self, role, tmp_path):
        response = chat(tmp_path, messages=[{"role": role, "content": "x"}, {"role": "user", "content": "hi"}])
        assert response.status_code == 200

    def test_harmless_fields_of_clients_are_taken(self, tmp_path):
        harmless = {
            "user": "me",
            "store": False,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "logprobs": False,
        }
        assert chat(tmp_path, **harmless).status_code == 200


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
            await asyncio.sleep(0.01)
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
            await asyncio.wait_for(task, 5)
            assert not client.journal.entries()
            assert client.totals.aborted == 1
            await client.stop()
            return client.engine.messages

        messages = asyncio.run(main())
        assert isinstance(messages[-2], Abort)
        assert isinstance(messages[-1], Done)


class TestWhatTravels:
    def test_every_field_reaches_the_scheduler(self, tmp_path):
        engine = Engine()
        fields = {
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.75,
            "top_k": 7,
            "min_p": 0.25,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "logprobs": 2,
            "logit_bias": {"5": 1.5, "6": -100},
            "allowed_token_ids": [4, 3],
            "bad_words": ["ab"],
            "queue_timeout": 2.5,
            "priority": -3,
            "cache_salt": "pepper",
        }
        post("/v1/completions", {"prompt": "hi", **fields}, tmp_path, engine, {"X-Tenant": "acme"})
        submit = submitted(engine)
        params = submit.params
        for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            assert getattr(params, name) == fields[name], name
        assert (params.min_tokens, params.logprobs) == (2, 2)
        assert unpack(params.stop_ids).tolist() == [9, EOS]
        assert dict(zip(unpack(params.bias_ids).tolist(), unpack_floats(params.bias_values).tolist(), strict=True)) == {5: 1.5, 6: -100.0}
        assert unpack(params.allowed_ids).tolist() == [3, 4]
        assert params.bad_words == sorted([pack(b" ab"), pack(b"ab")])
        assert submit.deadline == pytest.approx(2.5, abs=0.5)  # what is left of it
        assert (submit.priority, submit.cache_salt, submit.tenant) == (-3, b"pepper", "acme")
        submit.check()

    def test_what_the_client_leaves_open_takes_the_models_defaults(self, tmp_path):
        engine = Engine()
        info = model_info(defaults=Defaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1))
        post("/v1/completions", {"prompt": "x", "top_k": 5}, tmp_path, engine, info=info)
        params = submitted(engine).params
        assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (0.6, 0.9, 5, 0.1, 1.1)

    def test_seeds_follow_from_the_clients_seed_or_are_drawn(self, tmp_path):
        def seeds(**fields: Any) -> list[int]:
            engine = Engine()
            complete(tmp_path, engine, max_tokens=1, n=3, **fields)
            return [choice.seed for choice in submitted(engine).choices]

        assert seeds(seed=7) == seeds(seed=7) != seeds(seed=-7)
        assert len(set(seeds(seed=7))) == 3
        assert seeds() != seeds()


class TestService:
    def test_health_answers_whatever_happens_behind(self, tmp_path):
        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> list[int]:
            client.journal.closed(0.0)
            return [(await http.get("/health")).status_code, (await http.get("/ready")).status_code]

        assert serve(scenario, tmp_path) == [200, 503]

    def test_ready_says_what_is_missing(self, tmp_path):
        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> list[Any]:
            said = []
            for change in ({}, {"workers_ready": 0, "workers_loading": 1}, {"workers_ready": 0}, {"tokenizer": b"x" * 16}):
                client.journal.message(Models([model_info(**change)]), 0.0)
                said.append((await http.get("/ready")).json())
            return said

        ready, *others = serve(scenario, tmp_path)
        assert ready == {"status": "ready"}
        reasons = ["1 worker(s) still loading", "no worker is ready", "the tokenizer is still loading"]
        assert [other["reason"] for other in others] == reasons

    def test_models_are_listed_with_their_context(self, tmp_path):
        [card] = get("/v1/models", tmp_path).json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("oracle", "model", 512)
        assert get("/v1/models/oracle", tmp_path).json() == card | {"created": get("/v1/models/oracle", tmp_path).json()["created"]}
        assert error(get("/v1/models/other", tmp_path), 404, "model")["code"] == "model_not_found"

    def test_a_served_name_stands_for_the_model(self, tmp_path):
        response = post("/v1/completions", {"prompt": "x", "model": "mine"}, tmp_path, served_model_name="mine")
        assert response.json()["model"] == "mine"

    def test_an_unknown_model_is_404(self, tmp_path):
        assert error(complete(tmp_path, model="gpt-9"), 404, "model")["code"] == "model_not_found"

    def test_unknown_paths_and_methods_have_openais_shape(self, tmp_path):
        assert error(get("/v1/embeddings", tmp_path), 404, None)["code"] == "not_found"
        response = get("/v1/completions", tmp_path)
        assert error(response, 405, None)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"

    def test_a_body_too_large_is_refused(self, tmp_path):
        assert error(post("/v1/completions", b" " * 2000, tmp_path, max_body=1000), 413, None)["code"] == "body_too_large"

        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
            async def parts() -> Any:
                for _ in range(3):
                    yield b" " * 500

            return await http.post("/v1/completions", content=parts())

        error(serve(scenario, tmp_path, max_body=1000), 413, None)

    def test_before_a_model_is_known_requests_get_503(self, tmp_path):
        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
            client.journal.models.clear()
            return await http.post("/v1/completions", json={"prompt": "x"})

        response = serve(scenario, tmp_path)
        assert error(response, 503, None)["code"] == "not_ready"
        assert response.headers["retry-after"] == "1"

    def test_a_new_scheduler_that_knows_no_model_yet_turns_nobody_away(self, tmp_path):
        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
            client.journal.message(Models([]), 0.0)
            assert [info.workers_ready for info in client.models()] == [0]
            return await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})

        assert serve(scenario, tmp_path).status_code == 200

    def test_requests_wait_out_a_lost_scheduler(self, tmp_path):
        async def scenario(http: httpx.AsyncClient, client: LocalClient) -> httpx.Response:
            task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "max_tokens": 300, "stream": True}))
            while not (entries := client.journal.entries()) or len(entries[0].choices[0].tokens) < 5:
                await asyncio.sleep(0)
            client.journal.closed(client._loop.time())
            client.engine.live.clear()  # it died with its state
            await asyncio.sleep(0.02)
            client.connect()
            return await task

        data = events(serve(scenario, tmp_path))
        assert "".join(d["choices"][0]["text"] for d in data[:-1]) == text(300)


BAD = [
    (b"", None),
    (b"[", None),
    (b"[]", None),
    (b"null", None),
    (b'{"prompt": "\xff"}', None),
    (b'{"prompt": "\\ud800"}', None),
    (b"[" * 100_000, None),
    ({}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": "x" * 512}, "prompt"),
    ({"prompt": "x", "max_tokens": 512}, "max_tokens"),
    ({"prompt": ["x"] * 33, "n": 128}, "n"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 129}, "n"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "min_p": 2}, "min_p"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop"),
    ({"prompt": "x", "stop_token_ids": [999]}, "stop_token_ids"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"999": 1}}, "logit_bias"),
    ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    ({"prompt": "x", "bad_words": [" "]}, "bad_words"),
    ({"prompt": "x", "queue_timeout": 0}, "queue_timeout"),
    ({"prompt": "x", "queue_timeout": 1e9}, "queue_timeout"),
    ({"prompt": "x", "queue_timeout": "soon"}, "queue_timeout"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "n": 3, "best_of": 2}, "best_of"),
    ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt": "x", "stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ({"prompt": "x", "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ({"prompt": "x", "nonsense": 1}, "nonsense"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_gets_400_and_names_its_field(body, param, tmp_path):
    engine = Engine()
    answer = error(post("/v1/completions", body, tmp_path, engine), 400, param)
    assert answer["message"]
    assert answer["type"] == "invalid_request_error"
    assert not engine.messages[1:], "nothing of it reaches the scheduler"
