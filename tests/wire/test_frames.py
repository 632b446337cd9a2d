"""Frames: invalid bytes yield a RemoteProtocolError or nothing, however the stream is cut."""

from __future__ import annotations

import contextlib
import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.core.identity import KVIdentity
from kvroom.core.messages import (
    Abort,
    ChecksumsAgree,
    Decline,
    Done,
    Failure,
    Message,
    Offer,
    Progress,
    Quiesced,
    Renew,
)
from kvroom.core.phases import Side
from kvroom.errors import LimitExceeded, RemoteProtocolError
from kvroom.wire.frames import (
    Control,
    FrameReader,
    Goodbye,
    Open,
    Ping,
    Pong,
    Spare,
    decode_envelope,
    encode_envelope,
    encode_frame,
)

uint63 = st.integers(0, 2**63 - 1)
uint64 = st.integers(0, 2**64 - 1)
text = st.text(max_size=40)
identities = st.builds(KVIdentity.of, st.lists(st.integers(0, 2**31)), adapter=st.none() | text, cache_salt=text)
failures = st.builds(Failure, side=st.sampled_from(Side), phase=text, peer=text, detail=text)
pages = st.lists(st.integers(0, 2**32 - 1)).map(tuple)
use = {"room": uint63, "generation": uint64}
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Offer, **use, start=uint63, stop=uint63, pages=pages, identity=identities),
    st.builds(Renew, **use),
    st.builds(Progress, **use, tokens=uint63, idle=st.booleans()),
    st.builds(Done, **use, tokens=uint63, nbytes=uint63, identity=identities, aux=st.binary()),
    st.builds(ChecksumsAgree, **use),
    st.builds(Abort, **use, failure=failures),
    st.builds(Decline, **use, failure=failures),
    st.builds(Quiesced, **use, failure=st.none() | failures),
)
controls: st.SearchStrategy[Control] = st.one_of(
    st.just(Ping()), st.just(Pong()), st.builds(Open, uint64), st.just(Spare()), st.builds(Goodbye, text)
)


def frames_of(reader: FrameReader) -> list[bytes]:
    found = []
    while (body := reader.next_frame()) is not None:
        found.append(body)
    return found


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    edges = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


@given(uint64, messages | controls)
def test_what_is_encoded_is_decoded(seq: int, message: Message | Control) -> None:
    reader = FrameReader()
    reader.feed(encode_envelope(seq, message))
    (body,) = frames_of(reader)
    envelope = decode_envelope(body)
    assert (envelope.seq, envelope.message) == (seq, message)
    assert reader.pending_bytes == 0


@given(st.lists(st.binary(min_size=1, max_size=50)), st.lists(st.integers(0, 10_000), max_size=20))
def test_frames_do_not_depend_on_how_the_stream_is_cut(bodies: list[bytes], borders: list[int]) -> None:
    stream = b"".join(encode_frame(body) for body in bodies)
    reader = FrameReader()
    found = []
    for piece in cut(stream, borders):
        reader.feed(piece)
        found += frames_of(reader)
    assert found == bodies


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=10))
def test_garbage_is_cut_alike_whole_and_in_pieces(garbage: bytes, borders: list[int]) -> None:
    def read(pieces: list[bytes]) -> tuple[list[bytes], bool]:
        reader, found = FrameReader(limit_bytes=64), []
        try:
            for piece in pieces:
                reader.feed(piece)
                while (body := reader.next_frame()) is not None:
                    found.append(body)
        except RemoteProtocolError:
            return found, True
        return found, False

    assert read([garbage]) == read(cut(garbage, borders)) == read([bytes([byte]) for byte in garbage])


@given(st.binary(max_size=200))
def test_a_garbage_body_is_a_protocol_error_or_a_message(body: bytes) -> None:
    try:
        envelope = decode_envelope(body)
    except RemoteProtocolError:
        return
    assert msgspec.msgpack.decode(body) is not None
    assert envelope.seq >= 0


@given(messages | controls, st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_damaged_message_is_a_protocol_error_or_a_message(message: Message | Control, at: int, damage: bytes) -> None:
    body = encode_envelope(7, message)[4:]
    start = at % len(body)
    with contextlib.suppress(RemoteProtocolError):
        decode_envelope(body[:start] + damage + body[start + len(damage) :])


@given(messages | controls, st.integers(0, 10_000))
def test_a_truncated_message_is_a_protocol_error(message: Message | Control, at: int) -> None:
    body = encode_envelope(7, message)[4:]
    with pytest.raises(RemoteProtocolError):
        decode_envelope(body[: at % len(body)])


def test_an_empty_or_too_long_frame_kills_the_reader() -> None:
    for header in (b"\0\0\0\0", b"\0\0\0\x41", b"GET / HTTP/1.1\r\n"):
        reader = FrameReader(limit_bytes=64)
        reader.feed(header)
        with pytest.raises(RemoteProtocolError, match="expected 1 to 64"):
            reader.next_frame()
        with pytest.raises(RemoteProtocolError, match="expected 1 to 64"):
            reader.feed(encode_frame(b"good"))
        with pytest.raises(RemoteProtocolError, match="expected 1 to 64"):
            reader.next_frame()
        assert reader.pending_bytes == 0


def test_a_frame_of_just_the_limit_passes_and_the_limit_may_change_between_frames() -> None:
    reader = FrameReader(limit_bytes=4)
    reader.feed(encode_frame(b"four") + encode_frame(b"longer"))
    assert reader.next_frame() == b"four"
    reader.limit_bytes = 6
    assert reader.next_frame() == b"longer"


def test_a_frame_that_the_peer_would_refuse_is_not_made() -> None:
    with pytest.raises(LimitExceeded, match="5 bytes is over the limit of 4"):
        encode_frame(b"12345", limit_bytes=4)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            msgspec.msgpack.encode([1, {"type": "Progress", "room": -1, "generation": 0, "tokens": 0}]), id="room"
        ),
        pytest.param(
            msgspec.msgpack.encode([1, {"type": "Progress", "room": 2**63, "generation": 0, "tokens": 0}]), id="big"
        ),
        pytest.param(
            msgspec.msgpack.encode([1, {"type": "Progress", "room": "1", "generation": 0, "tokens": 0}]), id="str"
        ),
        pytest.param(msgspec.msgpack.encode([1, {"type": "Nonsense", "room": 1}]), id="unknown"),
        pytest.param(msgspec.msgpack.encode([1, {"type": "Ping"}, 3]), id="more fields"),
        pytest.param(msgspec.msgpack.encode([-1, {"type": "Ping"}]), id="negative seq"),
        pytest.param(msgspec.msgpack.encode([1, {"type": "Goodbye", "detail": "x" * 1001}]), id="long text"),
        pytest.param(b"\x92\x01\x82\xa4type\xa4Ping\xa1x" + b"\x91" * 100_000 + b"\x01", id="deep"),
        pytest.param(b"\x92\x01\x82\xa4type\xa7Goodbye\xa5cause\xa2\xff\xfe", id="not utf-8"),
        pytest.param(encode_envelope(1, Ping())[4:] + b"\0", id="trailing"),
    ],
)
def test_wrong_types_ranges_and_shapes_are_protocol_errors(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="is not a message"):
        decode_envelope(body)
