"""The aux message: its table of fields on the wire, and what a reader refuses."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvroom.errors import LocalRoomError, RemoteProtocolError
from kvroom.wire import aux_message
from kvroom.wire.aux_message import Aux

LARGEST = 2**63 - 1
counts = st.integers(0, LARGEST)
messages = st.builds(
    Aux,
    tokens=counts,
    first_token=st.none() | counts,
    first_logprob=st.none() | st.floats(allow_nan=False),
    cached_tokens=counts,
    extra=st.dictionaries(st.text(max_size=20), st.binary(max_size=200), max_size=4),
)


def on_the_wire(**fields: object) -> bytes:
    """Return a message of this version as a foreign writer makes it."""
    return msgspec.msgpack.encode({"version": 1, "tokens": 3, **fields})


@given(messages)
def test_what_was_written_is_read(aux: Aux) -> None:
    read = aux_message.decode_aux(aux_message.encode_aux(aux))
    assert msgspec.structs.asdict(read) == {"version": aux_message.VERSION, **msgspec.structs.asdict(aux)}


def test_the_map_on_the_wire_is_the_table_in_the_module() -> None:
    full = Aux(tokens=7, first_token=0, first_logprob=-0.5, cached_tokens=4, extra={"engine.row.1": b"\x00row"})
    assert msgspec.msgpack.decode(aux_message.encode_aux(full)) == {
        "version": 1,
        "tokens": 7,
        "first_token": 0,
        "first_logprob": -0.5,
        "cached_tokens": 4,
        "extra": {"engine.row.1": b"\x00row"},
    }


def test_fields_at_their_defaults_are_left_out() -> None:
    assert msgspec.msgpack.decode(aux_message.encode_aux(Aux(tokens=0))) == {"version": 1, "tokens": 0}


def test_token_0_is_a_token_and_none_is_none() -> None:
    assert aux_message.decode_aux(aux_message.encode_aux(Aux(tokens=1, first_token=0))).first_token == 0
    assert aux_message.decode_aux(aux_message.encode_aux(Aux(tokens=1))).first_token is None


@pytest.mark.parametrize("field", ["tokens", "first_token", "cached_tokens"])
@pytest.mark.parametrize("count", [-1, 2**63])
def test_a_count_that_cannot_be_read_is_refused_where_it_is_written(field: str, count: int) -> None:
    fields: dict[str, Any] = {"tokens": 3, field: count}
    with pytest.raises(LocalRoomError, match=f"{field} of an aux message is {count}: give"):
        aux_message.encode_aux(Aux(**fields))


def test_fields_that_a_later_writer_adds_are_passed_over() -> None:
    assert aux_message.decode_aux(on_the_wire(routed_experts=[1, 2])).tokens == 3


@pytest.mark.parametrize("version", [0, 2, -1, 2**40])
def test_another_version_is_refused_by_its_number(version: int) -> None:
    data = msgspec.msgpack.encode({"version": version, "tokens": "of another type in that version"})
    with pytest.raises(RemoteProtocolError, match=f"version {version}, this side reads version 1: run the same"):
        aux_message.decode_aux(data)


WRONG = {
    "a negative length": {"tokens": -1},
    "a length beyond int64": {"tokens": 2**63},
    "a length that is a float": {"tokens": 1.0},
    "a length that is True": {"tokens": True},
    "a negative token": {"first_token": -1},
    "a token as text": {"first_token": "5"},
    "a log probability as text": {"first_logprob": "-0.5"},
    "a negative count": {"cached_tokens": -1},
    "extra as a list": {"extra": [b"row"]},
    "extra of text": {"extra": {"engine.row.1": "row"}},
    "extra under a number": {"extra": {1: b"row"}},
}


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG)
def test_a_field_of_another_type_or_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError, match=r"are not an aux message .*: run the same version of kvroom"):
        aux_message.decode_aux(on_the_wire(**fields))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\xc1",
        b"{}",
        msgspec.msgpack.encode({"tokens": 3}),
        msgspec.msgpack.encode({"version": 1}),
        msgspec.msgpack.encode({"version": "1", "tokens": 3}),
        msgspec.msgpack.encode([1, 3]),
        on_the_wire(cached_tokens=2)[:-1],
        on_the_wire() + b"\x00",
        b"\x81\xa7version\xa2\xff\xfe",  # text that is not UTF-8
    ],
)
def test_bytes_that_are_no_message_are_refused_with_their_number(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=f"sent {len(data)} bytes of aux that are not an aux message"):
        aux_message.decode_aux(data)


@given(st.binary(max_size=300))
@example(b"\xdf\xff\xff\xff\xff")  # a map that says it has 2**32 entries
@example(b"\x91" * 300)  # lists in lists
def test_garbage_raises_the_one_error_or_is_a_message(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        aux_message.decode_aux(data)
        assert msgspec.msgpack.decode(data)["version"] == 1


@given(messages, st.data())
def test_a_message_with_one_byte_changed_is_read_or_refused(aux: Aux, data: st.DataObject) -> None:
    message = bytearray(aux_message.encode_aux(aux))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    try:
        read = aux_message.decode_aux(bytes(message))
    except RemoteProtocolError:
        return
    assert 0 <= read.tokens <= LARGEST
    assert read.first_token is None or 0 <= read.first_token <= LARGEST
