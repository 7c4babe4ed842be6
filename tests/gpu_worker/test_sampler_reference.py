"""Every sampling field against a plain reference in float64 on the same logits: edits, what is left to draw from, frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu_worker.logit_edits import LogitEdits
from gpu_worker.runner import Record
from gpu_worker.sampler import Sampler
from protocol.columns import pack, pack_floats
from protocol.messages import SamplingParams

VOCAB = 61
DRAWS = 20_000
PROMPT, KNOWN = [3, 3, 10, 40], [7, 9, 7]
CPU = torch.device("cpu")
Array = npt.NDArray[np.float64]

FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "presence penalty": {"presence_penalty": 1.3},
    "frequency penalty": {"frequency_penalty": 0.8},
    "repetition penalty": {"repetition_penalty": 1.7},
    "bias": {"bias": {7: 2.0, 11: -3.0, 60: 1.0}},
    "allowed ids": {"allowed": [3, 7, 12, 13, 14, 59]},
    "bad words": {"bad_words": [[5], [9, 7, 6], [7, 8], [1, 7, 9]]},
    "least number of tokens": {"min_tokens": 4, "stop_ids": [7, 13]},
    "min-p": {"min_p": 0.2},
    "top-p": {"top_p": 0.7},
    "top-k": {"top_k": 6},
    "all of them": {
        "temperature": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.2,
        "bias": {2: 1.0, 3: 4.0},
        "allowed": [*range(40)],
        "bad_words": [[4]],
        "min_tokens": 4,
        "stop_ids": [7],
        "min_p": 0.01,
        "top_p": 0.93,
        "top_k": 15,
    },
}

DRAWN = ("temperature", "bias", "min-p", "top-p", "top-k", "all of them")


def record(fields: dict[str, Any], seed: int = 5) -> Record:
    plain = dict(fields)
    bias = plain.pop("bias", {})
    params = SamplingParams(
        max_tokens=50,
        bias_ids=pack(bias),
        bias_values=pack_floats(bias.values()),
        allowed_ids=pack(plain.pop("allowed", [])),
        bad_words=[pack(word) for word in plain.pop("bad_words", [])],
        stop_ids=pack(plain.pop("stop_ids", [])),
        **plain,
    )
    return Record(0, np.array(PROMPT, np.int32), np.array(KNOWN, np.int32), seed, params, 4096)


def edited(logits: Array, fields: dict[str, Any]) -> Array:
    """The logits as the fields change them: vLLM's order, one token after another."""
    x = logits.copy()
    history = PROMPT + KNOWN
    for token in range(VOCAB):
        if token in history:
            x[token] = (
                x[token] / fields.get("repetition_penalty", 1.0) if x[token] > 0 else x[token] * fields.get("repetition_penalty", 1.0)
            )
        x[token] -= KNOWN.count(token) * fields.get("frequency_penalty", 0.0)
        x[token] -= (token in KNOWN) * fields.get("presence_penalty", 0.0)
        x[token] += fields.get("bias", {}).get(token, 0.0)
        banned = "allowed" in fields and token not in fields["allowed"]
        banned |= any(word[-1] == token and history[len(history) - len(word) + 1 :] == word[:-1] for word in fields.get("bad_words", []))
        banned |= len(KNOWN) < fields.get("min_tokens", 0) and token in fields.get("stop_ids", [])
        if banned:
            x[token] = -np.inf
    return x


def distribution(logits: Array, fields: dict[str, Any]) -> Array:
    """The probability of each token."""
    x = edited(logits, fields) / fields.get("temperature", 1.0)
    p = np.exp(x - x.max())
    p[p < fields.get("min_p", 0.0)] = 0.0
    order = np.argsort(-p, kind="stable")
    p[order[fields.get("top_k", VOCAB) :]] = 0.0
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= fields.get("top_p", 2.0) * p.sum()]] = 0.0
    return p / p.sum()


def logits_of(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 0.8, VOCAB).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("name", FIELDS)
def test_logits_are_edited_as_the_reference_edits_them(name: str) -> None:
    edits = LogitEdits(1, VOCAB, CPU)
    edits.bind(0, record(FIELDS[name]))
    for seed in range(20):
        logits = logits_of(seed)
        mine = torch.tensor(logits, dtype=torch.float32)[None]
        edits.apply(mine, np.zeros(1, np.int32), np.array([len(PROMPT) + len(KNOWN)], np.int32))
        np.testing.assert_allclose(mine[0].numpy(), edited(logits, FIELDS[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", *DRAWN])
def test_20000_draws_fit_the_references_distribution(name: str) -> None:
    """Chi-square at fixed seeds; a right sampler exceeds the bound once in 10,000 times (Wilson and Hilferty's quantile)."""
    logits = logits_of(3)
    sampler = Sampler(1, VOCAB, CPU)
    sampler.bind(0, record(FIELDS[name]))
    rows = torch.tensor(logits, dtype=torch.float32).repeat(DRAWS, 1)
    # one slot in every row; the position, and with it the draw, differs. `min_tokens` must hold at each
    fields = FIELDS[name] | ({"min_tokens": DRAWS * 2} if "min_tokens" in FIELDS[name] else {})
    if "min_tokens" in fields:
        sampler.bind(0, record(fields))
    positions = np.arange(DRAWS, dtype=np.int32) + len(PROMPT) + len(KNOWN)
    tokens = sampler.sample(rows, np.zeros(DRAWS, np.int32), positions).tokens.numpy()
    counts, wanted = np.bincount(tokens, minlength=VOCAB), distribution(logits, FIELDS[name]) * DRAWS
    assert counts[wanted == 0].sum() == 0, "a token that cannot be drawn"
    often = wanted >= 5
    observed, expected = [*counts[often]], [*wanted[often]]
    if wanted[~often].sum() > 0:
        observed.append(counts[~often].sum())
        expected.append(wanted[~often].sum())
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = max(len(expected) - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < bound, f"{chi_square:.1f} of {freedom} degrees of freedom"


@pytest.mark.parametrize("name", DRAWN)
def test_the_reference_tells_each_field_from_none(name: str) -> None:
    """The judge itself: a field that had no effect would be seen in 20,000 draws."""
    plain, changed = (distribution(logits_of(3), FIELDS[which]) for which in ("plain", name))
    assert np.abs(plain - changed).sum() * DRAWS**0.5 > 5
