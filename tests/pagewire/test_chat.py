"""`pagewire chat`: a conversation, in a terminal and through a pipe, with a server whose answers are known."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pagewire.chat import ChatError, Conversation
from tests.pagewire.scripted_server import Script, scripted_server
from tests.pagewire.terminals import terminal


def test_each_question_carries_what_was_said_before() -> None:
    script = Script(wait=0, gap=0)
    with scripted_server(script) as url:
        talk = Conversation(url, system="be short", options={"max_tokens": 2})
        assert "".join(talk.ask("one")) == "w0 w1 "
        assert talk.tokens == 2
        list(talk.ask("two"))
        talk.restart()
        list(talk.ask("three"))
    said = [[(m["role"], m["content"]) for m in body["messages"]] for body in script.asked]
    system, answer = ("system", "be short"), ("assistant", "w0 w1 ")
    assert said == [
        [system, ("user", "one")],
        [system, ("user", "one"), answer, ("user", "two")],
        [system, ("user", "three")],
    ]


def test_an_answer_that_is_stopped_counts_as_far_as_it_came() -> None:
    with scripted_server(Script(wait=0, gap=0.01)) as url:
        talk = Conversation(url, options={"max_tokens": 100})
        pieces = talk.ask("go on")
        next(pieces)
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    assert talk.messages == [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "w0 w1 "}]


@pytest.mark.parametrize(
    ("script", "words"), [(Script(status=404), "scripted"), (Script(break_off=True, wait=0), "closed the stream|IncompleteRead")]
)
def test_a_failed_answer_leaves_the_conversation_as_it_was(script: Script, words: str) -> None:
    with scripted_server(script) as url:
        talk = Conversation(url, options={"max_tokens": 9})
        with pytest.raises(ChatError, match=words):
            list(talk.ask("hello"))
    assert talk.messages == []


@pytest.mark.slow
def test_in_a_terminal_one_talks_stops_an_answer_and_leaves() -> None:
    script = Script(wait=0.01, gap=0.3)  # two minutes
    with scripted_server(script) as url, terminal("chat", "--url", url, "--max-tokens", "400", "--stats") as chat:
        chat.read("scripted at .*> ")
        chat.type("hello\n")
        chat.read(r"w0 w1 w2 ")
        chat.type("\x03")
        chat.read(r"\(stopped\).*> ")
        script.gap = 0.001
        chat.type("/help\n")
        chat.read("/new forgets.*> ")
        chat.type("\x03")
        chat.read("> ")
        chat.type("again\n")
        chat.read(r"w399 .*400 tokens in .* tok/s.*> ")
        chat.type("\x04")
        assert chat.wait() == 0
    assert [len(body["messages"]) for body in script.asked] == [1, 3]
    assert all(body["model"] == "scripted" for body in script.asked)


@pytest.mark.slow
def test_through_a_pipe_only_answers_are_printed() -> None:
    with scripted_server(Script(wait=0, gap=0)) as url:
        command = [sys.executable, "-P", "-m", "pagewire", "chat", "--url", url, "--max-tokens", "2"]
        done = subprocess.run(command, input="one\ntwo\n/quit\nthree\n", capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "w0 w1 \nw0 w1 \n"


@pytest.mark.slow
def test_without_a_server_it_says_so_in_one_line() -> None:
    command = [sys.executable, "-P", "-m", "pagewire", "chat", "--url", "http://127.0.0.1:1"]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: cannot reach http://127.0.0.1:1")
    assert done.stderr.count("\n") == 1
