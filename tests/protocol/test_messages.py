"""The wire: golden bytes of every message, neighbours of another version, and frames that are no message."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages
from protocol.codec import decode, encode
from protocol.columns import BadMessage, pack
from protocol.messages import Message
from tests.protocol.message_samples import GEOMETRY, REQUEST, SAMPLES

GOLDEN: dict[str, str] = json.loads((Path(__file__).parent.parent / "data" / "messages.json").read_text())
TYPES = typing.get_args(messages.Any)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_bytes_of_a_message_do_not_change(name: str) -> None:
    assert encode(SAMPLES[name]).hex() == GOLDEN[name]


def test_every_message_has_golden_bytes() -> None:
    assert GOLDEN.keys() == SAMPLES.keys()
    assert {type(message) for message in SAMPLES.values()} == set(TYPES)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_become_the_message_and_pass_its_check(name: str) -> None:
    message = decode(bytes.fromhex(GOLDEN[name]))
    assert message == SAMPLES[name]
    message.check(GEOMETRY)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_are_plain_messagepack(name: str) -> None:
    row = msgpack.unpackb(bytes.fromhex(GOLDEN[name]))
    message = SAMPLES[name]
    tag = type(message).__struct_config__.tag
    assert row == [tag, *(as_plain(getattr(message, field)) for field in message.__struct_fields__)]


def as_plain(value: object) -> object:
    if isinstance(value, msgspec.Struct):
        row = [as_plain(getattr(value, field)) for field in value.__struct_fields__]
        return [value.__struct_config__.tag, *row] if value.__struct_config__.tag else row
    return [as_plain(item) for item in value] if isinstance(value, list) else value


def test_tags_are_unique_and_messages_are_rows_that_cannot_be_changed() -> None:
    assert len({kind.__struct_config__.tag for kind in TYPES}) == len(TYPES)
    for kind in TYPES:
        assert kind.__struct_config__.array_like
        assert kind.__struct_config__.frozen


@pytest.mark.parametrize("name", GOLDEN)
def test_a_field_that_a_newer_neighbour_appends_is_passed_over(name: str) -> None:
    row = msgpack.unpackb(bytes.fromhex(GOLDEN[name]))
    assert decode(msgpack.packb([*row, "of tomorrow", {"a": 1}])) == SAMPLES[name]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_a_field_that_an_older_neighbour_leaves_out_has_its_default(kind: type[Message]) -> None:
    full = [message for message in SAMPLES.values() if type(message) is kind][-1]
    row = msgpack.unpackb(encode(full))
    required = sum(field.required for field in msgspec.structs.fields(kind))
    for length in range(1 + required, len(row)):
        older = decode(msgpack.packb(row[:length]))
        for at, field in enumerate(msgspec.structs.fields(kind), start=1):
            default = field.default_factory() if field.default is msgspec.NODEFAULT and not field.required else field.default
            assert getattr(older, field.name) == (getattr(full, field.name) if at < length else default)
    if required:
        with pytest.raises(BadMessage):
            decode(msgpack.packb(row[:required]))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x93",
        b"plain text",
        msgpack.packb({}),
        msgpack.packb([]),
        msgpack.packb(["of tomorrow", 1]),
        msgpack.packb([1, 2, 3]),
        msgpack.packb(["done"]),
        msgpack.packb(["done", "sixteen bytes ..", 1]),
        msgpack.packb(["stale", "six"]),
        msgpack.packb(["stale", 1.5]),
        msgpack.packb(["stale", None]),
        msgpack.packb(["stale", 2**64 - 1])[:-1],
        msgpack.packb(["refused", 1, b"bytes"]),
        msgpack.packb(["journal", ["done", REQUEST]]),
        b"\x92\xa5stale\xa1\xff" + b"\xa7refused",
        b"\x93\xa7refused\x01\xa2\xff\xfe",  # a string that is not UTF-8
        b"\x91" * 100_000,
        b"\x81\x01" * 100_000,
        b"\x92\xa6models" + b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xffx",
    ],
)
def test_a_frame_that_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(frame)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_truncated_message_is_refused(name: str) -> None:
    whole = bytes.fromhex(GOLDEN[name])
    for length in range(len(whole)):
        with pytest.raises(BadMessage):
            decode(whole[:length])


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    refused_or_usable(data)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_mutated_frames_never_raise_anything_else(data: st.DataObject) -> None:
    frame = bytearray(bytes.fromhex(data.draw(st.sampled_from(sorted(GOLDEN.values())))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1)) if frame else 0
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "repeat"]))
        if kind == "set" and frame:
            frame[at] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del frame[at : at + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            frame[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            frame[at:at] = frame[at : at + data.draw(st.integers(1, 40))]
    refused_or_usable(bytes(frame))


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=9),
    st.lists(st.integers(-3, 300), max_size=6).map(pack),
    st.lists(st.binary(max_size=5), max_size=3),
)


@pytest.mark.parametrize("name", [name for name, message in SAMPLES.items() if message.__struct_fields__])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_odd_values_in_any_field_never_raise_anything_else(name: str, data: st.DataObject) -> None:
    row = msgpack.unpackb(bytes.fromhex(GOLDEN[name]))
    for _ in range(data.draw(st.integers(1, 3))):
        row[data.draw(st.integers(1, len(row) - 1))] = data.draw(ODD_VALUES)
    refused_or_usable(msgpack.packb(row))


def refused_or_usable(frame: bytes) -> None:
    try:
        message = decode(frame)
        message.check(GEOMETRY)
    except BadMessage:
        return
    assert decode(encode(message)) == message or has_nan(message)


def has_nan(message: Message) -> bool:
    return any(isinstance(value, float) and math.isnan(value) for value in walk(message))


def walk(value: object) -> typing.Iterator[object]:
    if isinstance(value, msgspec.Struct):
        for field in value.__struct_fields__:
            yield from walk(getattr(value, field))
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)
    else:
        yield value
