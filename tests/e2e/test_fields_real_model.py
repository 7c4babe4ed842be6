"""Each sampling field over HTTP on the packaged model: what it promises can be seen; log probabilities are transformers'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Stack, stack

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "golden_logprobs.json").read_text())
PROMPT = "The sea is"
LOOP = "one two three one two three one two three one two three one two"  # what goes on with "three one two three …"


@pytest.fixture(scope="module")
def made() -> Iterator[Stack]:
    with stack() as running:
        running.up("--dtype", "float32")
        yield running


def complete(made: Stack, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True, **fields}
    answer = httpx.post(made.url + "/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def choice(made: Stack, **fields: Any) -> dict[str, Any]:
    return complete(made, **fields)["choices"][0]


def ids(made: Stack, **fields: Any) -> list[int]:
    return choice(made, **fields)["token_ids"]


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_log_probabilities_of_prompt_and_output_are_those_of_transformers(made: Stack, case: int) -> None:
    golden = GOLDEN[case]
    prompt, output = golden["prompt"], golden["output"]
    answer = choice(made, prompt=prompt, max_tokens=len(output), ignore_eos=True, logprobs=20, prompt_logprobs=20)
    assert answer["token_ids"] == output
    first, *told = answer["prompt_logprobs"]
    assert first is None
    assert len(told) == len(prompt) - 1
    for one, token, own, best, values in zip(told, prompt[1:], golden["own"], golden["ids"], golden["values"], strict=False):
        assert abs(one[str(token)]["logprob"] - own) < 1e-3
        by_rank = sorted((item["rank"], item["logprob"]) for id, item in one.items() if int(id) != token or item["rank"] <= 20)[:20]
        assert [value for _, value in by_rank] == pytest.approx(values, abs=1e-3)
        assert set(best) <= {int(id) for id in one} or min(values) - 1e-3 < min(item["logprob"] for item in one.values())
    behind = slice(len(prompt) - 1, None)
    assert answer["logprobs"]["token_logprobs"] == pytest.approx(golden["own"][behind], abs=1e-3)
    for top, values in zip(answer["logprobs"]["top_logprobs"], golden["values"][behind], strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(values[: len(top)], abs=1e-3)  # two ids may have one text


def test_echo_gives_the_same_values_in_openais_form(made: Stack) -> None:
    prompt = GOLDEN[0]["prompt"]
    answer = choice(made, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    assert answer["logprobs"]["token_logprobs"][0] is None
    assert answer["logprobs"]["token_logprobs"][1:] == pytest.approx(GOLDEN[0]["own"][: len(prompt) - 1], abs=1e-3)
    assert answer["token_ids"] == []


def test_bias_and_allowed_ids_and_bad_words_change_the_first_token(made: Stack) -> None:
    best = ids(made, max_tokens=1)[0]
    other = 7042  # " Paris"
    assert ids(made, max_tokens=1, logit_bias={str(other): 100}) == [other]
    assert ids(made, max_tokens=1, logit_bias={str(best): -100}) != [best]
    assert set(ids(made, allowed_token_ids=[other, 30])) <= {other, 30}
    word = httpx.post(made.url + "/detokenize", json={"tokens": [best]}, timeout=20).json()["prompt"]
    assert ids(made, max_tokens=1, bad_words=[word]) != [best]


def test_penalties_break_a_loop(made: Stack) -> None:
    plain = ids(made, prompt=LOOP, max_tokens=24)
    for field, value in (("presence_penalty", 2.0), ("frequency_penalty", 2.0), ("repetition_penalty", 2.0)):
        assert len(set(ids(made, prompt=LOOP, max_tokens=24, **{field: value}))) > len(set(plain)), field


def test_narrow_filters_leave_the_greedy_token(made: Stack) -> None:
    greedy = ids(made)
    wild = {"temperature": 5.0, "seed": 3}
    assert ids(made, **wild) != greedy
    for field in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids(made, **wild, **field) == greedy, field


def test_a_seed_repeats_its_draws_and_another_does_not(made: Stack) -> None:
    draws = [ids(made, temperature=1.5, seed=seed) for seed in (5, 5, 6)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    choices = complete(made, temperature=1.5, seed=5, n=2)["choices"]
    assert choices[0]["token_ids"] == draws[0]
    assert choices[1]["token_ids"] != draws[0]


def test_stops_by_id_and_string_and_the_least_number_of_tokens(made: Stack) -> None:
    plain = choice(made)
    third = plain["token_ids"][2]
    answer = choice(made, stop_token_ids=[third])
    assert answer["token_ids"] == plain["token_ids"][: plain["token_ids"].index(third) + 1]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", third)
    assert third not in ids(made, stop_token_ids=[third], min_tokens=5)[:5]
    word = plain["text"].split()[1]
    answer = choice(made, stop=word)
    assert word not in answer["text"]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", word)
    assert choice(made, stop=word, include_stop_str_in_output=True)["text"] == answer["text"] + word


def test_eos_ends_an_answer_unless_it_is_ignored(made: Stack) -> None:
    golden = GOLDEN[0]
    answer = choice(made, prompt=golden["prompt"], max_tokens=24)
    length = len(answer["token_ids"])
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", None)
    assert length < 24
    assert answer["token_ids"] == golden["output"][:length]
    assert ids(made, prompt=golden["prompt"], max_tokens=24, ignore_eos=True) == golden["output"]
    assert "<|im_end|>" not in choice(made, prompt=golden["prompt"], max_tokens=24, ignore_eos=True)["text"]
    assert "<|im_end|>" in choice(made, prompt=golden["prompt"], max_tokens=24, ignore_eos=True, skip_special_tokens=False)["text"]


def test_the_best_of_several_has_the_largest_log_probability(made: Stack) -> None:
    asked = {"temperature": 1.0, "seed": 2, "max_tokens": 6, "logprobs": 0}
    every = complete(made, **asked, n=4)["choices"]
    best = choice(made, **asked, best_of=4)
    sums = [sum(one["logprobs"]["token_logprobs"]) for one in every]
    assert best["token_ids"] == every[sums.index(max(sums))]["token_ids"]


def test_a_salt_keeps_prefixes_apart(made: Stack) -> None:
    def cached(**fields: Any) -> int:
        return complete(made, prompt=PROMPT * 20, max_tokens=1, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached() > 0 for _ in range(2)] == [False, True]
    assert [cached(cache_salt="mine") > 0 for _ in range(2)] == [False, True]
    assert cached(cache_salt="mine", prompt_logprobs=0) == 0
