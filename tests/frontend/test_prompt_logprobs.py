"""Log probabilities of prompts: the journal's rules, and the forms of OpenAI (`echo`) and vLLM (`prompt_logprobs`)."""

from __future__ import annotations

import pytest

from frontend.entries import Entry, NewRequest
from frontend.journal import Journal
from frontend.offline import Prepared, output_of
from frontend.offline import SamplingParams as Asked
from protocol.columns import pack, pack_floats
from protocol.counters import Counters
from protocol.messages import Abort, Done, PromptScores, Resumed, SamplingParams, Scores, Submit, Welcome
from protocol.times import Times
from tests.frontend.asking import chat, complete, error, events, submitted
from tests.frontend.fakes import Engine

PROMPT = [11, 12, 13, 14, 15]
WELCOME = Welcome(1, 7, 1, bytes(16), credit=100)


def scores(first: int, last: int, handle: int = 0) -> PromptScores:
    """Positions first … last: the value of position p is −p, and its token has the rank p."""
    positions = range(first, last + 1)
    ids = [id for p in positions for id in (PROMPT[p], 99)]
    message = PromptScores(handle, Scores(first, pack(ids), pack_floats([-p / 2 for p in positions for _ in (0, 1)]), pack(positions)))
    message.check()
    return message


def opened(max_tokens: int = 0, prompt: list[int] = PROMPT, welcome: Welcome = WELCOME) -> tuple[Journal, Entry]:
    journal = Journal(1, Times(), Counters())
    journal.opened(welcome, 0.0)
    params = SamplingParams(max_tokens, prompt_logprobs=1)
    entry = journal.submit(NewRequest(bytes(16), "oracle", pack(prompt), params, [1, 2]), 0.0)
    return journal, entry


class TestJournal:
    def test_positions_are_committed_in_order_and_then_the_request_has_ended(self) -> None:
        journal, entry = opened()
        journal.message(scores(1, 2), 1.0)
        assert (entry.scored, entry.ended) == (3, False)
        assert not journal.touched
        journal.message(scores(3, 4), 1.0)
        assert [one.values[0] for one in entry.scores] == [-0.5, -1.0, -1.5, -2.0]
        assert [one.rank for one in entry.scores] == [1, 2, 3, 4]
        assert entry.ended
        assert list(journal.touched) == [entry.handle]
        assert [choice.finish_reason for choice in entry.choices] == ["length", "length"]

    def test_an_offline_output_shows_them_once_they_are_all_there(self) -> None:
        journal, entry = opened(max_tokens=2)
        asked, other = (Prepared(entry.new, params, []) for params in (Asked(prompt_logprobs=1), Asked()))
        journal.message(scores(1, 2), 1.0)
        assert output_of(entry, asked, {}, frozenset()).prompt_logprobs is None
        journal.message(scores(3, 4), 1.0)
        assert output_of(entry, asked, {}, frozenset()).prompt_logprobs == [None, *entry.scores]
        assert output_of(entry, other, {}, frozenset()).prompt_logprobs is None

    def test_what_comes_again_is_passed_over(self) -> None:
        journal, entry = opened()
        for first, last in ((1, 3), (1, 2), (2, 4)):
            journal.message(scores(first, last), 1.0)
        assert [one.rank for one in entry.scores] == [1, 2, 3, 4]
        assert journal.counters["journal_duplicate"] == 1

    def test_a_gap_is_a_fault_of_the_link(self) -> None:
        journal, entry = opened()
        journal.message(scores(2, 3), 1.0)
        assert journal.fault is not None
        assert entry.scores == []

    def test_a_new_session_is_told_from_where_to_go_on(self) -> None:
        journal, entry = opened()
        journal.message(scores(1, 2), 1.0)
        journal.closed(2.0)
        journal.opened(WELCOME, 3.0)
        submit, resumed = journal.out
        assert isinstance(submit, Submit)
        assert submit.scored == 3
        assert [choice.ended for choice in submit.choices] == [True, True]
        assert resumed == Resumed(1)
        journal.message(scores(3, 4), 4.0)
        assert entry.ended

    def test_an_abort_waits_for_no_position(self) -> None:
        journal, entry = opened()
        journal.done(entry)
        assert [type(message) for message in journal.out][-2:] == [Abort, Done]
        assert entry.ended

    def test_a_prompt_of_one_token_has_nothing_to_wait_for(self) -> None:
        journal, entry = opened(prompt=[11])
        assert entry.ended
        assert list(journal.touched) == [entry.handle]

    def test_a_scheduler_that_cannot_is_not_waited_for(self) -> None:
        journal, entry = opened(welcome=Welcome(1, 7, 1, bytes(16), credit=100, protocol=2))
        assert entry.ended
        assert entry.error is not None
        assert (entry.error.status, entry.error.param) == (501, "prompt_logprobs")
        assert isinstance(journal.out[-1], Abort)


ECHOED = {
    "tokens": ["h", "i", "!"],
    "token_logprobs": [None, -0.25, -0.5],
    "top_logprobs": [None, {"i": -0.25, "A": -1.0}, {"!": -0.5, "A": -1.0}],
    "text_offset": [0, 1, 2],
}


