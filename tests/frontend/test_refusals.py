"""What a refusal costs: many come at once when the queue is full."""

from __future__ import annotations

import inspect

import pytest

from frontend.api.handling import HANDLERS


@pytest.mark.parametrize("error", HANDLERS, ids=lambda error: error.__name__)
def test_an_error_is_answered_without_a_thread(error: type[Exception]) -> None:
    """Starlette runs handlers that are plain functions in a pool of threads: two changes of thread for each refusal."""
    assert inspect.iscoroutinefunction(HANDLERS[error])
