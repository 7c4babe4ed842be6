"""The worker's core: what a plan becomes, what it must not be, and what survives a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu_worker.core import FILE_CHUNK, WorkerCore
from gpu_worker.oracle import OracleRunner
from gpu_worker.runner import Description, Outcome, Step
from gpu_worker.settings import WorkerSettings
from gpu_worker.slots import PlanError
from protocol.columns import pack, unpack
from protocol.messages import DEAD, Admit, FileRequest, Plan, SamplingParams
from tests.gpu_worker.worker_plans import rows_of

SETTINGS = WorkerSettings(run_dir=Path(), block_size=4, num_gpu_blocks=16, num_cpu_blocks=6, max_num_seqs=4, max_model_len=32)
PROMPT = [10, 11, 12, 13, 14]


@pytest.fixture
def core() -> WorkerCore:
    return WorkerCore(OracleRunner(SETTINGS).load())


def admit(record: int = 1, prompt: list[int] = PROMPT, known: list[int] | None = None, **params: int) -> Admit:
    return Admit(record, pack(prompt), pack(known or []), 7, SamplingParams(**{"max_tokens": 8, **params}))


def bound(record: int = 1, slot: int = 0, generation: int = 1, blocks: tuple[int, ...] = (2, 5, 7, 9)) -> dict[str, bytes]:
    n = len(blocks)
    return rows_of(
        bind_slots=[slot],
        bind_generations=[generation],
        bind_records=[record],
        assign_slots=[slot] * n,
        assign_indices=[*range(n)],
        assign_blocks=[*blocks],
    )


def row(start: int, count: int, output: int = 1, slot: int = 0, generation: int = 1) -> dict[str, bytes]:
    return rows_of(slots=[slot], generations=[generation], starts=[start], counts=[count], outputs=[output])


def outcome(*tokens: int, copied: int = 0) -> Outcome:
    array = np.array(tokens, np.int32)
    return Outcome(array, np.where(array < 0, DEAD, 0).astype(np.uint8), copied=copied)


def apply(core: WorkerCore, plan: Plan) -> Step:
    plan.check(core.description.geometry)
    return core.apply(plan)


def test_a_prefill_is_read_from_the_records_history(core):
    step = apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 3, output=0)))
    assert (step.known.tolist(), step.prefill.tolist()) == ([3], [10, 11, 12])
    step = apply(core, Plan(2, **row(3, 2)))
    assert (step.known.tolist(), step.prefill.tolist()) == ([2], [13, 14])
    assert [r.id for r in step.output_records] == [1]
    assert step.output_positions.tolist() == [5]


def test_a_decoded_token_stays_on_the_device(core):
    first = apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 5)))
    second = apply(core, Plan(2, **row(5, 1)))  # planned before the first result
    assert (second.known.tolist(), second.prefill.tolist()) == ([0], [])
    core.result(first, outcome(99))
    third = apply(core, Plan(3, **row(6, 1)))
    assert third.known.tolist() == [0]


def test_tokens_known_at_admission_are_recomputed_from_the_history(core):
    step = apply(core, Plan(1, admits=[admit(known=[20, 21])], **bound(), **row(0, 7)))
    assert step.prefill.tolist() == [*PROMPT, 20, 21]
    assert step.output_records[0].prompt_length == 5


def test_a_preempted_record_is_bound_again_with_nothing_sent_twice(core):
    step = apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 5)))
    core.result(step, outcome(50))
    step = apply(core, Plan(2, **row(5, 1)))
    core.result(step, outcome(51))
    apply(core, Plan(3, **rows_of(frees=[0])))
    step = apply(core, Plan(4, **bound(slot=2, generation=1), **row(0, 7, slot=2)))
    assert step.prefill.tolist() == [*PROMPT, 50, 51]


def test_a_row_may_end_in_the_slots_last_token_behind_known_ones(core):
    step = apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 5)))
    core.result(step, outcome(50))
    step = apply(core, Plan(2, **row(4, 2)))
    assert (step.known.tolist(), step.prefill.tolist()) == ([1], [14])


def test_a_plan_without_rows_is_a_step_without_rows(core):
    apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 5)))
    step = apply(core, Plan(2))
    assert (step.records, len(step.slots), step.output_records, len(step.prefill)) == ([], 0, [], 0)
    assert core.result(step, outcome()).counts == b""


def test_the_same_slots_may_hold_another_record_in_the_next_step(core):
    first = apply(core, Plan(1, admits=[admit(1), admit(2)], **bound(1), **row(0, 5)))
    again = apply(core, Plan(2, **row(5, 1)))
    other = apply(core, Plan(3, **bound(2, generation=2), **row(0, 5, generation=2)))
    assert [step.records[0].id for step in (first, again, other)] == [1, 1, 2]


def test_forks_follow_the_rows_in_the_outputs(core):
    columns = rows_of(
        bind_slots=[0, 3],
        bind_generations=[1, 1],
        bind_records=[1, 2],
        assign_slots=[0, 0, 3],
        assign_indices=[0, 1, 1],
        assign_blocks=[2, 5, 6],
        share_slots=[3],
        share_indices=[0],
        share_blocks=[2],
        fork_rows=[0],
        fork_slots=[3],
    )
    step = apply(core, Plan(1, admits=[admit(1), admit(2)], **columns, **row(0, 5)))
    assert step.output_slots.tolist() == [0, 3]
    assert [r.id for r in step.output_records] == [1, 2]
    result = core.result(step, outcome(40, 41))
    assert unpack(result.ids).tolist() == [40, 41]
    assert [core.records[i].history[5] for i in (1, 2)] == [40, 41]


def test_a_late_row_of_a_dead_slot_adds_nothing(core):
    step = apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 5)))
    result = core.result(step, outcome(-1))
    assert (unpack(result.counts).tolist(), result.ids, result.flags) == ([0], b"", bytes([DEAD]))
    assert core.records[1].length == 5


def test_a_late_result_reaches_the_record_that_was_dropped_and_no_other(core):
    first = apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 5)))
    again = bound(record=2, generation=2)
    second = apply(core, Plan(2, drops=pack([1]), frees=pack([0]), admits=[admit(2)], **again, **row(0, 5, generation=2)))
    core.result(first, outcome(60))
    core.result(second, outcome(61))
    assert core.records.keys() == {2}
    assert core.records[2].history[5] == 61


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (Plan(3, **row(5, 1)), "step"),
        (Plan(2, drops=pack([9])), "drops"),
        (Plan(2, admits=[admit(1)]), "admits"),
        (Plan(2, **bound(record=9)), "bind_records"),
        (Plan(2, **bound(generation=-3)), "bind_generations"),
        (Plan(2, **row(5, 1, slot=1)), "generations"),
        (Plan(2, **row(5, 1, slot=1, generation=-1)), "generations"),
        (Plan(2, **row(5, 1, generation=2)), "generations"),
        (Plan(2, frees=pack([0]), **row(5, 1)), "generations"),
        (Plan(2, **rows_of(slots=[0, 0], generations=[1, 1], starts=[5, 6], counts=[1, 1], outputs=[1, 1])), "slots"),
        (Plan(2, **row(5, 2)), "starts"),
        (Plan(2, **row(16, 1)), "counts"),
        (Plan(2, **rows_of(assign_slots=[0], assign_indices=[4], assign_blocks=[1]), **row(16, 1)), "outputs"),
        (Plan(2, **rows_of(fork_rows=[0], fork_slots=[1]), **row(5, 1)), "fork_slots"),
        (Plan(2, **rows_of(fork_rows=[0], fork_slots=[0]), **row(5, 1, output=0)), "fork_rows"),
    ],
)
def test_a_plan_that_contradicts_what_the_worker_holds_names_the_column(core, plan, field):
    apply(core, Plan(1, admits=[admit()], **bound(), **row(0, 5)))
    with pytest.raises(PlanError) as caught:
        apply(core, plan)
    assert (caught.value.field, caught.value.step) == (field, plan.step)


# ---------------------------------------------------------------- sealed blocks

A, B, C = b"A" * 16, b"B" * 16, b"C" * 16


def sealed(core: WorkerCore) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Device and host blocks that READY reports."""
    ready = core.ready()
    ready.check()

    def listing(blocks: bytes, hashes: bytes) -> dict[int, bytes]:
        return {b: hashes[16 * i : 16 * i + 16] for i, b in enumerate(unpack(blocks).tolist())}

    return listing(ready.blocks, ready.hashes), listing(ready.host_blocks, ready.host_hashes)


