"""A steady decode step costs the same few calls, however many sequences decode."""

from __future__ import annotations

import gc
import sys
from collections import Counter

from protocol.codec import decode, encode
from protocol.columns import pack
from protocol.messages import Message, Plan, Result, Tokens
from tests.scheduler_svc.play import Stage


def calls_per_step(sequences: int) -> tuple[int, list[type[Message]]]:
    """Calls, Python's and C's, of taking a result and making a plan while nobody crosses a block boundary."""
    stage = Stage(max_num_seqs=sequences)
    worker = stage.worker(slots=sequences, block_size=64, blocks=sequences * 2, max_step_tokens=4096)
    frontend = stage.frontend()
    for i in range(sequences):
        frontend.submit([1 + i % 60, 2, 3], stage.now, max_tokens=60, stop=False)
    for _ in range(sequences // 64 + 8):
        stage.turn()
    assert stage.engine.stats()["requests_running"] == sequences
    stage.plan()
    plan = worker.plans.popleft()
    result = encode(Result(plan.step, pack([1] * sequences), pack([3] * sequences), bytes(sequences)))
    seen: Counter[str] = Counter()
    gc.disable()  # others' callbacks on a collection would be counted
    sys.setprofile(lambda frame, event, argument: seen.update([event]))
    message = decode(result)
    message.check(worker.geometry)
    stage.engine.worker_message(worker.session, message, stage.now)
    stage.engine.schedule(stage.now)
    frames = [encode(message) for _, message, _ in stage.engine.out]
    sys.setprofile(None)
    gc.enable()
    assert len(frames) == 2
    return seen["call"] + seen["c_call"], [type(message) for _, message, _ in stage.engine.out]


def test_the_number_of_calls_does_not_depend_on_the_number_of_sequences() -> None:
    few, kinds = calls_per_step(8)
    many, _ = calls_per_step(200)
    assert kinds == [Tokens, Plan]
    assert few == many < 400
