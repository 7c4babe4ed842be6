"""What the offline engines take as arguments, at a scripted scheduler: vLLM's forms work, all else is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import pagewire
from frontend import llm as offline_api
from frontend.llm import LLM, AsyncLLMEngine, CannotRun, LLMEngine, SamplingParams, StepOutput
from frontend.own_settings import SCHEDULER, TEXTS, WORKER, checked
from gpu_worker.settings import WorkerSettings
from protocol.flags import FLAGS
from protocol.options import settings_fields
from scheduler_svc.settings import SchedulerSettings
from tests.frontend.fakes import Engine, scheduler_in, text

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


@contextlib.contextmanager
def scheduler(interval: float = 0.002) -> Iterator[Path]:
    """The run directory of a scripted scheduler, which has one frontend at a time; its path is short enough for sockets.

    interval: seconds of a token.
    """
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as path, scheduler_in(Path(path), Engine(), interval):
        yield Path(path)


SLOW = 0.05  # seconds of a token, so that 400 tokens outlast a machine that stands still


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with scheduler() as run_dir, LLM(run_dir=run_dir) as made:
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
    with pytest.raises((TypeError, ValueError), match=r"^sampling_params: "):
        llm.generate("x", wrong)


@pytest.mark.parametrize("wrong", [None, "hello", 5, {"role": "user", "content": "x"}])
def test_what_is_no_conversation_is_refused_by_name(llm, wrong):
    with pytest.raises(ValueError, match=r"^messages: "):
        llm.chat(wrong, SHORT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["", "none"])
def test_a_run_directory_where_nothing_runs_is_said_at_once_and_none_is_made(tmp_path, name):
    folder = tmp_path / name
    with pytest.raises(CannotRun, match=f"^no service runs in {folder}$"):
        LLM(run_dir=folder)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with scheduler() as run_dir, LLMEngine(run_dir=run_dir) as made:
        yield made


def steps(engine: LLMEngine) -> list[StepOutput]:
    told = []
    while engine.has_unfinished_requests():
        told += engine.step()
    return told


@pytest.mark.parametrize("wrong", [("id", "a prompt", SHORT), ("a prompt", SHORT, 7), ("a prompt", {"max_tokens": 3}, "id")])
def test_arguments_in_another_order_are_refused_with_the_order(engine, wrong):
    with pytest.raises(TypeError, match=r"^(sampling_params|request_id): .*the order is prompt, sampling_params, request_id$"):
        engine.add_request(*wrong)
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("wrong", [None, 5, {}, SHORT])
def test_an_engine_refuses_what_is_no_prompt_by_name(engine, wrong):
    with pytest.raises(ValueError, match=r"^prompt: "):
        engine.add_request(wrong)
    assert not engine.has_unfinished_requests()


def test_an_engine_takes_dictionaries(engine):
    engine.add_request({"prompt_token_ids": [97]}, SHORT, "ids")
    assert "".join(step.text for step in steps(engine)) == text(3)


def test_an_aborted_request_ends_with_a_step_that_says_so_and_others_go_on():
    with scheduler(SLOW) as run_dir, LLMEngine(run_dir=run_dir) as engine:
        some_are_aborted(engine)


def some_are_aborted(engine: LLMEngine) -> None:
    endless = SamplingParams(max_tokens=400, ignore_eos=True, n=2)
    for name in ("a", "b", "c"):
        engine.add_request("x", endless, name)
    engine.add_request("x", SHORT, "goes on")
    engine.abort_request("a")
    engine.abort_request(["b", "c", "unknown"])
    told = steps(engine)
    for name in ("a", "b", "c"):
        mine = [step.finish_reason for step in told if step.request_id == name]
        assert mine[-1] == "abort"
        assert set(mine[:-1]) <= {None}
    assert [step.finish_reason for step in told if step.request_id == "goes on"][-1] == "length"
    assert engine._background.engine.client.journal.entries() == []
    engine.abort_request("a")  # harmless
    engine.add_request("x", SHORT, "a")
    assert [step.finish_reason for step in steps(engine)][-1] == "length"


def test_an_async_engine_names_a_request_as_it_is_told_to():
    async def ask(run_dir: Path) -> set[str]:
        async with AsyncLLMEngine(run_dir=run_dir) as engine:
            for wrong in (("id", "x", SHORT), ("x", SHORT, True)):
                with pytest.raises(TypeError, match="the order is prompt, sampling_params, request_id"):
                    await anext(engine.generate(*wrong))
            return {output.request_id async for output in engine.generate("x", SHORT, "mine")}

    with scheduler() as run_dir:
        assert asyncio.run(ask(run_dir)) == {"mine"}


@pytest.mark.filterwarnings("error")
def test_a_closed_engine_says_so():
    with scheduler(SLOW) as run_dir:
        llm = LLM(run_dir=run_dir)
        llm.close()
        engine = LLMEngine(run_dir=run_dir)
        engine.add_request("x", SamplingParams(max_tokens=400, ignore_eos=True))
        engine.close()
    assert steps(engine)[-1].finish_reason == "error"
    asked = (
        lambda: llm.generate("x", SHORT),
        lambda: llm.chat([{"role": "user", "content": "x"}], SHORT),
        lambda: engine.add_request("x", SHORT),
        lambda: engine.abort_request("x"),
        engine.step,
    )
    for ask in asked:
        with pytest.raises(RuntimeError, match=r"^the engine is not started, or closed$"):
            ask()
    gc.collect()  # a coroutine that was never awaited would warn


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("max_num_seqs", value) for value in (-1, 0, 65537, "8", 1.5, True)),
        *(("gpu_memory_utilization", value) for value in (-0.1, 1.5, math.nan, "much")),
        *(("tensor_parallel_size", 2), ("pipeline_parallel_size", 0), ("max_model_len", -1), ("step_time", -1.0)),
        *(("dtype", "float64"), ("policy", "lifo"), ("runner", "magic"), ("dtype", [])),
        *(("enforce_eager", "yes"), ("enable_prefix_caching", 1), ("served_model_name", 5)),
        *(("model", "/nope"), ("model", "nope"), ("model", "no/such.gguf"), ("model", 5)),
    ],
)
def test_a_wrong_setting_is_refused_by_name_before_anything_is_started(monkeypatch, name, wrong):
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("tempfile.mkdtemp", None)
    for made in (LLM, LLMEngine, AsyncLLMEngine):
        with pytest.raises(ValueError, match=f"^{name}: "):
            made(**{name: wrong})


def test_settings_that_can_be_are_taken_as_they_are_and_none_is_the_default(tmp_path):
    given = {"max_num_seqs": 8, "gpu_memory_utilization": 1, "tensor_parallel_size": 1, "enforce_eager": True, "model": tmp_path}
    assert checked({**given, "quantization": None, "max_model_len": None}) == given
    assert checked({"model": "owner/name"}) == {"model": "owner/name"}
    assert checked({"model": "a name", "runner": "oracle"}) == {"model": "a name", "runner": "oracle"}
    with pytest.raises(TypeError, match="no setting 'max_seqs'"):
        checked({"max_seqs": None})


def test_what_is_checked_as_a_text_a_switch_or_a_number_is_one():
    kinds = {f.name: f.type for settings in (SchedulerSettings, WorkerSettings) for f in settings_fields(settings)}
    numbers = {name: type(FLAGS[name].low) for name in (*WORKER, *SCHEDULER) if not FLAGS[name].choices and FLAGS[name].low is not None}
    assert numbers == {name: kinds[name] for name in numbers}
    texts = {name for name in (*WORKER, *SCHEDULER) if kinds[name] is str and not FLAGS[name].choices}
    assert texts == set(TEXTS)


def test_what_the_offline_api_takes_gives_and_raises_comes_from_pagewire():
    assert pagewire.__all__ == offline_api.__all__
    assert all(getattr(pagewire, name) is getattr(offline_api, name) for name in pagewire.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = pagewire.LLMs


@pytest.mark.parametrize(("terminal", "asked", "shown"), [(True, True, True), (True, False, False), (False, True, False)])
def test_progress_is_shown_on_a_terminal_unless_it_is_not_wanted(llm, monkeypatch, terminal, asked, shown):
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", written)
    llm.generate(["ab", "cd"], SHORT, use_tqdm=asked)
    lines = written.getvalue().replace("\r", "\n").split("\n")
    assert [line.split("] ")[1].split(" requests")[0] for line in lines if "requests" in line] == (["1/2", "2/2"] if shown else [])
    assert not shown or f"[{'#' * 30}] 2/2 requests" in lines[-2]
