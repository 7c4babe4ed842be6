"""Stop strings: found wherever tokens cut them, and nothing shown that may turn out to belong to one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from frontend.detokenizer import TextStream
from frontend.stops import StopMatcher
from frontend.tokenizer import Tokenizer
from protocol.tokenizer_files import byte_bundle

LETTERS = st.text("ab", max_size=24)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def of_bytes() -> Tokenizer:
    return Tokenizer.from_bundle(byte_bundle())


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The rule by brute force: text in front of the first stop to be complete, and that stop (the longest that ends there)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def longest_beginning(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` may begin a stop string."""
    return max(n for n in range(len(text) + 1) if n == 0 or any(stop.startswith(text[-n:]) for stop in stops))


def cut(text: str, places: list[int]) -> list[str]:
    marks = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(marks)]


def test_text_is_shown_as_it_comes_where_no_stop_begins() -> None:
    matcher = StopMatcher(["###", "\n\n"])
    assert [matcher.push(piece) for piece in ("one", " # ", "two\n", "three")] == ["one", " # ", "two", "\nthree"]


def test_a_stop_is_found_across_pieces() -> None:
    matcher = StopMatcher(["User:"])
    assert [matcher.push(piece) for piece in ("Hi U", "s", "er", ": and more", "x")] == ["Hi ", "", "", "", ""]
    assert matcher.stop == "User:"
    assert matcher.flush() == ""


def test_what_only_looked_like_a_stop_is_given_back() -> None:
    matcher = StopMatcher(["User:"])
    assert [matcher.push("x Use"), matcher.push("ful"), matcher.push(" U"), matcher.flush()] == ["x ", "Useful", " ", "U"]
    assert matcher.stop is None


def test_the_stop_that_is_complete_first_wins() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("xabcd") == "xa"
    assert matcher.stop == "bc"


def test_of_two_that_end_together_the_longer_wins() -> None:
    matcher = StopMatcher(["c", "abc", "bc"])
    assert matcher.push("xabc") == "x"
    assert matcher.stop == "abc"


def test_an_overlap_of_the_stop_with_itself_is_not_missed() -> None:
    matcher = StopMatcher(["aab"])
    assert "".join(matcher.push(c) for c in "aaab") == "a"
    assert matcher.stop == "aab"


def test_characters_with_a_meaning_in_patterns_are_plain() -> None:
    for stop in ("]", "^", "-", "\\", "[a", ".", "a-z"):
        matcher = StopMatcher([stop, "^]"])
        assert matcher.push(f"q{stop}") == "q"
        assert matcher.stop == stop


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopMatcher(["a", ""])


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=8))
@example("aab", ["ab", "b"], [])
def test_the_result_depends_on_the_text_alone(text: str, stops: list[str], places: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in cut(text, places)) + matcher.flush()
    assert (shown, matcher.stop) == first_stop(text, stops)


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_exactly_what_may_begin_a_stop_is_kept_back(text: str, stops: list[str], places: list[int]) -> None:
    matcher, came, shown = StopMatcher(stops), "", ""
    for piece in cut(text, places):
        came, shown = came + piece, shown + matcher.push(piece)
        if matcher.stop is not None:
            return
        assert len(came) - len(shown) == longest_beginning(came, stops)


def test_the_stream_cuts_in_front_of_the_stop_or_behind_it(of_bytes: Tokenizer) -> None:
    for include, text in ((False, "one "), (True, "one ENDE")):
        stream = TextStream(of_bytes, ["ENDE"], include_stop=include)
        shown = "".join(stream.push(byte) for byte in b"one ENDE and more") + stream.flush()
        assert shown == text
        assert stream.stop == "ENDE"
        assert stream.text_length == len(text)


def test_a_stop_inside_multibyte_characters_is_found_when_its_last_byte_comes(of_bytes: Tokenizer) -> None:
    stream = TextStream(of_bytes, ["漢字"])
    data = "x漢字".encode()
    assert [stream.push(byte) for byte in data[:-1]] == ["x", *[""] * 5]
    assert stream.stop is None
    assert stream.push(data[-1]) == ""
    assert stream.stop == "漢字"


def test_the_end_gives_back_what_was_kept(of_bytes: Tokenizer) -> None:
    stream = TextStream(of_bytes, ["stop"])
    assert "".join(stream.push(byte) for byte in b"one sto") == "one "
    assert stream.flush() == "sto"
    assert stream.text_length == 7


def test_a_stop_may_be_completed_by_the_end(of_bytes: Tokenizer) -> None:
    stream = TextStream(of_bytes, ["\ufffd"])
    assert "".join(stream.push(byte) for byte in b"a\xc3") + stream.flush() == "a"
    assert stream.stop == "\ufffd"


def test_no_stop_is_looked_for_before_the_minimum_of_tokens(of_bytes: Tokenizer) -> None:
    stream = TextStream(of_bytes, ["b"], min_tokens=3)
    assert [stream.push(byte) for byte in b"abcabc"] == ["a", "b", "c", "a", "", ""]
    assert stream.stop == "b"