def test_sealed_hashes_survive_the_session_and_nothing_else_does(core):
    apply(core, Plan(1, admits=[admit()], seals=pack([3, 4]), seal_hashes=A + B, **bound(), **row(0, 5)))
    core.reset()
    assert sealed(core) == ({3: A, 4: B}, {})
    assert core.records == {}
    with pytest.raises(PlanError, match="not bound"):
        apply(core, Plan(1, **row(5, 1)))


def test_a_block_is_forgotten_by_whatever_writes_it(core):
    apply(core, Plan(1, seals=pack([1, 2, 3, 4, 5]), seal_hashes=A + B + C + A + B))
    apply(core, Plan(2, withdrawals=pack([1])))
    apply(core, Plan(3, admits=[admit()], **bound(blocks=(2,))))
    apply(core, Plan(4, **rows_of(copy_from=[5], copy_to=[3], in_from=[0], in_to=[4])))
    assert sealed(core)[0] == {5: B}


def test_a_seal_comes_before_an_assignment_of_the_same_plan(core):
    apply(core, Plan(1, admits=[admit()], seals=pack([2]), seal_hashes=A, **bound(blocks=(2,))))
    assert sealed(core)[0] == {}


def test_a_shared_block_keeps_its_hash(core):
    apply(core, Plan(1, seals=pack([2]), seal_hashes=A))
    apply(core, Plan(2, **rows_of(share_slots=[1], share_indices=[0], share_blocks=[2])))
    assert sealed(core)[0] == {2: A}


