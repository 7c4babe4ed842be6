"""What passes through the API unseen, and what it tells of the service."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from protocol.columns import pack, unpack, unpack_floats
from protocol.messages import Defaults, Models
from tests.frontend.asking import complete, error, events, get, post, serve, submitted
from tests.frontend.fakes import EOS, Engine, LocalClient, model_info, text


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
            "queue_timeout": 250.0,
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
        assert submit.deadline == pytest.approx(250, abs=60)  # what is left of it
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
