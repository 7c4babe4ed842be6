"""Times and lengths of requests, as /metrics shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from frontend.client import Client
from frontend.entries import NewRequest
from frontend.journal import Journal
from frontend.settings import FrontendSettings
from frontend.totals import Totals
from protocol.columns import pack, pack_floats
from protocol.counters import Counters
from protocol.families import FAMILIES
from protocol.messages import Choice, Defaults, Failed, ModelInfo, Models, SamplingParams, Submit, Tokens, Welcome
from protocol.messages import Journal as JournalMessage
from protocol.series import Series
from protocol.times import Times


def journal() -> Journal:
    made = Journal(1, Times(), Counters(), lambda submit: request(submit.request[0]))
    made.opened(Welcome(1, 1, 1, bytes(16)), 0.0)
    made.message(Models([ModelInfo("m", b"f", 512, 258, b"", Defaults(), b"t", 1)]), 0.0)
    return made


def request(name: int, max_tokens: int = 3, n: int = 1) -> NewRequest:
    return NewRequest(bytes([name] * 16), "m", pack([1, 2, 3, 4]), SamplingParams(max_tokens), list(range(n)))


def tokens(rows: list[tuple[int, int, int]], admitted: dict[int, tuple[int, float]] | None = None, count: int = 1) -> Tokens:
    """A message: (handle, choice, first index) each; handles admitted, with cached tokens and seconds waited."""
    told = admitted or {}
    return Tokens(
        handles=pack([row[0] for row in rows]),
        choices=pack([row[1] for row in rows]),
        firsts=pack([row[2] for row in rows]),
        counts=pack([count] * len(rows)),
        ids=pack([65] * count * len(rows)),
        admitted=pack(list(told)),
        cached=pack([cached for cached, _ in told.values()]),
        queued=pack_floats([queued for _, queued in told.values()]),
    )


def shown(made: Journal, family: str) -> Series:
    [sample] = [sample for sample in made.measures["m"].series("m") if sample.family == family]
    return sample


def observed(made: Journal, family: str) -> tuple[int, float]:
    """Observations and their sum."""
    sample = shown(made, family)
    return sum(sample.counts), pytest.approx(sample.value)


def counted(made: Journal) -> dict[str, float]:
    """Choices by how they ended."""
    return {sample.labels[1]: sample.value for sample in made.measures["m"].series("m") if sample.family == "vllm:request_success"}


def test_a_request_s_time_is_divided_into_queue_prefill_and_decode():
    made = journal()
    entry = made.submit(request(1, max_tokens=3), 10.0)
    entry.arrived = 9.5
    made.message(tokens([(0, 0, 0)], {0: (2, 1.0)}), 11.25)
    made.message(tokens([(0, 0, 1)]), 11.5)
    made.message(tokens([(0, 0, 2)]), 12.0)
    entry.measures.ended(entry, 12.5)
    assert observed(made, "vllm:time_to_first_token_seconds") == (1, 1.75)
    assert observed(made, "vllm:request_queue_time_seconds") == (1, 1.0)
    assert observed(made, "vllm:request_prefill_time_seconds") == (1, 0.25)
    assert observed(made, "vllm:request_decode_time_seconds") == (1, 0.75)
    assert observed(made, "vllm:request_inference_time_seconds") == (1, 1.0)
    assert observed(made, "vllm:e2e_request_latency_seconds") == (1, 3.0)
    assert observed(made, "vllm:request_time_per_output_token_seconds") == (1, 0.375)
    assert observed(made, "vllm:inter_token_latency_seconds") == (2, 0.75)
    assert observed(made, "vllm:time_per_output_token_seconds") == (2, 0.75)
    assert observed(made, "vllm:request_prompt_tokens") == (1, 4)
    assert observed(made, "vllm:request_prefill_kv_computed_tokens") == (1, 2)
    assert observed(made, "vllm:request_generation_tokens") == (1, 3)
    assert observed(made, "vllm:request_params_max_tokens") == (1, 3)
    assert observed(made, "vllm:request_params_n") == (1, 1)
    assert shown(made, "vllm:prompt_tokens").value == 4
    assert shown(made, "vllm:generation_tokens").value == 3


def test_tokens_of_one_step_are_told_apart_by_when_their_choice_had_its_last():
    made = journal()
    made.submit(request(1, 9, n=2), 0.0)
    made.submit(request(2, 9), 0.0)
    made.message(tokens([(0, 0, 0), (0, 1, 0)]), 1.0)
    made.message(tokens([(1, 0, 0)]), 1.004)
    made.message(tokens([(0, 0, 1), (0, 1, 1), (1, 0, 1)]), 1.005)
    sample, bounds = shown(made, "vllm:inter_token_latency_seconds"), FAMILIES["vllm:inter_token_latency_seconds"].bounds
    counted = {bound: n for bound, n in zip(bounds, sample.counts, strict=False) if n}
    assert len(counted) == 2
    assert sorted(counted.values()) == [1, 2]
    assert sample.value == pytest.approx(0.011)
    assert observed(made, "vllm:time_to_first_token_seconds")[0] == 2


def test_what_comes_twice_or_too_late_is_not_counted():
    made = journal()
    entry = made.submit(request(1, 2), 0.0)
    made.message(tokens([(0, 0, 0)]), 1.0)
    made.message(tokens([(0, 0, 0)]), 1.5)
    made.message(tokens([(0, 0, 0)], count=5), 2.0)  # longer than max_tokens
    made.message(tokens([(0, 0, 2)]), 3.0)
    assert entry.ended
    assert shown(made, "vllm:generation_tokens").value == 2
    assert observed(made, "vllm:inter_token_latency_seconds") == (1, 1.0)


def test_a_request_taken_over_has_its_first_token_once():
    made = journal()
    entry = made.attach(bytes([1] * 16), 5.0)
    choice = Choice(0, 0, pack([65, 65]))
    made.message(JournalMessage(Submit(entry.request, 0, "m", pack([1, 2, 3, 4]), SamplingParams(3), [choice], age=2.0)), 5.0)
    made.message(tokens([(0, 0, 2)]), 5.5)
    entry.measures.ended(entry, 6.0)
    assert observed(made, "vllm:time_to_first_token_seconds")[0] == 0
    assert observed(made, "vllm:request_decode_time_seconds")[0] == 0
    assert observed(made, "vllm:inter_token_latency_seconds") == (1, 0.5)
    assert observed(made, "vllm:e2e_request_latency_seconds") == (1, 3.0)
    assert shown(made, "vllm:prompt_tokens").value == 0
    assert shown(made, "vllm:generation_tokens").value == 1


def test_an_aborted_request_is_counted_and_not_timed():
    made = journal()
    entry = made.submit(request(1), 0.0)
    made.message(tokens([(0, 0, 0)]), 1.0)
    entry.measures.ended(entry, 2.0)
    reasons = {s.labels[1]: s.value for s in made.measures["m"].series("m") if s.family == "vllm:request_success"}
    assert reasons == {"stop": 0, "length": 0, "abort": 1, "error": 0}
    assert observed(made, "vllm:e2e_request_latency_seconds")[0] == 0


def test_a_failed_request_without_output_is_an_error_and_no_success():
    made = journal()
    entry = made.submit(replace(request(1), params=SamplingParams(0, prompt_logprobs=0)), 0.0)
    made.message(Failed(entry.request, 429, "overloaded", "too much"), 1.0)
    entry.measures.ended(entry, 1.0)
    assert counted(made) == {"stop": 0, "length": 0, "abort": 0, "error": 1}
    assert observed(made, "vllm:e2e_request_latency_seconds")[0] == 0


@pytest.mark.parametrize(("failed", "owed"), [(False, "abort"), (True, "error")])
def test_choices_at_their_end_whose_prompt_got_no_log_probabilities_are_no_success(failed, owed):
    made = journal()
    scored = replace(request(1, n=2), params=SamplingParams(1, prompt_logprobs=0))
    entry = made.submit(scored, 0.0)
    made.message(tokens([(0, 0, 0), (0, 1, 0)]), 1.0)
    if failed:
        made.message(Failed(entry.request, 500, "nan", "no number"), 2.0)
    entry.measures.ended(entry, 2.0)
    assert counted(made) == dict.fromkeys(("stop", "length", "abort", "error"), 0) | {owed: 2}


def test_totals_time_a_request_from_its_arrival_to_each_choice_s_last_token():
    made, totals = journal(), Totals()
    entry = made.submit(request(1, 2, n=2), 10.0)
    entry.arrived = 9.0
    made.message(tokens([(0, 0, 0), (0, 1, 0)]), 11.0)
    made.message(tokens([(0, 0, 1)]), 12.0)
    made.message(tokens([(0, 1, 1)]), 14.0)
    totals.ended(entry, 50.0)
    assert (totals.request_seconds, totals.first_token_seconds) == (5.0, 2.0)
    assert (totals.later_token_seconds, totals.later_tokens) == (4.0, 2)


def test_a_model_s_series_keep_their_name_whatever_models_come_and_go(tmp_path):
    client = Client(FrontendSettings(run_dir=str(tmp_path), served_model_name="public"), 1)
    first, second = (ModelInfo(name, b"f", 512, 258, b"", Defaults(), b"t", 1) for name in "ms")
    client.journal.opened(Welcome(1, 1, 1, bytes(16)), 0.0)

    def names(*models: ModelInfo) -> set[str]:
        client.journal.message(Models(list(models)), 0.0)
        return {sample.labels[0] for sample in client.series()}

    client.journal.message(Models([first]), 0.0)
    client.journal.submit(request(1), 0.0)
    assert names(first) == {"public"}
    assert names(first, second) == {"public"}
    assert names() == {"public"}
    client.journal.submit(replace(request(2), model="s"), 0.0)
    assert names(second) == {"public", "s"}, "a name stands for one model"
