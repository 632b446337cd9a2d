"""The wire format of `tcp`: the description, the frame header and the acknowledgement.

    source                                                    sink (listens)
      (the handshake of `kit.data_handshake`)
      header, dst[n], length[n], payload                   ->
                                                           <-  Ack: frame number, verdict, and the reason for a refusal

All integers are little-endian. An endpoint is a public key. The payload is neither encrypted nor authenticated.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec
import numpy as np

from kvroom.errors import ConfigurationError, GrantRevoked, RemoteProtocolError, TransportError
from kvroom.plan.blocks import U64
from kvroom.transports.base import MalformedDescription
from kvroom.transports.kit.descriptions import read_description
from kvroom.transports.kit.gather import ByteRuns
from kvroom.wire.address import HostPort
from kvroom.wire.keys import PUBLIC_KEY_BYTES

HEADER = struct.Struct("<QIQ16s")  # the fields of `Header`
ACK = struct.Struct("<QBH")  # frame number, verdict, bytes of text
LANDED, REFUSED, REVOKED = range(3)

MAX_BLOCKS = 1 << 14
MAX_BYTES = 1 << 26


class TcpDescription(msgspec.Struct, frozen=True, tag="tcp"):
    """The address on which a sink listens for data, and its public key."""

    host: str
    port: int
    endpoint: bytes


def checked(raw: bytes) -> TcpDescription:
    """Return the decoded description, or raise as `read_description` does."""
    described = read_description(raw, TcpDescription)
    if len(described.endpoint) != PUBLIC_KEY_BYTES:
        raise MalformedDescription("tcp: the peer's description has a public key of the wrong size")
    try:
        where = HostPort.to_dial(described.host, described.port)
    except ConfigurationError as error:
        raise MalformedDescription(f"tcp: the peer's description has an invalid address: {error}") from None
    return msgspec.structs.replace(described, host=where.host)


class Header(NamedTuple):
    """The fixed part of a frame: its number on this connection, the blocks and bytes that follow, and their grant."""

    number: int
    blocks: int
    payload_bytes: int
    grant: bytes


def read_header(raw: bytes) -> Header:
    """Return the decoded header. Raise `RemoteProtocolError` if it is empty or exceeds a limit."""
    header = Header(*HEADER.unpack(raw))
    if not 0 < header.blocks <= MAX_BLOCKS or not 0 < header.payload_bytes <= MAX_BYTES:
        raise RemoteProtocolError(
            f"tcp: invalid frame of {header.blocks} blocks and {header.payload_bytes} bytes: it must not be empty,"
            f" and the limits are {MAX_BLOCKS} blocks and {MAX_BYTES} bytes"
        )
    return header


def read_blocks(header: Header, raw: bytes) -> tuple[U64, U64]:
    """Return the destinations and lengths of a frame's blocks; raise `RemoteProtocolError` if they do not add up."""
    dst, length = np.frombuffer(raw, dtype="<u8").reshape(2, header.blocks)
    if int(length.max()) > MAX_BYTES or int(length.sum()) != header.payload_bytes:
        raise RemoteProtocolError("tcp: the block lengths of a frame do not add up to its payload")
    return dst, length


def frame_head(number: int, grant: bytes, runs: ByteRuns) -> bytes:
    """Return the header and block arrays of one frame. The payload follows them on the connection."""
    dst, length = runs
    header = HEADER.pack(number, dst.size, int(length.sum()), grant)
    return b"".join((header, dst.astype("<u8", copy=False).tobytes(), length.astype("<u8", copy=False).tobytes()))


def verdict(refusal: TransportError | None) -> int:
    """Return the code for an acknowledgement of a frame with this outcome."""
    return LANDED if refusal is None else REVOKED if isinstance(refusal, GrantRevoked) else REFUSED


def refusal(code: int, text: str) -> TransportError | None:
    """Return the error that an acknowledgement carries, or None if every byte has landed."""
    if code == LANDED:
        return None
    kind = GrantRevoked if code == REVOKED else TransportError
    return kind(f"tcp: the peer refused the transfer: {text}")
