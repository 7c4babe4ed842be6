"""Messages that must not be used: what `check` refuses, and by which name."""

from __future__ import annotations

import math
import typing

import msgspec
import pytest

from protocol.columns import BadMessage, pack, pack_floats, within
from protocol.messages import MAX_WORD, MAX_WORDS, Admit, Choice, Message, Models, Plan, Ready, SamplingParams, Tokens
from tests.protocol.message_samples import GEOMETRY, KEY, PARAMS, REQUEST, SAMPLES, SUBMIT

PLAN, TOKENS, RESULT, READY = (SAMPLES[f"{kind}, full"] for kind in ("plan", "tokens", "result", "ready"))


def changed(message: msgspec.Struct, **fields: object) -> typing.Any:
    return msgspec.structs.replace(message, **fields)


def columns_of(message: Message) -> list[str]:
    """The fields that hold int32 columns."""
    names = set(message.__struct_fields__) - {"request", "hash_key", "fingerprint", "tokenizer", "data", "header", "cache_salt", "flags"}
    return sorted(name for name in names if isinstance(getattr(message, name), bytes))


COLUMNS = [(name, field) for name in ("plan, full", "tokens, full", "result, full", "ready, full") for field in columns_of(SAMPLES[name])]


@pytest.mark.parametrize(("name", "field"), [*COLUMNS, ("submit, full", "prompt"), ("abort, full", "choices")])
def test_a_column_that_ends_inside_a_row_is_refused(name: str, field: str) -> None:
    message = SAMPLES[name]
    for data in (getattr(message, field)[:-1], getattr(message, field) + b"\x00"):
        with pytest.raises(BadMessage):
            changed(message, **{field: data}).check(GEOMETRY)


GROUPS = [
    ("ready, full", ("blocks", "hashes")),
    ("ready, full", ("host_blocks", "host_hashes")),
    ("tokens, full", ("handles", "choices", "firsts", "counts")),
    ("tokens, full", ("counts", "ids")),
    ("tokens, full", ("admitted", "cached", "queued")),
    ("tokens, full", ("counts", "lp_counts")),
    ("tokens, full", ("lp_ids", "lp_values")),
    ("tokens, full", ("lp_ranks", "lp_ids")),
    ("plan, full", ("seals", "seal_hashes")),
    ("plan, full", ("bind_slots", "bind_generations", "bind_records")),
    ("plan, full", ("assign_slots", "assign_indices", "assign_blocks")),
    ("plan, full", ("share_slots", "share_indices", "share_blocks")),
    ("plan, full", ("copy_from", "copy_to")),
    ("plan, full", ("out_from", "out_to")),
    ("plan, full", ("in_from", "in_to")),
    ("plan, full", ("slots", "generations", "starts", "counts", "outputs")),
    ("plan, full", ("fork_rows", "fork_slots")),
    ("result, full", ("counts", "flags")),
    ("result, full", ("counts", "ids")),
    ("result, full", ("counts", "lp_counts")),
    ("result, full", ("lp_ids", "lp_values")),
    ("result, full", ("lp_ranks", "lp_ids")),
]