def test_a_host_block_is_sealed_when_its_copy_is_complete(core):
    apply(core, Plan(1, seals=pack([2, 3]), seal_hashes=A + B))
    first = apply(core, Plan(2, **rows_of(out_from=[2, 9], out_to=[0, 1])))
    second = apply(core, Plan(3, **rows_of(out_from=[3], out_to=[4])))
    core.result(first, outcome(copied=1))
    apply(core, Plan(4))
    assert sealed(core)[1] == {}
    core.result(second, outcome(copied=2))
    apply(core, Plan(5))
    assert sealed(core)[1] == {0: A}
    core.reset()  # the other copy was not complete
    assert sealed(core)[1] == {0: A}


def test_the_last_copies_of_a_session_count_too(core):
    step = apply(core, Plan(1, seals=pack([2]), seal_hashes=A, **rows_of(out_from=[2], out_to=[5])))
    core.result(step, outcome(copied=1))
    core.reset()
    assert sealed(core)[1] == {5: A}


def test_a_host_block_that_is_written_again_is_forgotten_until_then(core):
    step = apply(core, Plan(1, seals=pack([2, 3]), seal_hashes=A + B, **rows_of(out_from=[2], out_to=[5])))
    core.result(step, outcome(copied=1))
    step = apply(core, Plan(2, **rows_of(out_from=[3], out_to=[5])))
    assert sealed(core)[1] == {}
    core.result(step, outcome(copied=2))
    apply(core, Plan(3))
    assert sealed(core)[1] == {5: B}


def test_a_withdrawal_reaches_the_copies_on_the_host_and_those_on_their_way(core):
    step = apply(core, Plan(1, seals=pack([2, 3, 4]), seal_hashes=A + B + C, **rows_of(out_from=[2, 4], out_to=[5, 1])))
    core.result(step, outcome(copied=1))
    step = apply(core, Plan(2, **rows_of(out_from=[3], out_to=[0])))
    apply(core, Plan(3, withdrawals=pack([2, 3])))
    core.result(step, outcome(copied=2))
    apply(core, Plan(4))
    assert sealed(core) == ({4: C}, {1: C})


def test_a_seal_that_comes_behind_the_copy_names_the_host_block_too(core):
    step = apply(core, Plan(1, **rows_of(out_from=[2, 3], out_to=[4, 5])))
    apply(core, Plan(2, seals=pack([3, 4]), seal_hashes=A + B))
    core.result(step, outcome(copied=1))
    core.reset()
    assert sealed(core)[1] == {5: A}


