"""Liveness check of a registered prefill rank, by a connection to its manager.

A manager sends a `Hello` with its incarnation on each new connection (`kvroom.wire.handshake`). That is no proof of
identity, and the directory uses it for nothing except to decide whether this run still listens. The directory must
be able to reach its ranks at the addresses that decode workers use.
"""

from __future__ import annotations

import asyncio

from kvroom.dialling.dial import STAGGER_S
from kvroom.errors import RemoteProtocolError
from kvroom.wire.address import parse_address
from kvroom.wire.frames import MAX_STRANGER_FRAME_BYTES, FrameReader
from kvroom.wire.handshake import read_incarnation

from .directory import RankInfo

ASK_S = 1.0
"""Seconds for the connection and the `Hello`."""
_READ_BYTES = 1 << 12


async def is_alive(rank: RankInfo, timeout_s: float = ASK_S) -> bool | None:
    """Return True if this run of the rank listens at its address, False if it does not, None if that is unknown.

    False is certain: the connection was refused, or another run listens there. None means that no valid `Hello` arrived
    within `timeout_s`: the process may be stopped, or may be no manager.
    """
    where = parse_address(rank.address)
    try:
        incarnation = await asyncio.wait_for(_incarnation(where.host, where.port), timeout_s)
    except ConnectionRefusedError:
        return False
    except (OSError, EOFError, asyncio.TimeoutError, RemoteProtocolError):
        return None
    return incarnation == rank.incarnation or not rank.incarnation


async def _incarnation(host: str, port: int) -> int:
    reader, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=STAGGER_S)
    frames = FrameReader(MAX_STRANGER_FRAME_BYTES)
    try:
        while (body := frames.next_frame()) is None:
            data = await reader.read(_READ_BYTES)
            if not data:
                raise EOFError
            frames.feed(data)
    finally:
        writer.transport.abort()
    return read_incarnation(body)
