"""Sampling: the draws, the filters, what a request changes about its logits, and what is reported."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gpu_worker.logprobs import candidates, columns, told
from gpu_worker.philox import GUMBEL_HIGH, GUMBEL_LOW, gumbel, philox
from gpu_worker.runner import Record
from gpu_worker.sampler import Sampler, _add_noise, _add_some_noise, _Draws
from gpu_worker.transfer import Arrival
from protocol.columns import pack, pack_floats
from protocol.messages import SamplingParams

VOCAB = 203  # no multiple of 4
CPU = torch.device("cpu")


def _record(prompt: list[int] | None = None, known: list[int] | None = None, seed: int = 1, **params: object) -> Record:
    chosen = SamplingParams(**{"max_tokens": 50, **params})  # type: ignore[arg-type]
    return Record(0, np.array(prompt or [1], np.int32), np.array(known or [], np.int32), seed, chosen, 4096)


def _sample(records: list[Record], logits: torch.Tensor, positions: list[int] | None = None, sampler: Sampler | None = None) -> list[int]:
    if sampler is None:
        sampler = Sampler(len(records), logits.shape[1], CPU)
        for slot, record in enumerate(records):
            sampler.bind(slot, record)
    slots = np.arange(len(records), dtype=np.int32)
    at = np.array(positions or [record.length for record in records], np.int32)
    return sampler.sample(logits.clone(), slots, at).tokens.tolist()


def _logits(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_philox_gives_the_words_of_its_authors_known_answers() -> None:
    def words(key: tuple[int, int], counter: tuple[int, int]) -> list[int]:
        k = torch.tensor([key[0]]), torch.tensor([key[1]])
        return [int(w) for w in philox(k, (torch.tensor([counter[0]]), torch.tensor([counter[1]])))]

    assert words((0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF)) == _philox_in_plain_integers(2**64 - 1, [2**32 - 1, 2**32 - 1, 0, 0])


def _philox_in_plain_integers(seed: int, c: list[int]) -> list[int]:
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def test_gumbel_variates_are_finite_within_their_bounds_at_both_ends() -> None:
    ends = gumbel(torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
    assert torch.isfinite(ends).all()
    assert float(ends.max()) < GUMBEL_HIGH
    assert float(ends.min()) > GUMBEL_LOW


def test_a_draw_is_the_largest_sum_of_logit_and_variate() -> None:
    logits, seed, position = _logits(1), (7 << 40) + 5, 33
    key = torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([seed >> 32])
    words = philox(key, (torch.tensor([position]), torch.arange(51)))
    expected = (logits[0] / 0.8 + gumbel(torch.stack(words, 1)).reshape(-1)[:VOCAB]).argmax()
    assert _sample([_record(seed=seed, temperature=0.8)], logits, [position]) == [int(expected)]


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_noise_for_the_tokens_that_can_win_draws_as_noise_for_all_does(scale: float) -> None:
    logits = torch.nn.functional.pad(_logits(40) * scale, (0, 1), value=-torch.inf)
    seeds = torch.arange(40)
    draws = _Draws(np.arange(40, dtype=np.int32), seeds, torch.ones(40, 1), seeds * 7, seeds * 9)
    some, every = logits.clone(), logits.clone()
    _add_some_noise(some, draws, seeds + 100)
    _add_noise(every, draws, seeds + 100)
    assert some.argmax(1).tolist() == every.argmax(1).tolist()


def test_frequencies_are_those_of_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    n = 4000
    records = [_record(seed=i) for i in range(n)]
    tokens = torch.tensor(_sample(records, logits.expand(n, 5)))
    expected = logits[0].softmax(0) * n
    chi2 = float(((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum())
    assert chi2 < 18.5, "99.9% of right samplers lie below"


def test_a_row_gets_its_token_whatever_rows_are_beside_it() -> None:
    logits = _logits(6)
    records = [
        _record(temperature=0.0),
        _record(seed=2, temperature=0.7, top_k=5),
        _record(seed=3, top_p=0.6),
        _record(seed=4, min_p=0.1, logprobs=3),
        _record(seed=5, prompt=[1, 2, 3], known=[9], repetition_penalty=1.5, frequency_penalty=0.3),
        _record(seed=6, bias_ids=pack([4]), bias_values=pack_floats([2.5])),
    ]
    together = _sample(records, logits)
    assert together == [_sample([record], logits[i : i + 1])[0] for i, record in enumerate(records)]


def _reachable(logits: torch.Tensor, **params: object) -> set[int]:
    n = 400
    return set(_sample([_record(seed=i, **params) for i in range(n)], logits.expand(n, -1)))


def test_top_k_leaves_the_k_best() -> None:
    logits = _logits(1)
    assert _reachable(logits, top_k=3, temperature=3.0) == set(logits[0].topk(3).indices.tolist())


def test_top_p_leaves_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert _reachable(logits, top_p=0.5) == {0}
    assert _reachable(logits, top_p=0.51) == {0, 1}
    assert _reachable(logits, top_p=0.9) == {0, 1, 2}


def test_top_p_looks_beyond_the_first_thousand_tokens_if_it_must() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, :1500] = 1.0
    assert {t < 1500 for t in _reachable(logits, top_p=0.99)} == {True, False}


def test_top_p_is_the_same_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, VOCAB)
    records = [_record(temperature=1.0, top_p=0.1 * i, top_k=3 * (i % 2)) for i in range(1, 8)]

    def left() -> torch.Tensor:
        sampler, slots = Sampler(7, VOCAB, CPU), np.arange(7, dtype=np.int32)
        for slot, record in enumerate(records):
            sampler.bind(slot, record)
        out = logits.clone()
        sampler.prepare(out, slots, slots)
        return out

    whole = left()
    assert whole.isinf().any()
    monkeypatch.setattr("gpu_worker.sampler.SORTED_AT_ONCE", 2 * VOCAB)
    assert torch.equal(left(), whole)


def test_min_p_leaves_what_is_likely_enough_beside_the_best() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert _reachable(logits, min_p=0.31) == {0, 1}


def test_a_bitmask_leaves_only_its_tokens() -> None:
    sampler = Sampler(1, VOCAB, CPU)
    sampler.bind(0, _record(temperature=0.0))
    mask = torch.zeros(1, 7, dtype=torch.int32)
    mask[0, 3] = -(2**31)  # bit 31 of the fourth word: token 127
    at = np.zeros(1, np.int32)
    assert sampler.sample(_logits(1), at, at, mask).tokens.tolist() == [127]


def test_bias_allowed_ids_and_bad_words_change_the_choice() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :6] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    greedy = {"temperature": 0.0}
    assert _sample([_record(**greedy, bias_ids=pack([3]), bias_values=pack_floats([4.0]))], logits) == [3]
    assert _sample([_record(**greedy, allowed_ids=pack([2, 4]))], logits) == [2]
    assert _sample([_record(**greedy, bad_words=[pack([0]), pack([1])])], logits) == [2]
    assert _sample([_record(prompt=[8, 9], **greedy, bad_words=[pack([8, 9, 0]), pack([7, 9, 1])])], logits) == [1]
    assert _sample([_record(prompt=[9], **greedy, bad_words=[pack([8, 9, 0])])], logits) == [0]


def test_a_bad_word_of_two_tokens_is_seen_in_what_was_sampled() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 5] = 2.0, 1.0
    sampler = Sampler(1, VOCAB, CPU)
    sampler.bind(0, _record(temperature=0.0, bad_words=[pack([4, 4])]))
    assert [_sample([_record()], logits, [i], sampler)[0] for i in range(1, 6)] == [4, 5, 4, 5, 4]


def test_a_bad_word_of_one_token_is_banned_also_after_longer_ones_were() -> None:
    sampler = Sampler(1, 6, CPU)
    sampler.bind(0, _record(temperature=0.0, bad_words=[pack([1, 2, 3])]))
    sampler.bind(0, _record(temperature=0.0, bad_words=[pack([4])]))
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 5.0, 4.0]])
    assert sampler.sample(logits, np.zeros(1, np.int32), np.zeros(1, np.int32)).tokens.tolist() == [5]


def test_stop_ids_are_banned_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 5] = 2.0, 1.0
    sampler = Sampler(1, VOCAB, CPU)
    sampler.bind(0, _record(prompt=[1, 2, 3], temperature=0.0, stop_ids=pack([4]), min_tokens=2))
    assert [_sample([_record()], logits, [p], sampler)[0] for p in (3, 4, 5)] == [5, 5, 4]


@pytest.mark.parametrize("resumed", [0, 1, 3])
def test_penalties_count_over_the_whole_history_also_when_a_choice_resumes(resumed: int) -> None:
    prompt, tokens = [3, 3, 10], []
    logits = _logits(1)
    params = {"temperature": 0.0, "repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.7}
    sampler = Sampler(1, VOCAB, CPU)
    sampler.bind(0, _record(prompt, **params))
    for i in range(6):
        if resumed and i == resumed:
            sampler.bind(0, _record(prompt, tokens, **params))
        counts = np.bincount(tokens, minlength=VOCAB) if tokens else np.zeros(VOCAB)
        expected = logits[0].double().numpy().copy()
        for t in {*prompt, *tokens}:
            expected[t] = expected[t] / 1.4 if expected[t] > 0 else expected[t] * 1.4
        expected -= 0.7 * counts + 0.6 * (counts > 0)
        tokens += _sample([_record()], logits, [len(prompt) + len(tokens)], sampler)
        assert tokens[-1] == int(expected.argmax())


def test_a_slot_forgets_the_parameters_of_its_last_record() -> None:
    logits = _logits(1)
    sampler = Sampler(1, VOCAB, CPU)
    best = int(logits.argmax())
    sampler.bind(0, _record(temperature=0.0, bias_ids=pack([best]), bias_values=pack_floats([-100.0]), frequency_penalty=1.0))
    assert _sample([_record()], logits, [1], sampler) != [best]
    sampler.bind(0, _record(temperature=0.0))
    assert _sample([_record()], logits, [1], sampler) == [best]


def test_a_slot_draws_by_the_parameters_of_the_record_bound_last() -> None:
    logits = _logits(1)
    best, sampler = int(logits.argmax()), Sampler(1, VOCAB, CPU)
    sampler.bind(0, _record(temperature=0.0))
    assert _sample([_record()], logits, [1], sampler) == [best]
    sampler.bind(0, _record(temperature=50.0, seed=3))
    (plain,) = _sample([_record()], logits, [1], sampler)
    assert plain != best
    sampler.bind(0, _record(temperature=50.0, seed=3, top_k=1))
    assert _sample([_record()], logits, [1], sampler) == [best]


def test_a_nan_costs_its_own_row_the_token_and_no_other() -> None:
    logits = _logits(3)
    logits[1, 77] = float("nan")
    tokens = _sample([_record(seed=i) for i in range(3)], logits)
    assert tokens[1] == -1
    assert tokens[0] >= 0
    assert tokens[2] >= 0


def test_logprobs_are_the_models_own_with_the_sampled_token_first() -> None:
    logits = _logits(4)
    expected = logits.log_softmax(1)
    tokens = np.array([5, 6, -1, 8], np.int32)
    rows, wanted = np.array([0, 2, 3], np.int32), np.array([2, 3, 0], np.int32)
    one = told(candidates(logits[[0, 2, 3]], 3), torch.tensor([5, 0, 8]))
    reported = columns(rows, wanted, tokens, *Arrival(*one.tensors).read())
    assert reported.counts.tolist() == [3, 0, 0, 1]
    assert reported.ids.tolist() == [5, *expected[0].topk(2).indices.tolist(), 8]
    own = [expected[0, 5], *expected[0].topk(2).values, expected[3, 8]]
    assert np.allclose(reported.values, own, atol=1e-5)
    assert reported.ranks.tolist() == [1 + int((expected[i] > expected[i, t]).sum()) for i, t in ((0, 5), (3, 8))]


def test_only_rows_that_ask_for_logprobs_cost_anything() -> None:
    sampler = Sampler(2, VOCAB, CPU)
    sampler.bind(0, _record())
    sampler.bind(1, _record(logprobs=2))
    at = np.zeros(1, np.int32)
    assert sampler.sample(_logits(1), at, at).told is None
    assert sampler.sample(_logits(2), np.arange(2, dtype=np.int32), np.zeros(2, np.int32)).reported.rows.tolist() == [1]


def test_the_bounds_that_leave_tokens_out_of_a_draw_are_safe() -> None:
    assert -math.log(-math.log1p(-(2.0**-33))) < GUMBEL_HIGH
    assert -math.log(-math.log1p(-(1 - 2.0**-24))) > GUMBEL_LOW
