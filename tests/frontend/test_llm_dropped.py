"""An engine that nobody has any more gives back what its services hold, a card's memory above all."""

from __future__ import annotations

import gc

import psutil
import pytest

from frontend.llm import LLM, LLMEngine, SamplingParams
from tests.e2e.stack import eventually, is_over

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("kind", [LLM, LLMEngine])
def test_its_services_end(kind: type[LLM] | type[LLMEngine]) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    engine = kind(runner="oracle")
    if isinstance(engine, LLM):
        engine.generate("x", SamplingParams(max_tokens=2))
    started = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    run_dir = engine._background.engine._own.run_dir
    assert len(started) >= 2
    del engine
    gc.collect()
    eventually(lambda: all(map(is_over, started)) and not run_dir.exists())


def test_an_engine_that_is_still_asked_is_not_dropped() -> None:
    with LLM(runner="oracle") as joined:
        run_dir = joined._background.engine._own.run_dir
        [output] = LLM(run_dir=run_dir).generate("x", SamplingParams(max_tokens=400, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 400