@pytest.mark.parametrize(("name", "group"), GROUPS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_columns_that_belong_together_have_equal_rows(name: str, group: tuple[str, ...]) -> None:
    message = SAMPLES[name]
    for field in group:
        column = getattr(message, field)
        width = 16 if field.endswith("hashes") else 1 if field == "flags" else 4
        for data in (column[:-width], column + column[-width:]):
            if data or field not in ("lp_counts", "queued"):  # an empty one says that there are none
                with pytest.raises(BadMessage):
                    changed(message, **{field: data}).check(GEOMETRY)


RANGES = [
    ("ready, full", "blocks", 100),
    ("ready, full", "host_blocks", 20),
    ("plan, full", "frees", 8),
    ("plan, full", "seals", 100),
    ("plan, full", "withdrawals", 100),
    ("plan, full", "bind_slots", 8),
    ("plan, full", "assign_slots", 8),
    ("plan, full", "assign_indices", 16),
    ("plan, full", "assign_blocks", 100),
    ("plan, full", "share_slots", 8),
    ("plan, full", "share_indices", 16),
    ("plan, full", "share_blocks", 100),
    ("plan, full", "copy_from", 100),
    ("plan, full", "copy_to", 100),
    ("plan, full", "out_from", 100),
    ("plan, full", "out_to", 20),
    ("plan, full", "in_from", 20),
    ("plan, full", "in_to", 100),
    ("plan, full", "slots", 8),
    ("plan, full", "starts", 256),
    ("plan, full", "outputs", 2),
    ("plan, full", "fork_rows", 2),
    ("plan, full", "fork_slots", 8),
    ("result, full", "ids", 1000),
    ("result, full", "counts", 2),
    ("tokens, full", "firsts", 1 << 24),
    ("submit, full", "prompt", 2**31 - 1),
]


@pytest.mark.parametrize(("name", "field", "limit"), RANGES, ids=lambda value: str(value))
def test_an_index_outside_the_geometry_is_refused(name: str, field: str, limit: int) -> None:
    message = SAMPLES[name]
    rest = getattr(message, field)[4:]
    for value in (-1, limit, -(2**31)):
        with pytest.raises(BadMessage) as refusal:
            changed(message, **{field: pack([value]) + rest}).check(GEOMETRY)
        assert refusal.value.field in (field, "ids")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"starts": pack([0, 255]), "counts": pack([4, 2])}, "counts"),  # position 256
        ({"starts": pack([0, 0]), "counts": pack([60, 5])}, "counts"),  # 65 tokens
        ({"counts": pack([0, 1])}, "counts"),
        ({"counts": pack([65, 1])}, "counts"),
        ({"admits": [Admit(9, b"", b"", 0, PARAMS)]}, "prompt"),
        ({"admits": [Admit(9, pack([1]), b"", 0, PARAMS, "0" * 56)]}, "trace"),
        ({"admits": [Admit(9, pack([1000]), b"", 0, PARAMS)]}, "prompt"),
        ({"admits": [Admit(9, pack([1]), pack([-1]), 0, PARAMS)]}, "known"),
        ({"admits": [Admit(9, pack([1])[:3], b"", 0, PARAMS)]}, "prompt"),
        ({"admits": [Admit(9, pack([1] * 200), pack([1] * 57), 0, PARAMS)]}, "prompt"),
        ({"admits": [Admit(9, pack([1]), b"", 0, changed(PARAMS, allowed_ids=pack([1000])))]}, "allowed_ids"),
    ],
)
def test_a_plan_that_reaches_beyond_the_worker_is_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(BadMessage) as refusal:
        changed(PLAN, **changes).check(GEOMETRY)
    assert refusal.value.field == field


def test_a_plan_has_no_more_rows_than_the_worker_has_slots() -> None:
    nine = pack([1] * 9)
    with pytest.raises(BadMessage, match="more rows than slots"):
        Plan(1, slots=nine, generations=nine, starts=nine, counts=nine, outputs=nine).check(GEOMETRY)
    with pytest.raises(BadMessage, match="more outputs than slots"):
        changed(RESULT, counts=pack([0] * 9), ids=b"", flags=bytes(9), lp_counts=b"").check(GEOMETRY)


def test_a_plan_without_a_geometry_is_refused() -> None:
    with pytest.raises(BadMessage, match="before the worker announced"):
        Plan(1).check(None)


