"""The pure decoders of everything that a stranger or a peer may send, each with valid inputs to mutate.

A decoder returns a value or raises a `KVRoomError`. Any other exception is a bug, even if a caller catches it.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from kvroom.bootstrap import client, directory, sign
from kvroom.bootstrap.directory import RankInfo
from kvroom.core.causes import Cause
from kvroom.core.identity import KVIdentity, mismatch
from kvroom.core.messages import (
    Abort,
    ChecksumsAgree,
    Decline,
    Done,
    Failure,
    Offer,
    Peer,
    Progress,
    Quiesced,
    Renew,
    Window,
)
from kvroom.core.phases import Side
from kvroom.errors import KVRoomError
from kvroom.plan import KVLayout, Planner
from kvroom.runtime.agreement import rooms as agreement
from kvroom.runtime.remote import PeerProfile, identities
from kvroom.serve import schema
from kvroom.transports.kit import claims, machine
from kvroom.transports.kit.data_keys import InstanceKey
from kvroom.transports.kit.descriptions import decoded, read_description
from kvroom.transports.local import peer as local_peer
from kvroom.transports.onesided import engine as onesided
from kvroom.transports.onesided.packing import protocol as packing
from kvroom.transports.tcp import frames as tcp
from kvroom.wire import aux_message, handshake
from kvroom.wire.address import parse_address, read_url
from kvroom.wire.aux_message import Aux
from kvroom.wire.frames import (
    UNDECODABLE,
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
from kvroom.wire.keys import SigningKey
from kvroom_lab.pools import TestPool


class Target(NamedTuple):
    """`decode` takes any bytes; `seeds` are inputs that it accepts."""

    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def _messages() -> tuple[bytes, ...]:
    identity = KVIdentity.of([1, 2, 3])
    failure = Failure(
        side=Side.SOURCE, phase="SENDING", peer="10.0.0.1:9", detail="the engine was stopped", cause=Cause.ABORTED
    )
    messages: tuple[Any, ...] = (
        Offer(
            room=1,
            generation=2,
            start=0,
            stop=40,
            pages=(1, 2, 3),
            identity=identity,
            grant=b"g" * 16,
            checksum=True,
            tokens=50,
            windows=(Window("w", (1,)),),
            sinks=2,
            parts=((0, 1, 2, 3),),
        ),
        Renew(room=1, generation=2),
        Progress(room=1, generation=2, tokens=3, idle=True),
        Done(
            room=1,
            generation=2,
            tokens=40,
            nbytes=1000,
            identity=identity,
            aux=b"aux",
            took_s=0.5,
            checksum=77,
            spans=((0, 40),),
        ),
        ChecksumsAgree(room=1, generation=2),
        Abort(room=1, generation=2, failure=failure),
        Decline(room=1, generation=2, failure=failure),
        Quiesced(room=1, generation=2, failure=failure),
    )
    controls: tuple[Control, ...] = (Ping(), Pong(), Open(3), Spare(), Goodbye("it is shutting down"))
    return tuple(encode_envelope(5, message)[4:] for message in (*messages, *controls))


def _take_message(data: bytes) -> None:
    """Decode a message and compare the identity that it states with another, as a room does."""
    message = decode_envelope(data).message
    if isinstance(message, Offer | Done):
        mismatch(KVIdentity.of([1, 2, 3]), message.identity)


def _read_stream(data: bytes) -> None:
    reader = FrameReader(1 << 16)
    reader.feed(data)
    while (body := reader.next_frame()) is not None:
        decode_envelope(body)


_HELLO = handshake.Hello(
    magic="kvroom", versions=handshake.VERSIONS, nonce=b"n" * 32, address="10.0.0.1:9", incarnation=5
)


def _shake_hands(data: bytes) -> None:
    """Take the data as the first frame, and as the second after a good hello, of either role."""
    for role in handshake.Role:
        for before in ((), (msgspec.msgpack.encode(_HELLO),)):
            hands = handshake.Handshake(
                role, b"s" * 32, Peer("10.0.0.2:9", 7), lambda _: handshake.LinkIdentity(b"me", 1)
            )
            for body in (*before, data):
                try:
                    hands.receive(body)
                except KVRoomError:
                    break


def _layout() -> KVLayout:
    pool = TestPool()
    try:
        return pool.layout
    finally:
        pool.close()


_PROCESS = machine.Process("boot", 1, 7, 100, 0)
_LAYOUT = _layout()  # only its numbers are used


def _plan(data: bytes) -> None:
    """Read a peer's description of its memory and plan a hand-off with it, as the driver does."""
    try:
        identity = identities.decode(data)
    except UNDECODABLE:
        return
    Planner(_LAYOUT, identity.layout)