def test_a_seal_that_comes_behind_a_complete_copy_still_names_the_host_block(core):
    step = apply(core, Plan(1, **rows_of(out_from=[3], out_to=[5])))
    core.result(step, outcome(copied=1))
    apply(core, Plan(2, seals=pack([3]), seal_hashes=A))
    assert sealed(core)[1] == {5: A}


def test_a_withdrawal_of_new_content_leaves_copies_of_the_old_alone(core):
    step = apply(core, Plan(1, seals=pack([2]), seal_hashes=A, **rows_of(out_from=[2], out_to=[5])))
    core.result(step, outcome(copied=1))
    apply(core, Plan(2, **rows_of(assign_slots=[0], assign_indices=[0], assign_blocks=[2])))
    apply(core, Plan(3, withdrawals=pack([2])))
    assert sealed(core) == ({}, {5: A})


def test_a_host_block_keeps_its_name_when_it_is_copied_back(core):
    step = apply(core, Plan(1, seals=pack([2]), seal_hashes=A, **rows_of(out_from=[2], out_to=[5])))
    core.result(step, outcome(copied=1))
    apply(core, Plan(2, **rows_of(in_from=[5], in_to=[2])))
    assert sealed(core) == ({}, {5: A})


def test_a_withdrawal_reaches_the_host_block_that_an_unsealed_one_was_copied_from(core):
    step = apply(core, Plan(1, seals=pack([2, 3]), seal_hashes=A + B, **rows_of(out_from=[2, 3], out_to=[4, 5])))
    core.result(step, outcome(copied=1))
    apply(core, Plan(2, **rows_of(in_from=[4], in_to=[8])))
    apply(core, Plan(3, withdrawals=pack([8])))
    assert sealed(core)[1] == {5: B}


def test_another_hash_key_drops_all_hashes_and_the_same_one_none(core):
    core.welcome(b"k" * 16)
    apply(core, Plan(1, seals=pack([2]), seal_hashes=A))
    core.reset()
    core.welcome(b"k" * 16)
    assert sealed(core)[0] == {2: A}
    core.welcome(b"l" * 16)
    assert sealed(core)[0] == {}


def test_the_device_is_idle_only_while_a_slot_is_bound(core):
    def idle(plan: Plan, tokens: tuple[int, ...], seconds: float) -> float:
        found = outcome(*tokens)
        found.idle = seconds
        return core.result(apply(core, plan), found).idle

    assert idle(Plan(1, admits=[admit()], **bound(), **row(0, 5)), (99,), 60.0) == 0.0
    assert idle(Plan(2, **row(5, 1)), (98,), 0.25) == 0.25
    assert idle(Plan(3, frees=pack([0]), drops=pack([1])), (), 0.5) == 0.5
    assert idle(Plan(4, admits=[admit(2)], **bound(2, slot=1), **row(0, 5, slot=1)), (97,), 60.0) == 0.0, "nobody had asked for anything"
    # one request behind another in one plan: the second had waited
    next = {**bound(3, slot=1, generation=2), "frees": pack([1]), "drops": pack([2])}
    assert idle(Plan(5, admits=[admit(3)], **next, **row(0, 5, slot=1, generation=2)), (96,), 0.75) == 0.75
    core.reset()
    assert idle(Plan(1, admits=[admit()], **bound(), **row(0, 5)), (99,), 60.0) == 0.0, "of another session nothing is known"


# ---------------------------------------------------------------- files


def test_tokenizer_files_are_served_in_pieces(core):
    bundle = bytes(range(256)) * 3000
    d = core.description
    large = WorkerCore(Description(d.model, d.fingerprint, d.geometry, d.attention, d.eos, tokenizer=b"t" * 16, bundle=bundle))
    got = b""
    while len(got) < len(bundle):
        chunk = large.file_chunk(FileRequest(b"t" * 16, len(got)))
        assert chunk.total == len(bundle)
        assert 0 < len(chunk.data) <= FILE_CHUNK
        got += chunk.data
    assert got == bundle


@pytest.mark.parametrize(("tokenizer", "offset"), [(b"?" * 16, 0), (None, -1), (None, 1 << 30)])
def test_files_that_are_not_there_are_said_to_be_so(core, tokenizer, offset):
    chunk = core.file_chunk(FileRequest(tokenizer or core.description.tokenizer, offset))
    assert (chunk.total, chunk.data) == (-1, b"")
