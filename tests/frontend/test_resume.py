"""Event ids say where a client stands, and a stream goes on from there: chats and completions, one choice or several."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from frontend.api.answers import Answer, Form
from frontend.api.chat_answer import ChatAnswer
from frontend.api.completion_answer import CompletionAnswer
from frontend.entries import Entry
from frontend.errors import ApiError
from frontend.journal import Journal
from frontend.resume import Header, Position, TextOptions, parse_event_id, read_header, revive, with_headers
from frontend.streams import Stream
from frontend.tokenizer import Tokenizer
from protocol.columns import pack, pack_floats
from protocol.counters import Counters
from protocol.messages import Choice as WireChoice
from protocol.messages import Journal as JournalMessage
from protocol.messages import PromptScores, SamplingParams, Scores, Submit, Welcome
from protocol.times import Times
from protocol.tokenizer_files import byte_bundle

TOKENIZER = Tokenizer.from_bundle(byte_bundle())
REQUEST = bytes(range(16))
NAME = REQUEST.hex()
TEXT = TextOptions(["XY"], False, True, True, 0)
HEADER = Header("chat", 0, "m", 1, False, False, False, "", TEXT)


def submit(texts: list[str], limit: int = 100) -> Submit:
    choices = [WireChoice(i, i, pack(list(text.encode()))) for i, text in enumerate(texts)]
    return Submit(
        REQUEST, 0, "m", pack([65]), SamplingParams(limit), choices, owner=1, admitted=True, header=msgspec.msgpack.encode(HEADER)
    )


def attached(texts: list[str], limit: int = 100) -> Entry:
    """What a frontend makes of the answer to its ATTACH."""
    journal = Journal(1, Times(), Counters(), lambda told: revive(told, TOKENIZER))
    journal.opened(Welcome(1, 1, 1, bytes(16)), 0.0)
    entry = journal.attach(REQUEST, 0.0)
    journal.message(JournalMessage(submit(texts, limit)), 0.0)
    return entry


def rest(kind: type[Answer], texts: list[str], last_id: str, limit: int = 100) -> str:
    """The events that a client gets which comes back with an id."""
    stream = Stream([attached(texts, limit)], lambda stream: None, 0.0)
    answer = kind(stream, TOKENIZER, Form("m", 1))
    answer.resume(parse_event_id(last_id))
    out: list[bytes] = []
    answer.entry_events(stream.entries[0], out)
    return b"".join(out).decode()


@pytest.mark.parametrize("kind", [ChatAnswer, CompletionAnswer])
class TestTheRest:
    def test_begins_behind_the_last_character_told(self, kind):
        events = rest(kind, ["hello world"], f"{NAME}:0:5:5")
        assert '" world"' in events
        assert "hello" not in events
        assert "assistant" not in events
        assert f"id: {NAME}:0:11:11\n" in events

    def test_of_a_text_with_half_a_stop_string_keeps_it_back(self, kind):
        assert '"lo"' in rest(kind, ["helloX"], f"{NAME}:0:3:3")
        events = rest(kind, ["helloXY and more"], f"{NAME}:0:6:5")
        assert '"finish_reason":"stop"' in events
        assert "more" not in events

    def test_tells_an_end_once(self, kind):
        events = rest(kind, ["hello"], f"{NAME}:0:5:5", limit=5)
        assert events.count('"finish_reason":"length"') == 1
        assert f"id: {NAME}:0:6:5\n" in events
        assert rest(kind, ["hello"], f"{NAME}:0:6:5", limit=5) == ""

    def test_of_two_choices_follows_both_positions(self, kind):
        events = rest(kind, ["hello", "there"], f"{NAME}:1:2:2,{NAME}:0:4:4")
        assert '"o"' in events
        assert '"ere"' in events
        assert f"id: {NAME}:1:5:5,{NAME}:0:5:5\n" in events

    def test_of_a_choice_that_was_not_begun_is_all_of_it(self, kind):
        assert '"there"' in rest(kind, ["hello", "there"], f"{NAME}:0:5:5")

    @pytest.mark.parametrize("position", ["0:6:5", "0:5:6", "1:0:0"])
    def test_from_beyond_the_stream_is_refused(self, kind, position):
        with pytest.raises(ApiError, match="not come so far"):
            rest(kind, ["hello"], f"{NAME}:{position}")


def test_an_id_is_read_back():
    other = "ff" * 16
    assert parse_event_id(f"{NAME}:1:2:3,{NAME}:0:4:5,{other}") == {
        REQUEST: {1: Position(2, 3), 0: Position(4, 5)},
        bytes.fromhex(other): {},
    }


@pytest.mark.parametrize(
    "text", ["", "x", NAME[:-1], f"{NAME}:", f"{NAME}:1:2", f"{NAME}:-1:2:3", f"{NAME}:0:1:2,", ",".join([NAME] * 33), "é" * 32]
)
def test_what_is_no_id_of_ours_is_refused_by_name(text):
    with pytest.raises(ApiError) as caught:
        parse_event_id(text)
    assert (caught.value.status, caught.value.param) == (400, "Last-Event-ID")


def test_a_header_of_another_kind_is_no_header():
    for data in (b"", b"\xc1", b"\x91\x01"):
        with pytest.raises(LookupError):
            read_header(data)


def test_a_request_that_cannot_be_revived_is_gone():
    journal = Journal(1, Times(), Counters(), lambda told: revive(told, TOKENIZER))
    journal.opened(Welcome(1, 1, 1, bytes(16)), 0.0)
    entry = journal.attach(REQUEST, 0.0)
    journal.message(JournalMessage(replace(submit(["x"]), header=b"")), 0.0)
    assert entry.error is not None
    assert (entry.error.status, entry.error.code) == (404, "stream_gone")


def test_each_prompt_of_a_stream_knows_where_its_choices_begin():
    entry = attached(["a", "b"])
    made = with_headers([entry.new, entry.new], HEADER, ["one", "two"])
    headers = [read_header(new.header) for new in made]
    assert [(header.first, header.echo) for header in headers] == [(0, "one"), (2, "two")]


def test_an_echo_without_text_still_tells_its_log_probabilities():
    params = SamplingParams(0, prompt_logprobs=0)
    asked = replace(submit([""], limit=0), prompt=pack([65, 66]), params=params)
    journal = Journal(1, Times(), Counters(), lambda told: revive(told, TOKENIZER))
    journal.opened(Welcome(1, 1, 1, bytes(16)), 0.0)
    entry = journal.attach(REQUEST, 0.0)
    journal.message(JournalMessage(asked), 0.0)
    journal.message(PromptScores(entry.handle, Scores(1, pack([66]), pack_floats([-0.5]), pack([1]))), 0.0)
    answer = CompletionAnswer(
        Stream([entry], lambda stream: None, 0.0), TOKENIZER, Form("m", 1, logprobs=True, echo_logprobs=0, echoes=[""])
    )
    out: list[bytes] = []
    answer.entry_events(entry, out)
    assert b"".join(out).decode().count('"token_logprobs":[null,-0.5]') == 1


def test_an_alternative_that_reads_like_the_token_does_not_hide_its_value():
    asked = replace(submit([""], limit=0), prompt=pack([65, 200]), params=SamplingParams(0, prompt_logprobs=1))
    journal = Journal(1, Times(), Counters(), lambda told: revive(told, TOKENIZER))
    journal.opened(Welcome(1, 1, 1, bytes(16)), 0.0)
    entry = journal.attach(REQUEST, 0.0)
    journal.message(JournalMessage(asked), 0.0)
    journal.message(PromptScores(entry.handle, Scores(1, pack([200, 201]), pack_floats([-0.5, -2.0]), pack([1]))), 0.0)
    answer = CompletionAnswer(
        Stream([entry], lambda stream: None, 0.0), TOKENIZER, Form("m", 1, logprobs=True, echo_logprobs=1, echoes=["A\ufffd"])
    )
    [choice] = map(msgspec.json.decode, answer.whole()["choices"])
    assert choice["logprobs"]["top_logprobs"] == [None, {"\ufffd": -0.5}]


def test_an_echo_with_log_probabilities_is_told_to_whom_it_was_not_told():
    asked = replace(
        submit(["", ""], limit=0),
        prompt=pack([65, 66]),
        params=SamplingParams(0, prompt_logprobs=0),
        header=msgspec.msgpack.encode(replace(HEADER, kind="completion", echo="AB", logprobs=True, echo_logprobs=0)),
    )
    journal = Journal(1, Times(), Counters(), lambda told: revive(told, TOKENIZER))
    journal.opened(Welcome(1, 1, 1, bytes(16)), 0.0)
    entry = journal.attach(REQUEST, 0.0)
    journal.message(JournalMessage(asked), 0.0)
    header = read_header(entry.new.header)
    form = Form("m", 1, logprobs=True, echo_logprobs=header.echo_logprobs, echoes=[header.echo])
    answer = CompletionAnswer(Stream([entry], lambda stream: None, 0.0), TOKENIZER, form)
    answer.resume(parse_event_id(f"{NAME}:0:1:0"))
    out: list[bytes] = []
    answer.entry_events(entry, out)
    assert not out, "the prompt's log probabilities come first"
    journal.message(PromptScores(entry.handle, Scores(1, pack([66]), pack_floats([-0.5]), pack([1]))), 0.0)
    answer.entry_events(entry, out)
    events = b"".join(out).decode()
    assert events.count('"token_logprobs":[null,-0.5]') == 1
    assert '"index":1' in events
    assert '"index":0' not in events
