"""What travels on a data connection of `tcp`: the description, the frame header and the acknowledgement.

    source                                                    sink (listens)
      (the handshake of `kit.data_handshake`)
      header, dst[n], length[n], payload                   ->
                                                           <-  Ack: frame number, verdict, and why if it was refused
All integers are little-endian. An endpoint is a public key. Payload is neither encrypted nor authenticated.
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

HEADER = struct.Struct("<QIQ16s")
ACK = struct.Struct("<QBH")  # frame number, verdict, bytes of text
LANDED, REFUSED, REVOKED = range(3)

MAX_BLOCKS = 1 << 14
MAX_BYTES = 1 << 26


class TcpDescription(msgspec.Struct, frozen=True, tag="tcp"):
    """Where a sink listens for data, and its public key."""

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
        raise MalformedDescription(
            f"tcp: the peer's description says that it listens where nothing can: {error}"
        ) from None
    return msgspec.structs.replace(described, host=where.host)


class Header(NamedTuple):
    """The fixed part of a frame: its number on this connection, how many blocks and bytes follow, under which grant."""

    number: int
    blocks: int
    payload_bytes: int
    grant: bytes


def read_header(raw: bytes) -> Header:
    """Return the decoded header; raise `RemoteProtocolError` over the limits."""
    header = Header(*HEADER.unpack(raw))
    if not 0 < header.blocks <= MAX_BLOCKS or not 0 < header.payload_bytes <= MAX_BYTES:
        raise RemoteProtocolError(
            f"tcp: a frame of {header.blocks} blocks and {header.payload_bytes} bytes is over the limit"
            f" of {MAX_BLOCKS} blocks and {MAX_BYTES} bytes, or empty"
        )
    return header


def read_blocks(header: Header, raw: bytes) -> tuple[U64, U64]:
    """Return dst and length of the frame's blocks; raise `RemoteProtocolError` if they do not add up."""
    dst, length = np.frombuffer(raw, dtype="<u8").reshape(2, header.blocks)
    if int(length.max()) > MAX_BYTES or int(length.sum()) != header.payload_bytes:
        raise RemoteProtocolError("tcp: the block lengths of a frame do not add up to its payload")
    return dst, length


def frame_head(number: int, grant: bytes, runs: ByteRuns) -> bytes:
    """Return header and block arrays of one frame; the payload follows it on the connection."""
    dst, length = runs
    header = HEADER.pack(number, dst.size, int(length.sum()), grant)
    return b"".join((header, dst.astype("<u8", copy=False).tobytes(), length.astype("<u8", copy=False).tobytes()))


def verdict(refusal: TransportError | None) -> int:
    """How a frame ended, for its acknowledgement."""
    return LANDED if refusal is None else REVOKED if isinstance(refusal, GrantRevoked) else REFUSED


def refusal(code: int, text: str) -> TransportError | None:
    """What an acknowledgement says: None if every byte has landed."""
    if code == LANDED:
        return None
    kind = GrantRevoked if code == REVOKED else TransportError
    return kind(f"tcp: the peer refused the transfer: {text}")
