"""What travels between a source that packs and the pack server of its sink. The handshake is that of `tcp`.

All integers are little-endian. An `UNPACK` is followed by dst[n] and length[n], uint64 each; a reply by its text. The
sink answers each request of a connection in the order in which they came.
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
MAX_LEASES = 2  # of one connection: one that is written while the other is unpacked
_TEXT_BYTES = 1 << 15


class Area(msgspec.Struct, frozen=True):
    """Where a sink's slots lie, and at which pack server they are asked for."""

    address: int
    slots: int
    slot_bytes: int
    host: str
    port: int


class PackRequest(NamedTuple):
    """`HELLO`: nothing of mine is on its way, nor is it unpacked any more once you answer.

    `LEASE` a slot if one is free, `WAIT` a while for one, `UNPACK` one of mine, or `RELEASE` it unread.
    """

    kind: int
    number: int
    slot: int
    grant: bytes
    blocks: int


class PackReply(NamedTuple):
    """How the request of this number ended, and the slot that was leased."""

    number: int
    verdict: int
    slot: int
    text: str


def request(kind: int, number: int, slot: int, grant: bytes, runs: ByteRuns | None = None) -> bytes:
    """Return an encoded request."""
    if runs is None:
        return REQUEST.pack(kind, number, slot, grant, 0)
    head = REQUEST.pack(kind, number, slot, grant, runs.length.size)
    return b"".join((head, *(part.astype("<u8", copy=False).tobytes() for part in runs)))


def read_request(raw: bytes) -> PackRequest:
    """Return the decoded request; raise `RemoteProtocolError` for one that cannot be."""
    found = PackRequest(*REQUEST.unpack(raw))
    fewest, most = (1, MAX_BLOCKS) if found.kind == UNPACK else (0, 0)
    if not HELLO <= found.kind <= RELEASE or not fewest <= found.blocks <= most:
        raise RemoteProtocolError(
            f"a request of kind {found.kind} with {found.blocks} blocks: the limit is {MAX_BLOCKS}, for unpacking only"
        )
    return found


def read_blocks(found: PackRequest, raw: bytes) -> tuple[U64, U64]:
    """Return dst and length of an `UNPACK`, uint64[n] each."""
    dst, length = np.frombuffer(raw, dtype="<u8").reshape(2, found.blocks)
    return dst, length


def reply(number: int, verdict: int, slot: int = 0, text: str = "") -> bytes:
    """Return an encoded reply."""
    encoded = text.encode()[:_TEXT_BYTES]
    return REPLY.pack(number, verdict, slot, len(encoded)) + encoded


def verdict_of(error: TransportError) -> int:
    """How a request ended that raised this."""
    return REVOKED if isinstance(error, GrantRevoked) else REFUSED


def refusal(name: str, answer: PackReply) -> TransportError | None:
    """What a reply says: None if what was asked for was done."""
    if answer.verdict == DONE:
        return None
    kind = GrantRevoked if answer.verdict == REVOKED else TransportError
    return kind(f"{name}: the peer refused the transfer: {answer.text}")
