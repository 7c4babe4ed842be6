"""The scheduler's engine over the real model with too few blocks: sequences are preempted, tokens stay transformers'.

Engine and worker are joined by encoded messages, without sockets, so that seeds are the golden file's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocol.codec import decode, encode
from protocol.columns import pack, unpack
from protocol.counters import Counters
from protocol.messages import Choice, Hello, Message, Plan, Resumed, SamplingParams, Submit, Tokens
from scheduler_svc.engine import Engine
from scheduler_svc.settings import SchedulerSettings
from tests.gpu_worker.model_driver import load_packaged
from tests.gpu_worker.test_model_golden import GOLDEN

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]

FRONTEND, WORKER = 1, 2
BLOCKS = 60  # of 16 tokens; 36 sequences of some 75 to 130 tokens would need about 220


def over_the_wire(message: Message) -> Message:
    """What arrives after encoding, decoding and checking."""
    arrived = decode(encode(message))
    arrived.check(None) if not isinstance(arrived, Plan) else None
    return arrived


def test_golden_tokens_survive_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler_svc.admission.BEYOND", 1)  # it expects no more of a sequence than it has seen of others
    model = load_packaged("float32", num_gpu_blocks=BLOCKS, max_model_len=512)
    core = model.open()
    counters = Counters()
    engine = Engine(SchedulerSettings(Path("/nonexistent"), max_num_batched_tokens=512), counters, lambda session: 0)
    engine.hash_key = b"k" * 16
    engine.worker_opened(WORKER, Hello("worker", "w", 1, 1), 0.0)
    core.welcome(engine.hash_key)
    engine.worker_message(WORKER, over_the_wire(core.ready()), 0.0)
    engine.frontend_opened(FRONTEND, "f", 1, 0.0)
    engine.frontend_message(FRONTEND, Resumed(0), 0.0)

    entries: list[dict[str, Any]] = GOLDEN["greedy"] + GOLDEN["sampled"]
    # Answers have been short lately: it admits more than will fit.
    next(iter(engine.models.values())).outputs.add(1)
    for i, entry in enumerate(entries):
        params = SamplingParams(max_tokens=len(entry["tokens"]), temperature=entry.get("temperature", 0.0))
        submit = Submit(
            i.to_bytes(16, "little"), i, model.description.model, pack(entry["prompt"]), params, [Choice(0, entry.get("seed", 0))]
        )
        engine.frontend_message(FRONTEND, over_the_wire(submit), 0.0)

    streams: list[list[int]] = [[] for _ in entries]
    now = 0.0
    while any(len(stream) < len(entry["tokens"]) for stream, entry in zip(streams, entries, strict=True)):
        now += 0.01
        assert now < 60, "nothing moves any more"
        engine.tick(now)
        engine.schedule(now)
        results = []
        while engine.out:
            session, message, _ = engine.out.popleft()
            if isinstance(message, Plan):
                results.append(model.step(core, over_the_wire(message)))  # type: ignore[arg-type]
            elif isinstance(message, Tokens) and session == FRONTEND:
                at = 0
                for handle, first, count in zip(
                    *(unpack(c).tolist() for c in (message.handles, message.firsts, message.counts)), strict=True
                ):
                    assert first == len(streams[handle])
                    streams[handle] += unpack(message.ids)[at : at + count].tolist()
                    at += count
        for result in results:
            engine.worker_message(WORKER, over_the_wire(result), now)
        engine.check()
    assert counters.get("scheduler_preemptions", 0) > 0
    for stream, entry in zip(streams, entries, strict=True):
        assert stream == entry["tokens"]