@pytest.mark.parametrize("field", ["block_size", "blocks", "slots", "max_model_len", "max_step_tokens", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_a_worker_has_sizes_that_can_be(field: str, value: int) -> None:
    with pytest.raises(BadMessage) as refusal:
        Ready("m", b"", changed(GEOMETRY, **{field: value}), "torch").check()
    assert refusal.value.field == f"geometry.{field}"


def test_the_last_block_table_entry_covers_the_last_token() -> None:
    assert GEOMETRY.table_width == 16
    assert changed(GEOMETRY, max_model_len=257).table_width == 17


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("hello", {"role": "cook"}, "role"),
        ("hello", {"name": ""}, "name"),
        ("hello", {"name": "x" * 201}, "name"),
        ("hello", {"hash_key": b"short"}, "hash_key"),
        ("hello", {"epoch": -1}, "epoch"),
        ("welcome", {"hash_key": b""}, "hash_key"),
        ("welcome", {"session": 0}, "session"),
        ("submit", {"request": b"short"}, "request"),
        ("submit", {"handle": -1}, "handle"),
        ("submit", {"handle": 2**31}, "handle"),
        ("submit", {"prompt": b""}, "prompt"),
        ("submit", {"choices": []}, "choices"),
        ("submit", {"choices": [Choice(1, 0)]}, "choices"),
        ("submit", {"choices": [Choice(0, 0), Choice(0, 0)]}, "choices"),
        ("submit", {"choices": [Choice(0, -1)]}, "seed"),
        ("submit", {"choices": [Choice(0, 2**64)]}, "seed"),
        ("submit", {"choices": [Choice(0, 0, b"abc")]}, "known"),
        ("submit", {"choices": [Choice(0, 0, pack([-1]))]}, "known"),
        ("journal", {"submit": changed(SUBMIT, prompt=b"")}, "prompt"),
        *((kind, {"request": REQUEST[:-1]}, "request") for kind in ("abort", "done", "attach", "gone", "moved", "failed")),
    ],
)
def test_a_field_that_cannot_be_used_is_named(name: str, changes: dict[str, object], field: str) -> None:
    with pytest.raises(BadMessage) as refusal:
        changed(SAMPLES[name], **changes).check()
    assert refusal.value.field == field
    assert field in str(refusal.value)


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [-1, (1 << 24) + 1]),
        ("temperature", [-0.1, NAN, math.inf, 2e6]),
        ("top_p", [0.0, -1.0, 1.1, NAN]),
        ("top_k", [-2, 2**31]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("repetition_penalty", [0.0, -1.0, NAN, math.inf]),
        ("bias_values", [b"", pack_floats([1.0])]),
        ("bias_ids", [pack([1000, 9]), pack([-1, 9])]),
        ("stop_ids", [pack([1000]), b"abc"]),
        ("allowed_ids", [pack([-1]), b"abcde"]),
        ("bad_words", [[b"abc"], [bytes(4 * MAX_WORD + 4)], [bytes(4 * MAX_WORD)] * (MAX_WORDS // MAX_WORD + 1)]),
    ],
)
def test_sampling_parameters_that_no_sampler_can_use_are_refused(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(BadMessage) as refusal:
            changed(PARAMS, **{field: value}).check(GEOMETRY.vocab_size)
        assert refusal.value.field in (field, "bias_values")
        if field not in ("bias_ids", "stop_ids", "allowed_ids"):  # only a worker knows its vocabulary
            with pytest.raises(BadMessage):
                changed(SUBMIT, params=changed(PARAMS, **{field: value})).check()


def test_the_edges_of_sampling_parameters_are_allowed() -> None:
    edges = SamplingParams(0, temperature=0.0, top_p=1.0, top_k=0, min_p=1.0)
    edges.check(1000)
    changed(edges, bad_words=[bytes(4 * MAX_WORD)] * (MAX_WORDS // MAX_WORD)).check(1000)
    changed(edges, max_tokens=1 << 24, temperature=1e6, top_p=1e-9, top_k=-1, min_p=0.0, repetition_penalty=1e6).check(1000)


def test_counts_that_multiply_beyond_int32_do_not_pass_as_few() -> None:
    count, pairs = 1 << 17, 1 << 15  # 2^32 pairs
    tokens = Tokens(pack([1]), pack([0]), pack([0]), pack([count]), bytes(4 * count), pack([pairs]), b"", b"", bytes(4 * count))
    with pytest.raises(BadMessage):
        tokens.check()


def test_what_models_are_made_of_is_checked() -> None:
    model = SAMPLES["models, full"].models[0]  # type: ignore[attr-defined]
    for changes in ({"eos": b"abc"}, {"tokenizer": KEY[:-1]}):
        with pytest.raises(BadMessage):
            Models([changed(model, **changes)]).check()


def test_a_negative_choice_is_refused() -> None:
    for message in (changed(TOKENS, choices=pack([-1, 1])), changed(SAMPLES["abort, full"], choices=pack([-1]))):
        with pytest.raises(BadMessage):
            message.check()


def test_an_admitted_choice_has_a_seed_of_64_bits() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(BadMessage):
            Plan(1, admits=[Admit(9, pack([1]), b"", seed, PARAMS)]).check(GEOMETRY)


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "bias_values"])
def test_penalties_and_biases_are_numbers(field: str) -> None:
    for bad in (NAN, math.inf, -math.inf):
        value: object = pack_floats([bad, 0.0]) if field == "bias_values" else bad
        if field == "bias_values" and bad == -math.inf:
            continue  # a ban
        with pytest.raises(BadMessage):
            changed(PARAMS, **{field: value}).check()


def test_chunks_and_attachments_keep_their_bounds() -> None:
    for message in (
        changed(SAMPLES["attach"], handle=-1),
        changed(SAMPLES["file request"], offset=-1),
        changed(SAMPLES["file chunk, full"], offset=-1),
        changed(SAMPLES["resumed"], count=-1),
    ):
        with pytest.raises(BadMessage):
            message.check()


@pytest.mark.parametrize(("low", "high"), [(0, 8), (1, 3), (-2, 3)])
def test_a_column_is_within_its_bounds_or_not_at_every_edge(low: int, high: int) -> None:
    for value in (-(2**31), low - 1, low, high - 1, high, 2**31 - 1):
        column = pack([low, value])
        if low <= value < high:
            assert within(column, "field", low, high).tolist() == [low, value]
        else:
            with pytest.raises(BadMessage):
                within(column, "field", low, high)
