"""`pagewire chat`: a conversation, in a terminal and through a pipe, with a server whose answers are known."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner

from pagewire.chat import ChatError, Conversation
from pagewire.cli import main
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


PIECE = b'data: {"choices": [{"delta": {"content": "w"}}]}\n\n'


@contextlib.contextmanager
def answering(content: bytes) -> Iterator[str]:
    """The URL of a server that answers every POST with these bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (b'{"error": "boom"}', "^boom$"),
        (b"[]", "no event of a chat completion"),
        (b'{"choices": [{}]}', "no event of a chat completion"),
        (b'{"choices": 1}', "no event of a chat completion"),
        (b'{"usage": {"total_tokens": 1}}', "no event of a chat completion"),
        (b"{", "Expecting property name"),
    ],
)
def test_an_event_of_another_kind_is_a_failed_answer(event: bytes, words: str) -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + PIECE + b"data: " + event + b"\n\n") as url:
        talk = Conversation(url)
        with pytest.raises(ChatError, match=words):
            list(talk.ask("hello"))
    assert talk.messages == []


def test_a_refusal_that_breaks_off_is_told_by_its_status() -> None:
    with answering(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 99\r\n\r\n<html>") as url, pytest.raises(ChatError, match="status 502"):
        list(Conversation(url).ask("hello"))


@pytest.mark.slow
def test_through_a_pipe_a_failed_answer_shows_in_the_exit_code_and_begins_no_line_in_the_middle() -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + PIECE) as url:
        command = [sys.executable, "-P", "-m", "pagewire", "chat", "--url", url, "--model", "m"]
        done = subprocess.run(command, input="one\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "w\n")
    assert done.stderr == "the server closed the stream before its end\n"


@pytest.mark.parametrize(("wish", "coloured"), [("", True), ("1", False)])
def test_who_wants_no_colour_gets_none(wish: str, coloured: bool) -> None:
    with scripted_server(Script(status=503)) as url:
        said = (
            CliRunner()
            .invoke(main, ["chat", "--url", url, "--max-tokens", "2"], input="hello\n", color=True, env={"NO_COLOR": wish})
            .output
        )
    assert ("\x1b[31m" in said) == coloured
    assert "scripted" in said


@pytest.mark.slow
def test_what_a_terminal_s_encoding_lacks_is_replaced() -> None:
    answer = b'data: {"choices": [{"delta": {"content": "\\u4e2d!"}}]}\n\ndata: [DONE]\n\n'
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + answer) as url:
        command = [sys.executable, "-P", "-m", "pagewire", "chat", "--url", url, "--model", "m"]
        env = os.environ | {"PYTHONIOENCODING": "latin-1"}
        done = subprocess.run(command, input=b"h\xc3\xa9\n", capture_output=True, timeout=60, check=False, env=env)
        assert (done.returncode, done.stdout) == (0, b"?!\n"), done.stderr
        env = os.environ | {"PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, input=b"h\xff\n", capture_output=True, timeout=60, check=False, env=env)
        assert (done.returncode, done.stdout.decode()) == (0, "\u4e2d!\n"), done.stderr
