"""What the bench asks, and when."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pagewire.bench.workloads import Request, Turn, Workload, WorkloadError, arrivals, follow, make, read_lengths


def bodies(requests: list[Request]) -> list[dict[str, Any]]:
    return [json.loads(request.body) for request in requests]


def test_the_same_arguments_make_the_same_requests_and_another_seed_others() -> None:
    assert make(Workload(requests=20, rate=5)) == make(Workload(requests=20, rate=5))
    assert bodies(make(Workload(requests=20))) != bodies(make(Workload(requests=20, seed=1)))


def test_lengths_stay_in_their_spans() -> None:
    made = bodies(make(Workload(requests=200, input=(3, 9), output=(2, 4), vocab=50)))
    assert {len(body["prompt"]) for body in made} == set(range(3, 10))
    assert {body["max_tokens"] for body in made} == {2, 3, 4}
    assert all(0 <= token < 50 for body in made for token in body["prompt"])


def test_lengths_come_from_a_file_of_pairs(tmp_path: Path) -> None:
    file = tmp_path / "lengths.json"
    file.write_text("[[3, 5], [900, 200], [2, 4]]")
    made = bodies(make(Workload(requests=3, lengths=read_lengths(file), max_total=100, prefix=10)))
    assert [(len(body["prompt"]), body["max_tokens"]) for body in made] == [(13, 5), (12, 4), (13, 5)]
    assert made[0]["prompt"][:10] == made[1]["prompt"][:10]


def test_sharegpt_lengths_are_short_in_the_middle_and_long_at_the_end() -> None:
    pairs = [(len(body["prompt"]), body["max_tokens"]) for body in bodies(make(Workload("sharegpt", requests=4000)))]
    prompts, outputs = (sorted(column) for column in zip(*pairs, strict=True))
    assert 95 < prompts[2000] < 130
    assert 120 < outputs[2000] < 155
    assert 750 < prompts[3800] < 860
    assert (prompts[0] >= 4, prompts[-1] <= 1015, outputs[-1] <= 1888) == (True, True, True)
    short = [output for prompt, output in pairs if prompt <= 112]
    long = [output for prompt, output in pairs if prompt > 112]
    assert sorted(short)[len(short) // 2] > 1.5 * sorted(long)[len(long) // 2]


def test_prompts_share_one_of_several_prefixes() -> None:
    made = bodies(make(Workload("shared-prefix", requests=60, input=(2, 3), prefix=8, prefixes=3)))
    assert len({tuple(body["prompt"][:8]) for body in made}) == 3
    words = bodies(make(Workload("shared-prefix", requests=9, input=(2, 3), prefix=4, text=True)))
    assert len({tuple(body["prompt"].split()[:4]) for body in words}) == 1
    assert {len(body["prompt"].split()) for body in words} == {6, 7}


def test_a_conversation_says_all_again_and_goes_on() -> None:
    (request,) = make(Workload("multi-turn", requests=1, api="chat", turns=3, input=(4, 4), output=(5, 6)))
    assert len(request.then) == 2
    second = json.loads(follow(request.body, "an answer", request.then[0]))
    first = json.loads(request.body)["messages"]
    assert second["messages"] == [*first, {"role": "assistant", "content": "an answer"}, {"role": "user", "content": request.then[0].text}]
    assert second["max_tokens"] == request.then[0].output
    text = json.loads(follow(json.dumps({"prompt": "a", "max_tokens": 1}).encode(), "b", Turn("c", 7)))
    assert text == {"prompt": "ab\nc", "max_tokens": 7}


def test_arrivals_keep_their_rate_and_their_kind() -> None:
    def gaps(burstiness: float) -> list[float]:
        at = arrivals(Workload(rate=50, burstiness=burstiness), 4000, random.Random(1))
        assert at[0] == 0
        assert at == sorted(at)
        return [b - a for a, b in itertools.pairwise(at)]

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        assert mean == pytest.approx(0.02, rel=0.1)
        return (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 / mean

    assert deviation(gaps(1.0)) == pytest.approx(1.0, rel=0.1), "a Poisson process"
    assert deviation(gaps(0.25)) == pytest.approx(2.0, rel=0.15), "bunched"
    assert deviation(gaps(float("inf"))) == pytest.approx(0.0, abs=1e-9), "even"
    for rate in (0.0, float("inf")):
        assert arrivals(Workload(rate=rate), 3, random.Random(1)) == [0, 0, 0]


def test_only_what_arrives_in_time_is_sent() -> None:
    assert len(make(Workload(requests=20, rate=5, burstiness=float("inf"), seconds=1))) == 5


def test_bodies_say_what_was_asked_for() -> None:
    (body,) = bodies(make(Workload(requests=1, api="chat", model="m", ignore_eos=True, temperature=0.5, extra={"priority": 3})))
    assert body.pop("messages")[0]["role"] == "user"
    assert body.pop("max_tokens") >= 100
    expected = {"model": "m", "ignore_eos": True, "temperature": 0.5, "priority": 3}
    assert body == expected | {"stream": True, "stream_options": {"include_usage": True}}
    (plain,) = bodies(make(Workload(requests=1, stream=False)))
    assert set(plain) == {"prompt", "max_tokens", "temperature"}


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (Workload("chess"), "chess"),
        (Workload(input=(5, 3)), "input"),
        (Workload(output=(0, 3)), "output"),
        (Workload("multi-turn"), "text"),
        (Workload("shared-prefix"), "shared_prefix"),
        (Workload(rate=-1), "rate"),
        (Workload(lengths=[(50, 60)], max_total=100), "100"),
    ],
)
def test_arguments_that_make_no_workload_are_refused(workload: Workload, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        make(workload)


def test_a_file_that_holds_no_lengths_is_refused(tmp_path: Path) -> None:
    for content in ("", "{}", "[1, 2]", '[["a", 1]]'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(WorkloadError):
            read_lengths(tmp_path / "x.json")