class TestEcho:
    def test_the_prompts_log_probabilities_precede_the_outputs(self, tmp_path) -> None:
        [choice] = complete(tmp_path, prompt="hi!", max_tokens=1, echo=True, logprobs=1).json()["choices"]
        assert choice["text"] == "hi!a"
        assert "prompt_logprobs" not in choice
        assert choice["logprobs"] == {
            "tokens": [*ECHOED["tokens"], "a"],
            "token_logprobs": [*ECHOED["token_logprobs"], -0.5],
            "top_logprobs": [*ECHOED["top_logprobs"], {"a": -0.5, "A": -1.0}],
            "text_offset": [0, 1, 2, 3],
        }

    def test_max_tokens_0_gives_the_prompt_alone(self, tmp_path) -> None:
        body = complete(tmp_path, prompt="hi!", max_tokens=0, echo=True, logprobs=1).json()
        [choice] = body["choices"]
        assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("hi!", "length", ECHOED)
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 0)

    def test_max_tokens_0_without_logprobs_asks_nobody_to_compute(self, tmp_path) -> None:
        engine = Engine()
        [choice] = complete(tmp_path, engine, max_tokens=0, echo=True).json()["choices"]
        assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("hi", None, "length")
        assert submitted(engine).params.prompt_logprobs == -1

    def test_each_choice_of_each_prompt_has_them(self, tmp_path) -> None:
        body = complete(tmp_path, prompt=["hi", "yo"], n=2, max_tokens=1, echo=True, logprobs=0).json()
        assert [choice["text"] for choice in body["choices"]] == ["hia", "hib", "yoa", "yob"]
        for choice in body["choices"]:
            assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5]
            assert choice["logprobs"]["tokens"] == list(choice["text"])

    @pytest.mark.parametrize("max_tokens", [0, 2])
    def test_in_a_stream_they_come_with_the_first_event(self, tmp_path, max_tokens) -> None:
        data = events(complete(tmp_path, prompt="hi!", max_tokens=max_tokens, echo=True, logprobs=1, stream=True))
        first, *rest = (item["choices"][0] for item in data[:-1])
        assert (first["text"], first["logprobs"], first["finish_reason"]) == ("hi!", ECHOED, None)
        assert [item["logprobs"]["text_offset"] for item in rest[:-1]] == [[3], [4]][:max_tokens]
        assert rest[-1]["finish_reason"] == "length"


class TestPromptLogprobs:
    def test_a_completion_has_vllms_form_by_token_id(self, tmp_path) -> None:
        [choice] = complete(tmp_path, prompt="hi!", max_tokens=1, prompt_logprobs=1).json()["choices"]
        assert choice["logprobs"] is None
        assert choice["prompt_logprobs"] == [
            None,
            {
                "105": {"logprob": -0.25, "rank": 2, "decoded_token": "i"},
                "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"},
            },
            {
                "33": {"logprob": -0.5, "rank": 3, "decoded_token": "!"},
                "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"},
            },
        ]

    def test_the_own_token_is_told_once_also_if_it_is_among_the_alternatives(self, tmp_path) -> None:
        [choice] = complete(tmp_path, prompt="xA", max_tokens=0, prompt_logprobs=2).json()["choices"]
        assert choice["prompt_logprobs"][1] == {
            "65": {"logprob": -0.25, "rank": 2, "decoded_token": "A"},
            "66": {"logprob": -2.0, "rank": 2, "decoded_token": "B"},
        }
        assert (choice["text"], choice["finish_reason"]) == ("", "length")

    def test_a_chat_has_them_beside_its_choices(self, tmp_path) -> None:
        body = chat(tmp_path, prompt_logprobs=0, n=2, max_tokens=0).json()
        assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"] == len("user: hi\nassistant: ")
        assert all("prompt_logprobs" not in choice for choice in body["choices"])

    def test_echo_and_prompt_logprobs_each_show_as_many_as_they_ask_for(self, tmp_path) -> None:
        engine = Engine()
        [choice] = complete(tmp_path, engine, prompt="hi", max_tokens=0, echo=True, logprobs=1, prompt_logprobs=3).json()["choices"]
        assert submitted(engine).params.prompt_logprobs == 3
        assert len(choice["prompt_logprobs"][1]) == 4
        assert len(choice["logprobs"]["top_logprobs"][1]) == 2

    def test_an_output_of_no_tokens_needs_a_question_about_the_prompt(self, tmp_path) -> None:
        error(complete(tmp_path, max_tokens=0), 400, "max_tokens")
        error(chat(tmp_path, max_tokens=0), 400, "max_tokens")
        error(chat(tmp_path, max_tokens=None, max_completion_tokens=0), 400, "max_completion_tokens")

    def test_a_prompt_may_fill_the_context_if_nothing_is_sampled(self, tmp_path) -> None:
        [choice] = complete(tmp_path, prompt="x" * 512, max_tokens=0, prompt_logprobs=0).json()["choices"]
        assert len(choice["prompt_logprobs"]) == 512
        error(complete(tmp_path, prompt="x" * 513, max_tokens=0, prompt_logprobs=0), 400, "prompt")
        error(complete(tmp_path, prompt="x" * 512, max_tokens=1), 400, "prompt")
