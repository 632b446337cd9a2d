"""Frames: a 4-byte big-endian length, then that many bytes of msgpack. What is inside is decoded strictly.

    0        4                 4 + length
    | length | body (msgpack)  |

Garbage yields `RemoteProtocolError` and nothing else, and a reader that raised it stays dead: after a bad frame
nobody knows where the next one starts.
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
"""The limit for a peer that has not proven anything yet."""

Seq = Annotated[int, Meta(ge=0)]
"""uint64: msgpack has no larger int, and msgspec cannot state the upper bound."""


class FrameReader:
    """Cuts a byte stream into frame bodies. `limit_bytes` may be changed between frames (the handshake does).

    `feed` any number of bytes, then call `next_frame` until it returns None. Memory: at most one frame under the
    limit plus what was fed since the last `next_frame`.
    """

    def __init__(self, limit_bytes: int = MAX_ROOM_FRAME_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._error: str | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes that were fed and not returned. Not 0 at the end of a stream: it was cut in the middle of a frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append what the stream delivered."""
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The body of the next complete frame, or None. `RemoteProtocolError`: over the limit, empty, or dead."""
        if self._error is not None:
            raise RemoteProtocolError(self._error)
        if len(self._buffer) < PREFIX_BYTES:
            return None
        length = int.from_bytes(self._buffer[:PREFIX_BYTES], "big")
        if not 0 < length <= self.limit_bytes:
            self._error = f"frame of {length} bytes, allowed are 1 to {self.limit_bytes}; is this a kvroom peer?"
            self._buffer.clear()
            raise RemoteProtocolError(self._error)
        end = PREFIX_BYTES + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[PREFIX_BYTES:end])
        del self._buffer[:end]
        return body


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Are you there? Answered with `Pong` at once."""


class Pong(msgspec.Struct, frozen=True, tag=True):
    """I am."""


class Open(msgspec.Struct, frozen=True, tag=True):
    """This connection is the link between us from here on. Only the peer with the lower incarnation says so.

    `number` grows with every link that this peer opens, so that of two `Open`s on two connections the later one wins.
    """

    number: Seq


class Spare(msgspec.Struct, frozen=True, tag=True):
    """We are linked through another connection already; this one ends now, and nothing was lost."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The last frame of a link: why its sender ends it."""

    detail: Text


Control = Ping | Pong | Open | Spare | Goodbye


MachineDigest = Annotated[str, Meta(pattern=r"\A([0-9a-f]{32})?\Z")]
"""128 bits as hex that tell a machine from all others; empty where it cannot be told from others."""


class AskFate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Is this process gone? Asked of a manager of its machine, by what that one has stated; about no room."""

    boot: Annotated[str, Meta(min_length=1, max_length=64)]
    pid_namespace: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    time_namespace: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    started: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    machine: MachineDigest


class TellFate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to that question, about that very process, found out after it was asked."""

    about: AskFate
    fate: Literal["gone", "running", "unknown"]


Inquiry = AskFate | TellFate
"""What managers say to each other about processes of their machines."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Every frame after the handshake. `seq` is monotone per sending incarnation; 0 on `Control`."""

    seq: Seq
    message: Message | Control | Inquiry


_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Everything that msgspec's decoder raises for bytes it does not like (0.22: the last two escape its own class)."""


def encode_frame(body: bytes, limit_bytes: int = MAX_ROOM_FRAME_BYTES) -> bytes:
    """Prefix and body. `LimitExceeded` for a body that the peer would refuse; nothing was sent."""
    if len(body) > limit_bytes:
        raise LimitExceeded(f"frame of {len(body)} bytes is over the limit of {limit_bytes}: send fewer pages at once")
    return len(body).to_bytes(PREFIX_BYTES, "big") + body


def encode_envelope(seq: int, message: Message | Control | Inquiry) -> bytes:
    """One whole frame, prefix included."""
    return encode_frame(_encoder.encode(Envelope(seq, message)))


def decode_envelope(body: bytes) -> Envelope:
    """The inverse of `encode_envelope` without the prefix; `RemoteProtocolError` for anything else."""
    try:
        return _envelopes.decode(body)
    except UNDECODABLE as error:
        raise RemoteProtocolError(f"frame of {len(body)} bytes is not a message: {error}") from None
