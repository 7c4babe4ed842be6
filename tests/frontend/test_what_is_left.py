"""Parameters under which no token could be drawn, or none that means anything, reach no worker."""

from __future__ import annotations

from typing import Any

import pytest

from tests.frontend.asking import complete, error, submitted
from tests.frontend.fakes import EOS, Engine

A, B = ord("a"), ord("b")


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS], "min_tokens": 1},
        {"allowed_token_ids": [A, EOS], "min_tokens": 2, "stop_token_ids": [A]},
        {"allowed_token_ids": [A], "bad_words": ["a"]},
        {"allowed_token_ids": [A, B, EOS], "bad_words": ["a", "b"], "min_tokens": 1},
    ],
)
def test_allowed_ids_that_are_all_forbidden_are_refused(fields: dict[str, Any], tmp_path) -> None:
    engine = Engine()
    assert "forbidden" in error(complete(tmp_path, engine, **fields), 400, "allowed_token_ids")["message"]
    assert not engine.live


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS]},
        {"allowed_token_ids": [A, EOS], "min_tokens": 2},
        {"allowed_token_ids": [EOS], "ignore_eos": True, "min_tokens": 1},
        {"allowed_token_ids": [A, B], "bad_words": ["a"]},
        {"allowed_token_ids": [A], "bad_words": ["aa"]},
        {"bad_words": ["a"], "min_tokens": 1},
    ],
)
def test_one_that_is_left_is_enough(fields: dict[str, Any], tmp_path) -> None:
    assert complete(tmp_path, max_tokens=2, **fields).status_code == 200


@pytest.mark.parametrize(("asked", "sent"), [(0, 0.0), (1e-300, 0.0), (1e-45, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (0.5, 0.5)])
def test_a_temperature_that_no_float_can_divide_by_is_zero(asked: float, sent: float, tmp_path) -> None:
    engine = Engine()
    assert complete(tmp_path, engine, temperature=asked).status_code == 200
    assert submitted(engine).params.temperature == sent


def test_a_repetition_penalty_that_makes_logits_infinite_is_refused(tmp_path) -> None:
    error(complete(tmp_path, repetition_penalty=1e-45), 400, "repetition_penalty")
    assert complete(tmp_path, repetition_penalty=0.001).status_code == 200
