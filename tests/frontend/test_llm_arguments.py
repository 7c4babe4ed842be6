"""What the offline engines take as arguments, at a scripted scheduler: vLLM's forms work, all else is refused by name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontend.llm import LLM, SamplingParams
from protocol.service import CannotRun
from tests.frontend.fakes import Engine, scheduler_in, text

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def run_dir() -> Iterator[Path]:
    """Where a scripted scheduler runs; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as path:
        with scheduler_in(Path(path), Engine()):
            yield Path(path)


@pytest.fixture(scope="module")
def llm(run_dir: Path) -> Iterator[LLM]:
    with LLM(run_dir=run_dir) as made:
        yield made


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ("ab", [("ab", [97, 98])]),
        ([97, 98], [(None, [97, 98])]),
        ({"prompt": "ab"}, [("ab", [97, 98])]),
        ({"prompt_token_ids": [97, 98]}, [(None, [97, 98])]),
        ({"prompt_token_ids": (97, 98), "prompt": "as it was"}, [("as it was", [97, 98])]),
        ({"prompt": "ab", "prompt_token_ids": None}, [("ab", [97, 98])]),
        ([{"prompt_token_ids": [97]}, {"prompt": "b"}, "c", [100]], [(None, [97]), ("b", [98]), ("c", [99]), (None, [100])]),
    ],
)
def test_a_prompt_is_a_text_token_ids_or_a_dictionary_of_either(llm, prompts, told):
    outputs = llm.generate(prompts, SHORT)
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == told
    assert [output.outputs[0].text for output in outputs] == [text(3)] * len(told)


@pytest.mark.parametrize(
    "wrong",
    [
        *(None, 5, 1.5, b"ab", {97, 98}, object()),
        *([None], [1.5], ["a", 5], [b"ab"]),
        *({}, {"prompt": None}, {"prompt": 5}, {"prompt_token_ids": "ab"}, {"prompt_token_ids": 5}, {"text": "ab"}),
        {"prompt": "ab", "multi_modal_data": {"image": 1}},
    ],
)
def test_what_is_no_prompt_is_refused_by_name(llm, wrong):
    with pytest.raises(ValueError, match=r"^prompts: "):
        llm.generate(wrong, SHORT)


@pytest.mark.parametrize("wrong", [5, "SamplingParams", {"max_tokens": 3}, [None], [{"max_tokens": 3}], [SHORT, SHORT]])
def test_what_are_no_sampling_parameters_is_refused_by_name(llm, wrong):
    with pytest.raises(ValueError, match=r"^sampling_params: "):
        llm.generate("x", wrong)


@pytest.mark.parametrize("wrong", [None, "hello", 5, {"role": "user", "content": "x"}])
def test_what_is_no_conversation_is_refused_by_name(llm, wrong):
    with pytest.raises(ValueError, match=r"^messages: "):
        llm.chat(wrong, SHORT)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["", "none"])
def test_a_run_directory_where_nothing_runs_is_said_at_once_and_none_is_made(tmp_path, name):
    folder = tmp_path / name
    with pytest.raises(CannotRun, match=f"^no service runs in {folder}$"):
        LLM(run_dir=folder)
    assert list(tmp_path.iterdir()) == []