def _body(data: bytes, kind: type[Any]) -> Any:
    """Decode the body of a request as the directory does; None for one that it refuses."""
    try:
        return msgspec.json.decode(data, type=kind, strict=False)
    except UNDECODABLE:
        return None


def _register(data: bytes) -> None:
    rank = _body(data, RankInfo)
    if rank is not None:
        known = directory.Directory()
        known.register(rank, 0.0)
        known.server(0.0)


def _listed(data: bytes) -> None:
    answer = client._decoded("10.0.0.1:9", data, directory.RouteList)
    directory.check_listed("10.0.0.1:9", answer.ranks)
    for rank in answer.ranks:
        parse_address(rank.address)


def _agreement(data: bytes) -> None:
    for decoder in (agreement._room_lists, agreement._cause_lists):
        with contextlib.suppress(agreement.AgreementError):
            agreement._decoded(1, data, decoder)


def _query(data: bytes) -> None:
    for kind in (directory.DpRankQuery, directory.DpRankHints, directory.DpRankHint):
        _body(data, kind)


def _client_body(data: bytes) -> None:
    body = schema.decode_json(data)
    for route in ("generate", "completions", "chat"):
        schema.named_legs(route, body)
        with contextlib.suppress(KVRoomError):
            schema.parse(route, body)


def _tcp_frame(data: bytes) -> None:
    header = tcp.read_header(data[: tcp.HEADER.size].ljust(tcp.HEADER.size, b"\0"))
    size = 16 * header.blocks
    tcp.read_blocks(header, data[tcp.HEADER.size :][:size].ljust(size, b"\0"))


def _packing_request(data: bytes) -> None:
    found = packing.read_request(data[: packing.REQUEST.size].ljust(packing.REQUEST.size, b"\0"))
    size = 16 * found.blocks
    packing.read_blocks(found, data[packing.REQUEST.size :][:size].ljust(size, b"\0"))


def _text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: read(data.decode("utf-8", "surrogateescape"))


def _signed(data: bytes) -> None:
    sign.check_time(sign.check(b"s" * 16, data.decode("latin1"), "GET", "/route", b""), 5.0)


def _rank(**changes: Any) -> bytes:
    return msgspec.json.encode(RankInfo(rank_ip="10.0.0.1", rank_port=9, page_size=16, **changes))


def _client_bodies() -> tuple[bytes, ...]:
    routed = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}
    bodies: tuple[dict[str, Any], ...] = (
        {**routed, "model": "m", "prompt": "a", "n": 2, "temperature": 0.5, "stop": ["a"], "logit_bias": {"5": 1}},
        {**routed, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "tools": [{"a": [1]}]},
        {"input_ids": [[1, 2], [3]], "sampling_params": {"top_k": 5, "n": 1}, "bootstrap_room": [1, 2], **routed},
    )
    return tuple(json.dumps(body).encode() for body in bodies)


def _local_description() -> bytes:
    process = machine.Process("boot", 4026531836, 7, 100, 0)
    ranges: dict[str, tuple[tuple[int, int], ...]] = {"cpu": ((4096, 8192),)}
    return msgspec.msgpack.encode(
        local_peer.LocalDescription(b"e" * 16, process, 4096, ranges, ((4096, 8192),), "kvroom-1", b"t" * 16)
    )


