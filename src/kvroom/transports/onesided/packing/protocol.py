"""The messages between a source that packs and the pack server of its sink. The handshake is that of `tcp`.

All integers are little-endian. An `UNPACK` is followed by dst[n] and length[n], uint64 each; a reply is followed by its
text. The sink answers the requests of a connection in the order in which they arrived.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec
import numpy as np

from kvroom.errors import GrantRevoked, RemoteProtocolError, TransportError
from kvroom.plan.blocks import U64
from kvroom.transports.kit.gather import ByteRuns

REQUEST = struct.Struct("<BQQ16sI")
REPLY = struct.Struct("<QBQH")
HELLO, LEASE, WAIT, UNPACK, RELEASE = range(1, 6)
DONE, REFUSED, REVOKED, BUSY = range(4)
GRANT_BYTES = 16
MAX_BLOCKS = 1 << 16
# Per connection: the engine writes one slot while the sink unpacks the other. More would let one source take all slots.
MAX_LEASES = 2
_TEXT_BYTES = 1 << 15


class Area(msgspec.Struct, frozen=True):
    """The staging slots of a sink, and the address of the pack server that leases them."""

    address: int
    """Start of slot 0 in the sink's memory; slot i starts at `address + i * slot_bytes`."""
    slots: int
    slot_bytes: int
    host: str
    port: int


class PackRequest(NamedTuple):
    """A request of a source.

    `HELLO` opens a connection: the source has no write in flight. The reply confirms that the sink has ended every
    older connection of this source, so nothing that was sent over one is unpacked after it. `LEASE` asks for a slot
    that is free now, `WAIT` for one that becomes free within the server's `wait_s`. `UNPACK` and `RELEASE` state that
    the write into a leased slot is over: scatter its bytes, or discard them. `slot`, `grant` and `blocks` are 0 where
    unused.
    """

    kind: int
    number: int
    slot: int
    grant: bytes
    blocks: int


class PackReply(NamedTuple):
    """The reply to the request of this number: its verdict, the slot that was leased (else 0), and an error text."""

    number: int
    verdict: int
    slot: int
    text: str


def request(kind: int, number: int, slot: int, grant: bytes, runs: ByteRuns | None = None) -> bytes:
    """Encode a request. `runs`: the blocks of an `UNPACK` (dst and length, uint64[n] each)."""
    if runs is None:
        return REQUEST.pack(kind, number, slot, grant, 0)
    head = REQUEST.pack(kind, number, slot, grant, runs.length.size)
    return b"".join((head, *(part.astype("<u8", copy=False).tobytes() for part in runs)))


def read_request(raw: bytes) -> PackRequest:
    """Decode the fixed part of a request; raise `RemoteProtocolError` for an unknown kind or number of blocks."""
    found = PackRequest(*REQUEST.unpack(raw))
    fewest, most = (1, MAX_BLOCKS) if found.kind == UNPACK else (0, 0)
    if not HELLO <= found.kind <= RELEASE or not fewest <= found.blocks <= most:
        raise RemoteProtocolError(
            f"invalid request of kind {found.kind} with {found.blocks} blocks: the limit is {MAX_BLOCKS} for UNPACK, "
            "and 0 for all others"
        )
    return found


def read_blocks(found: PackRequest, raw: bytes) -> tuple[U64, U64]:
    """Decode the blocks of an `UNPACK`: dst and length, uint64[n] each."""
    dst, length = np.frombuffer(raw, dtype="<u8").reshape(2, found.blocks)
    return dst, length


def reply(number: int, verdict: int, slot: int = 0, text: str = "") -> bytes:
    """Encode a reply; a text longer than 32 KiB is cut."""
    encoded = text.encode()[:_TEXT_BYTES]
    return REPLY.pack(number, verdict, slot, len(encoded)) + encoded


def verdict_of(error: TransportError) -> int:
    """Return the verdict that reports this error to the source."""
    return REVOKED if isinstance(error, GrantRevoked) else REFUSED


def refusal(name: str, answer: PackReply) -> TransportError | None:
    """Return the error that a reply reports, under the transport's `name`; None if the request was carried out."""
    if answer.verdict == DONE:
        return None
    kind = GrantRevoked if answer.verdict == REVOKED else TransportError
    return kind(f"{name}: the peer refused the transfer: {answer.text}")
