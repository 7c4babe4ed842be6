"""The offline API over real services with the oracle runner: outputs, steps, streams, and a clean end."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from frontend.llm import LLM, AsyncLLMEngine, LLMEngine, RequestFailed, SamplingParams, ServiceDied, StepOutput
from frontend.offline import prepare
from gpu_worker.oracle import expected_prompt_logprobs
from tests.e2e.stack import eventually, is_over, oracle_texts, stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
# A program started in a shell's background ignores SIGINT, and hands that down.
PROGRAM = """
import signal, time
from pagewire import LLM
signal.signal(signal.SIGINT, signal.default_int_handler)
llm = LLM(runner="oracle")
print("up", flush=True)
time.sleep(600)
"""


UNCLOSED = """
from pagewire import LLM, SamplingParams
llm = LLM(runner="oracle")
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)
print(llm._background.engine._own.run_dir)
"""


def owed(prompt: str, **fields: object) -> list[tuple[str, str]]:
    return [(text, reason) for text, reason, _ in oracle_texts({"prompt": prompt, **fields})]


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if not is_over(p)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[set[int]]:
    """What ran before the test, by pid; nothing more may run behind it."""
    before = {p.pid for p in children()}
    yield before
    eventually(lambda: {p.pid for p in children()} <= before)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(runner="oracle", max_num_seqs=8) as made:
        yield made


def test_every_prompt_gets_its_own_output_in_order(llm):
    prompts = [f"prompt {i}" for i in range(20)]
    outputs = llm.generate(prompts, [SamplingParams(max_tokens=30 + i, seed=i, ignore_eos=True) for i in range(20)])
    assert [output.prompt for output in outputs] == prompts
    for i, output in enumerate(outputs):
        [(text, reason)] = owed(prompts[i], max_tokens=30 + i, seed=i, ignore_eos=True)
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == (text, reason)
        assert len(output.outputs[0].token_ids) == 30 + i


def test_n_outputs_are_the_servers(llm):
    [output] = llm.generate("several", SamplingParams(max_tokens=12, seed=3, n=3))
    assert [(one.text, one.finish_reason) for one in output.outputs] == owed("several", max_tokens=12, seed=3, n=3)


def test_best_of_shows_the_best_by_cumulative_logprob(llm):
    params = SamplingParams(max_tokens=10, seed=5, n=4, logprobs=0, ignore_eos=True)
    [every] = llm.generate("best", params)
    sums = {one.text: sum(item.values[0] for item in one.logprobs) for one in every.outputs}
    [best] = llm.generate("best", SamplingParams(max_tokens=10, seed=5, n=2, best_of=4, ignore_eos=True))
    assert [one.text for one in best.outputs] == sorted(sums, key=lambda text: sums[text], reverse=True)[:2]
    assert len(set(sums.values())) > 1


def test_token_ids_are_a_prompt_too(llm):
    params = SamplingParams(max_tokens=9, seed=1)
    [by_text], [by_ids] = llm.generate("hi", params), llm.generate([104, 105], params)
    assert by_text.outputs[0].text == by_ids.outputs[0].text


@pytest.mark.parametrize("wrong", [258, -1, 2**31, 2**32])
def test_ids_that_are_no_tokens_are_refused(llm, wrong):
    with pytest.raises(ValueError, match=f"^prompt: {wrong} is no token of this model"):
        llm.generate([104, wrong, 105])
    with pytest.raises(ValueError, match=r"^prompt: a token id is an integer"):
        llm.generate([104, 1.5])


def test_one_prompt_that_cannot_be_asked_takes_back_those_before_it(llm):
    client = llm._background.engine.client
    with pytest.raises(ValueError, match="prompt: 999 is no token"):
        llm.generate([[104]] * 40 + [[999]], SamplingParams(max_tokens=2000, ignore_eos=True))
    assert client.journal.entries() == []
    assert len(llm.generate([[104]] * 40, SamplingParams(max_tokens=3, ignore_eos=True))) == 40


def test_an_output_that_has_ended_is_forgotten_while_others_go_on(llm):
    engine = llm._background.engine
    lengths, kept = (3, 300), []

    async def follow():
        def make(i):
            return prepare(engine.model(), [104], SamplingParams(max_tokens=lengths[i], ignore_eos=True), False)

        async for _, output in engine.outputs(engine.prepared(make, 2)):
            assert output.finished
            kept.append(len(engine.client.journal.entries()))

    llm._background.run(follow())
    assert kept == [2, 1]
    assert engine.client.journal.entries() == []


def test_an_output_names_its_prompts_ids_as_they_were(llm):
    ids = [104, 105]
    [output] = llm.generate(ids, SamplingParams(max_tokens=3))
    ids.append(106)
    assert output.prompt_token_ids == [104, 105]


def test_a_conversation_is_rendered_by_the_models_template(llm):
    [output] = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=9, seed=1))
    prompt = bytes(output.prompt_token_ids).decode()
    assert prompt.startswith("user: hi")
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == owed(prompt, max_tokens=9, seed=1)[0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"top_p": 2.0}, "top_p"),
        ({"max_tokens": 100_000}, "context"),
        ({"n": 0}, "n: "),
        ({"stop": [""]}, "stop"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"logit_bias": {999: 1.0}}, "logit_bias"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(llm, wrong, says):
    with pytest.raises(ValueError, match=says):
        llm.generate("x", SamplingParams(**wrong))


def test_a_prompts_log_probabilities_come_with_or_without_an_output(llm):
    for max_tokens in (0, 5):
        [output] = llm.generate("score me", SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True, prompt_logprobs=2))
        first, *told = output.prompt_logprobs
        assert first is None
        pairs = [list(zip(one.ids, one.values, strict=True)) for one in told]
        assert pairs == expected_prompt_logprobs(output.prompt_token_ids, 2)
        assert len(output.outputs[0].token_ids) == max_tokens
    assert llm.generate("not me", SamplingParams(max_tokens=1))[0].prompt_logprobs is None


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == []


def test_the_steps_of_an_engine_add_up_to_the_outputs():
    with LLMEngine(runner="oracle") as engine:
        ids = [engine.add_request(f"step {i}", SamplingParams(max_tokens=15, seed=i), f"r{i}" if i else None) for i in range(4)]
        assert ids == ["request-0", "r1", "r2", "r3"]
        with pytest.raises(ValueError, match="in use"):
            engine.add_request("again", request_id="r1")
        for field in ("logprobs", "prompt_logprobs"):
            with pytest.raises(ValueError, match=f"^{field}: "):
                engine.add_request("refused", SamplingParams(**{field: 1}))
        texts, tokens, reasons = dict.fromkeys(ids, ""), dict.fromkeys(ids, 0), {}
        while engine.has_unfinished_requests():
            for step in engine.step():
                assert step.request_id not in reasons, "a step behind the end"
                texts[step.request_id] += step.text
                tokens[step.request_id] += len(step.tokens)
                if step.finish_reason:
                    reasons[step.request_id] = step.finish_reason
        assert engine.step() == []
        for i, id in enumerate(ids):
            assert [(texts[id], reasons[id])] == owed(f"step {i}", max_tokens=15, seed=i)


def test_an_async_engine_streams_and_joins_a_running_stack():
    async def ask(run_dir: Path) -> list[str]:
        async with AsyncLLMEngine(run_dir=run_dir) as engine:
            seen = [o.outputs[0].text async for o in engine.generate("join", SamplingParams(max_tokens=20, seed=2, ignore_eos=True))]
            async for _ in engine.generate("left", SamplingParams(max_tokens=4000, ignore_eos=True)):
                break  # aborted by leaving
            return seen

    with stack() as made:
        made.up("--runner", "oracle", env={"PAGEWIRE_ORACLE_STEP_TIME": "0.02"})
        seen = asyncio.run(ask(made.run_dir))
        assert len(seen) > 3
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
        assert seen[-1] == owed("join", max_tokens=20, seed=2, ignore_eos=True)[0][0]
        assert made.service("worker").pid, "the services that were joined go on"


def test_closing_an_engine_ends_a_step_that_waits():
    engine = LLMEngine(runner="oracle", step_time=0.05)
    engine.add_request("long", SamplingParams(max_tokens=2000, ignore_eos=True))
    engine.step()
    told: list[StepOutput] = []

    def steps() -> None:
        while engine.has_unfinished_requests():
            told.extend(engine.step())

    thread = threading.Thread(target=steps, daemon=True)
    thread.start()
    engine.close()
    thread.join(60)
    assert not thread.is_alive()
    assert (told[-1].finish_reason, told[-1].text) == ("error", "the engine was closed")


def test_a_program_that_closes_nothing_ends_without_a_word_and_leaves_nothing():
    done = subprocess.run([sys.executable, "-c", UNCLOSED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(done.stdout.strip()).exists()


def test_a_setting_that_no_service_has_is_a_type_error():
    with pytest.raises(TypeError, match="max_seqs"):
        LLM(runner="oracle", max_seqs=3)


def test_a_worker_that_cannot_start_is_told_with_its_last_words(tmp_path):
    with pytest.raises(ServiceDied, match=r"worker-0 ended .*config\.json"):
        LLM(str(tmp_path))


def test_a_worker_that_dies_ends_the_call_with_an_error(nothing_is_left):
    with LLM(runner="oracle", step_time=0.0) as llm:
        worker = next(p for p in children() if p.pid not in nothing_is_left and "gpu_worker" in " ".join(p.cmdline()))
        worker.send_signal(signal.SIGKILL)
        worker.wait(60)
        with pytest.raises((ServiceDied, RequestFailed)) as raised:
            llm.generate("x", SamplingParams(max_tokens=4))
        assert raised.value.__context__ is None or raised.value.__suppress_context__, "one error is told, not three"


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_services_end_with_their_program_however_it_ends(sig):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, env=os.environ
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    services = psutil.Process(program.pid).children(recursive=True)
    assert len(services) == 3  # a scheduler, a worker, the guardian
    command = next(words for words in (p.cmdline() for p in services) if "gpu_worker" in words)
    run_dir = Path(command[command.index("--run-dir") + 1])
    assert run_dir.is_dir()
    program.send_signal(sig)
    program.wait(60)
    program.stdout.close()
    eventually(lambda: all(is_over(p) for p in services))
    assert not run_dir.exists()
