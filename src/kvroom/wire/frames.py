"""Frames: a 4-byte big-endian length, then that many bytes of msgpack, which are decoded strictly.

    0        4                 4 + length
    | length | body (msgpack)  |

Invalid bytes raise `RemoteProtocolError` and nothing else. A reader that raised it raises it again in every later call,
because after an invalid frame the start of the next one is unknown.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvroom.core.messages import Message, Text
from kvroom.errors import LimitExceeded, RemoteProtocolError

PREFIX_BYTES = 4
MAX_ROOM_FRAME_BYTES = 16 << 20
MAX_STRANGER_FRAME_BYTES = 64 << 10
"""The limit for a peer that has not proven the secret yet."""

Seq = Annotated[int, Meta(ge=0)]
"""uint64: msgpack has no larger int, and msgspec cannot state the upper bound."""


class FrameReader:
    """Cuts a byte stream into frame bodies. `limit_bytes` may be changed between frames, as the handshake does.

    `feed` any number of bytes, then call `next_frame` until it returns None. The reader keeps one frame under the limit
    at most, and the bytes fed since the last `next_frame`.
    """

    def __init__(self, limit_bytes: int = MAX_ROOM_FRAME_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._error: str | None = None

    @property
    def pending_bytes(self) -> int:
        """Return the bytes fed and not yet returned. Above 0 at the end of a stream, it was cut within a frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append bytes of the stream. Raises `RemoteProtocolError` after an invalid frame."""
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """Return the body of the next complete frame, or None.

        Raises `RemoteProtocolError` for a frame that is empty or over the limit, and in all calls after that.
        """
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        if len(self._buffer) < PREFIX_BYTES:
            return None
        length = int.from_bytes(self._buffer[:PREFIX_BYTES], "big")
        if not 0 < length <= self.limit_bytes:
            self._error = f"invalid frame of {length} bytes, expected 1 to {self.limit_bytes}; is this a kvroom peer?"
            self._buffer.clear()
            raise RemoteProtocolError(self._error)
        end = PREFIX_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[PREFIX_BYTES:end])
        del self._buffer[:end]
        return body


class Ping(msgspec.Struct, frozen=True, tag=True):
    """A heartbeat; the peer answers with `Pong` immediately."""


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Ping`."""


class Open(msgspec.Struct, frozen=True, tag=True):
    """This connection is the link from now on. Only the peer with the lower incarnation sends it.

    `number` grows with every link that the sender opens, so that of two `Open`s on two connections the later one wins.
    """

    number: Seq


class Spare(msgspec.Struct, frozen=True, tag=True):
    """This connection is a duplicate and ends now: the two peers are linked by another one, and nothing was lost."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The last frame of a link, with the reason for which its sender ends it."""

    detail: Text


Control = Ping | Pong | Open | Spare | Goodbye


MachineDigest = Annotated[str, Meta(pattern=r"\A([0-9a-f]{32})?\Z")]
"""128 bits as hex that identify a machine; empty if it has no unique identity."""


class AskFate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A question to a manager on the same machine as a lost process: has that process ended? It concerns no room.

    The fields are those that the lost process had stated about itself.
    """

    boot: Annotated[str, Meta(min_length=1, max_length=64)]
    pid_namespace: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    time_namespace: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    started: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    machine: MachineDigest


class TellFate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to `AskFate`, repeated in `about`. The process was looked up after the question had arrived."""

    about: AskFate
    fate: Literal["gone", "running", "unknown"]


Inquiry = AskFate | TellFate
"""Messages between managers about processes of their machines."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Every frame after the handshake. `seq` rises with each message of the sender; 0 on `Control`."""

    seq: Seq
    message: Message | Control | Inquiry


_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All errors that msgspec's decoder raises for invalid bytes. In 0.22 the last two are not wrapped in its own class."""


def encode_frame(body: bytes, limit_bytes: int = MAX_ROOM_FRAME_BYTES) -> bytes:
    """Return the prefix and the body. Raises `LimitExceeded` for a body that the peer would refuse."""
    if len(body) > limit_bytes:
        raise LimitExceeded(
            f"frame of {len(body)} bytes is over the limit of {limit_bytes}: send fewer pages in one call"
        )
    return len(body).to_bytes(PREFIX_BYTES, "big") + body


def encode_envelope(seq: int, message: Message | Control | Inquiry) -> bytes:
    """Return one whole frame with its prefix. Raises `LimitExceeded` for a message that is too large."""
    return encode_frame(_encoder.encode(Envelope(seq, message)))


def decode_envelope(body: bytes) -> Envelope:
    """Return the envelope in a frame body. Raises `RemoteProtocolError` for any other bytes."""
    try:
        return _envelopes.decode(body)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"frame of {len(body)} bytes is not a message: {error}") from None
