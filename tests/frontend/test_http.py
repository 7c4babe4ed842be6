"""Completions and chats over HTTP, and what is refused."""

from __future__ import annotations

import gzip
import json

import pytest

from protocol.columns import unpack
from protocol.messages import Submit
from tests.frontend.asking import chat, complete, error, events, post, submitted
from tests.frontend.fakes import EOS, Engine, letter, text


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
    ({"prompt": "x", "logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
    ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    ({"prompt": "x", "bad_words": [" "]}, "bad_words"),
    ({"prompt": "x", "bad_words": ["a" * 257]}, "bad_words"),
    ({"prompt": "x", "bad_words": ["a" * 64]}, "bad_words"),  # and a space, in bytes
    ({"prompt": "x", "bad_words": [f"{i:063}" for i in range(65)]}, "bad_words"),
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