def _onesided_description() -> bytes:
    process = machine.Process("boot", 4026531836, 7, 100, 0)
    return msgspec.msgpack.encode(
        onesided.OneSidedDescription(_PUBLIC, process, 3, ((4096, 8192, "cpu"),), (9,), b"card")
    )


def _read_onesided(data: bytes) -> None:
    try:
        decoded(data, onesided.OneSidedDescription)
    except UNDECODABLE:
        return


def _claim() -> bytes:
    key = SigningKey()
    description = msgspec.msgpack.encode(tcp.TcpDescription("10.0.0.1", 9, key.public))
    return claims.signed(description, key, "tcp", b"owner")


_KEY, _PUBLIC = InstanceKey("tcp"), InstanceKey("tcp").public

TARGETS: dict[str, Target] = {
    "message": Target(_take_message, _messages()),
    "stream": Target(_read_stream, tuple(encode_frame(body) for body in _messages())),
    "handshake": Target(
        _shake_hands,
        tuple(
            msgspec.msgpack.encode(frame)
            for frame in (
                _HELLO,
                handshake.Proof(b"p" * 32),
                handshake.LinkIdentity(b"payload", 1, (1, 2)),
                handshake.Refused("protocol", "no"),
            )
        ),
    ),
    "memory": Target(
        _plan,
        (msgspec.msgpack.encode(PeerProfile(_LAYOUT, "tcp", b"description", machine.Process("boot", 1, 7, 100, 0))),),
    ),
    "agreement": Target(
        _agreement, (msgspec.msgpack.encode([0, 7, 2**63 - 1]), msgspec.msgpack.encode({7: "the pool is full"}))
    ),
    "aux": Target(
        aux_message.decode_aux, (aux_message.encode_aux(Aux(tokens=3, first_token=5, extra={"vllm": b"x"})),)
    ),
    "rank": Target(
        _register,
        (
            _rank(),
            _rank(attn_tp_size=4, attn_tp_rank=2, kv_heads=8),
            _rank(pp_size=2, pp_rank=1, stages=(3, 4)),
            _rank(system_dp_size=2, system_dp_rank=1, incarnation=5),
        ),
    ),
    "ranks": Target(_listed, (b'{"ranks": [' + _rank() + b"]}",)),
    "query": Target(
        _query,
        (
            b'{"bootstrap_rooms": [1, 2], "wait_s": 1}',
            b'{"dp_ranks": {"1": 2}}',
            b'{"bootstrap_room": 1, "dp_rank": 2}',
        ),
    ),
    "client": Target(_client_body, _client_bodies()),
    "tcp frame": Target(_tcp_frame, (tcp.HEADER.pack(1, 2, 32, b"t" * 16) + struct.pack("<4Q", 1, 2, 16, 16),)),
    "tcp description": Target(
        lambda data: _KEY.shared_with(tcp.checked(data).endpoint),
        (msgspec.msgpack.encode(tcp.TcpDescription("10.0.0.1", 9, _PUBLIC)),),
    ),
    "claim": Target(lambda data: claims.read(data, "tcp", b"owner"), (_claim(),)),
    "public key": Target(_KEY.shared_with, (_PUBLIC,)),
    "local description": Target(
        lambda data: read_description(data, local_peer.LocalDescription).check(), (_local_description(),)
    ),
    "one-sided description": Target(_read_onesided, (_onesided_description(),)),
    "packing": Target(_packing_request, (packing.REQUEST.pack(packing.UNPACK, 1, 0, b"g" * 16, 1) + bytes(16),)),
    "address": Target(_text(parse_address), (b"10.0.0.1:9", b"[fd00::1]:9", b"worker-3.pd.svc:1")),
    "url": Target(_text(read_url), (b"http://10.0.0.1:9", b"https://[fd00::1]", b"http://worker-3/")),
    "signature": Target(_signed, (sign.sign(b"s" * 16, "GET", "/route", b"", sign.Signed(5, bytes(32))).encode(),)),
}
