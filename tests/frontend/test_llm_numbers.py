"""What programs hand to the offline API beside Python's own numbers, and names and options in its way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from frontend.llm import LLM, LLMEngine, RequestFailed, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(runner="oracle") as llm:
        yield llm


def test_numpys_numbers_are_numbers(llm: LLM) -> None:
    plain = {"temperature": 0.5, "top_p": 0.5, "max_tokens": 3, "seed": 7, "stop_token_ids": [5], "logit_bias": {97: 1.0}}
    numpy = {"temperature": np.float64(0.5), "top_p": np.float32(0.5), "max_tokens": np.int64(3), "seed": np.uint32(7)}
    numpy |= {"stop_token_ids": [np.int64(5)], "logit_bias": {np.int64(97): np.float32(1.0)}}
    [one], [other] = (llm.generate("x", SamplingParams(**fields)) for fields in (plain, numpy))
    assert one.outputs == other.outputs


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": np.float32("nan")}, "temperature"),
        ({"logit_bias": {1: np.float64("inf")}}, "logit_bias"),
        ({"seed": 10**400}, "seed"),
        ({"ignore_eos": np.bool_(True)}, "no value of a parameter"),
    ],
)
def test_what_is_no_number_is_refused(llm: LLM, wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        llm.generate("x", SamplingParams(**wrong))


@pytest.mark.parametrize(("option", "value"), [("stream", True), ("n", 3), ("logprobs", True), ("tools", [])])
def test_an_option_that_chat_has_not_is_refused_by_name(llm: LLM, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1), **{option: value})


def test_a_call_that_is_going_on_ends_with_one_error_when_its_engine_is_closed() -> None:
    llm = LLM(runner="oracle")
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            llm.generate(["x"] * 8, SamplingParams(max_tokens=4000, ignore_eos=True))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not llm._background.engine.client.journal.entries():
        pass
    llm.close()
    thread.join()  # ended by the close
    assert [(type(error), str(error)) for error in raised] == [(RequestFailed, "the engine was closed")]


def test_a_name_that_was_given_is_not_made_up_again() -> None:
    with LLMEngine(runner="oracle") as engine:
        ids = [engine.add_request("a", SamplingParams(max_tokens=1), name) for name in ("request-1", "request-2", None, None)]
        assert len(set(ids)) == 4
        while engine.has_unfinished_requests():
            engine.step()
