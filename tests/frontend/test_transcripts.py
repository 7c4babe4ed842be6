"""Every stream is, byte for byte, the golden transcript of `tests/data/sse`, and keeps the rules of the wire."""

from __future__ import annotations

import json

import pytest

from tests.frontend.transcripts import CASES, FOLDER, transcript


@pytest.mark.parametrize("name", CASES)
def test_a_stream_is_its_golden_transcript(name: str) -> None:
    assert transcript(name) == (FOLDER / f"{name}.txt").read_text()


def test_every_transcript_has_its_case() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_golden_transcripts_keep_the_rules_of_the_wire(name: str) -> None:
    head, _, events = (FOLDER / f"{name}.txt").read_text().split("\n\n", 2)
    data = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert data.count("[DONE]") == 1
    chunks = [json.loads(item) for item in data[:-1]]
    asked = json.loads(head.split("\n", 1)[1])
    if "error" in chunks[-1]:
        assert name == "completion-error"
        assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
        return
    if asked.get("stream_options"):
        usage = chunks.pop()
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
        assert all("usage" in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    for index in {choice["index"] for choice in choices}:
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] is not None for choice in mine] == [False] * (len(mine) - 1) + [True]
        if head.startswith("POST /v1/chat"):
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert all("role" not in choice["delta"] for choice in mine[1:])
