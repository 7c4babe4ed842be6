"""What a step becomes in the plan ring: read back here as `kernels/plan.cu` reads it. Needs torch, no card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec import structs

from gpu_worker.core import WorkerCore
from gpu_worker.cuda import state as states
from gpu_worker.cuda.state import HEADER, MAX_STOP_IDS, DeviceState, is_decode
from gpu_worker.runner import Description, Step
from gpu_worker.worst_case import worst_step
from protocol.columns import EMPTY, pack
from protocol.messages import Admit, Geometry, Plan, SamplingParams

GEOMETRY = Geometry(
    block_size=16, blocks=500, host_blocks=8, slots=8, max_model_len=512, max_step_tokens=256, vocab_size=1000
)  # fmt: skip


@pytest.fixture
def state() -> DeviceState:
    return DeviceState(GEOMETRY, torch.device("cpu"), spread=33, tile_tokens=64, entries=4, results=4)


@pytest.fixture
def core() -> WorkerCore:
    return WorkerCore(Description(model="m", fingerprint=b"0" * 16, geometry=GEOMETRY, attention="triton", eos=[]))


def prefill(core: WorkerCore, prompts: dict[int, np.ndarray], **more: bytes) -> Step:
    """Admit prompts to slots and compute all of them, each with as many blocks as it needs from 10 · slot on."""
    table = [(slot, i, 10 * slot + i) for slot, p in prompts.items() for i in range(-(-(len(p) + 1) // 16))]
    columns = {name: pack([row[i] for row in table]) for i, name in enumerate(("assign_slots", "assign_indices", "assign_blocks"))}
    plan = Plan(
        step=1,
        admits=[Admit(slot, pack(p), b"", (slot << 33) + 5, SamplingParams(9, 0.5, stop_ids=pack([3, 4]))) for slot, p in prompts.items()],
        bind_slots=pack(prompts),
        bind_generations=pack([1] * len(prompts)),
        bind_records=pack(prompts),
        slots=pack(prompts),
        generations=pack([1] * len(prompts)),
        starts=pack([0] * len(prompts)),
        counts=pack([len(p) for p in prompts.values()]),
        outputs=pack([1] * len(prompts)),
        **columns,
        **more,
    )
    plan.check(GEOMETRY)
    return core.apply(plan)


def test_blocks_may_be_known_late(state: DeviceState, core: WorkerCore) -> None:
    early = DeviceState(structs.replace(GEOMETRY, blocks=1), torch.device("cpu"), spread=33, tile_tokens=64, entries=4, results=4)
    list(early.write(worst_step(early.geometry), 0))
    early.hold(GEOMETRY.blocks)
    assert early.geometry == state.geometry
    assert early.max_copies == state.max_copies
    assert early.ring.shape == state.ring.shape
    assert (early.table == GEOMETRY.blocks).all()
    (number,) = early.write(prefill(core, {1: np.arange(40, dtype=np.int32)}), 0)
    assert number == int(early.step[0])


def test_a_plan_may_copy_every_block_there_is() -> None:
    g = structs.replace(GEOMETRY, blocks=3000, host_blocks=3000, slots=1)
    state = DeviceState(g, torch.device("cpu"), spread=33, tile_tokens=64, entries=2, results=2)
    core = WorkerCore(Description(model="m", fingerprint=b"0" * 16, geometry=g, attention="triton", eos=[]))
    every = pack(np.arange(3000))
    plan = Plan(step=1, out_from=every, out_to=every, in_from=every, in_to=every)
    (number,) = state.write(core.apply(plan), 0)
    entry = state.ring[number].numpy()
    copies = entry[entry[9] : entry[9] + 12000].reshape(6000, 2)
    assert (copies == np.tile(np.arange(3000), 2)[:, None]).all()


def test_a_prefill_step_is_laid_out_as_the_kernels_read_it(state: DeviceState, core: WorkerCore) -> None:
    prompts = {2: np.arange(70, dtype=np.int32), 5: np.arange(100, 117, dtype=np.int32)}
    step = prefill(core, prompts, copy_from=pack([400]), copy_to=pack([401]), out_from=pack([20]), out_to=pack([3]))
    assert not is_decode(step)
    assert list(state.write(step, 3)) == [0]
    entry = state.ring[0].numpy()
    header = entry[:HEADER]
    assert header[:6].tolist() == [2, 87, 2, 7, 2, 3]
    rows = entry[HEADER : HEADER + 16].reshape(2, 8)
    assert rows.tolist() == [[2, 0, 70, 70, 0, 0, 0, 0], [5, 0, 17, 17, 70, 70, 100, 0]]
    at = header[10]
    assert at % 4 == 0
    assert entry[at : at + 28].reshape(7, 4)[:, :3].tolist() == [[2, i, 20 + i] for i in range(5)] + [[5, 0, 50], [5, 1, 51]]
    binding = entry[header[11] :][:64].reshape(2, 32)
    assert binding[0, :7].tolist() == [2, np.float32(0.5).view(np.int32), 5, 4, 2, 3, 4]
    assert entry[header[12] :][:8].tolist() == [0, 2, 70, 0, 1, 5, 17, 0]
    assert entry[header[13] :][:87].tolist() == [*range(70), *range(100, 117)]
    assert header[7] == 3
    assert entry[header[14] :][:6].tolist() == [0, 64, 0, 0, 1, 0], "those with most keys come first"
    assert entry[header[15] :][:2].tolist() == [69, 86]
    assert entry[header[9] :][:4].tolist() == [400, 401, 20, 3]


def test_a_decode_step_holds_rows_and_assignments_only(state: DeviceState, core: WorkerCore) -> None:
    prefill(core, {1: np.arange(15, dtype=np.int32), 3: np.arange(20, dtype=np.int32)})
    plan = Plan(
        step=2,
        assign_slots=pack([1]),
        assign_indices=pack([1]),
        assign_blocks=pack([99]),
        slots=pack([3, 1]),
        generations=pack([1, 1]),
        starts=pack([20, 15]),
        counts=pack([1, 1]),
        outputs=pack([1, 1]),
    )
    step = core.apply(plan)
    assert is_decode(step)
    list(state.write(step, 0))
    entry = state.ring[0].numpy()
    assert entry[:6].tolist() == [2, 2, 2, 1, 0, 0]
    assert entry[HEADER : HEADER + 16].reshape(2, 8)[:, :4].tolist() == [[3, 20, 1, 0], [1, 15, 1, 0]]
    assert entry[entry[10] :][:3].tolist() == [1, 1, 99]


def test_nothing_of_an_earlier_step_is_left_in_an_entry(core: WorkerCore) -> None:
    state = DeviceState(GEOMETRY, torch.device("cpu"), spread=33, tile_tokens=64, entries=1, results=4)
    list(state.write(prefill(core, {1: np.arange(15, dtype=np.int32), 3: np.arange(20, dtype=np.int32)}), 3))
    columns = {"slots": [3, 1], "generations": [1, 1], "starts": [20, 15], "counts": [1, 1], "outputs": [1, 1]}
    list(state.write(core.apply(Plan(step=2, **{name: pack(column) for name, column in columns.items()})), 2))
    entry = state.ring[0].numpy()
    assert entry[:HEADER].tolist() == [2, 2, 2, 0, 0, 2] + [0] * 10
    assert entry[HEADER : HEADER + 16].reshape(2, 8).tolist() == [[3, 20, 1, 0, 0, 0, 0, 0], [1, 15, 1, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("more", [{"outputs": pack([1, 0])}, {"counts": pack([1, 2])}, {"copy_from": pack([9]), "copy_to": pack([8])}])
def test_a_step_that_does_anything_else_is_no_decode_step(core: WorkerCore, more: dict[str, bytes]) -> None:
    prefill(core, {1: np.arange(8, dtype=np.int32), 3: np.arange(20, dtype=np.int32)})
    columns = {"slots": [1, 3], "generations": [1, 1], "starts": [7, 19], "counts": [1, 1], "outputs": [1, 1]}
    plan = Plan(step=2, **({name: pack(column) for name, column in columns.items()} | more))
    assert not is_decode(core.apply(plan))
    assert is_decode(core.apply(Plan(step=3, **{name: pack(column) for name, column in columns.items()})))


def test_more_assignments_than_an_entry_holds_take_several_and_wait_for_their_turn(
    state: DeviceState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "MAX_ASSIGNMENTS", 10)
    waited: list[int] = []

    class Guard:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append(self.number)

    many = {"share_slots": pack([0] * 25), "share_indices": pack(range(25)), "share_blocks": pack(range(100, 125))}
    step = Step(Plan(step=1, **many), [], *[EMPTY] * 8, [], EMPTY, [])
    seen = []
    for number in state.write(step, 1):
        entry = state.ring[number].numpy()
        seen += entry[entry[10] :][: 4 * entry[3]].reshape(-1, 4).tolist()
        state.guards[number] = Guard(number)  # type: ignore[call-overload]
    assert [block for *_, block, _ in seen] == list(range(100, 125))
    assert waited == []
    assert list(state.write(Step(Plan(step=2), [], *[EMPTY] * 8, [], EMPTY, []), 1)) == [3]
    assert list(state.write(Step(Plan(step=3), [], *[EMPTY] * 8, [], EMPTY, []), 1)) == [0]
    assert waited == [0]


def test_stop_ids_beyond_what_a_slot_holds_are_left_to_the_general_sampler(core: WorkerCore) -> None:
    from gpu_worker.cuda.general import needs_general
    from gpu_worker.runner import Record

    def record(**params: object) -> Record:
        return Record(0, np.arange(3, dtype=np.int32), EMPTY, 1, SamplingParams(5, **params), 512)  # type: ignore[arg-type]

    assert not needs_general(record(temperature=0.7, stop_ids=pack(range(MAX_STOP_IDS))))
    assert needs_general(record(temperature=0.7, stop_ids=pack(range(MAX_STOP_IDS + 1))))
    assert not needs_general(record(temperature=0.0, top_k=5, top_p=0.5))
    assert needs_general(record(temperature=0.7, top_p=0.5))
    assert needs_general(record(logprobs=0))
    assert needs_general(record(frequency_penalty=0.1))
