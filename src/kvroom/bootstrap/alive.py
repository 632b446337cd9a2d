"""Asking a process that has registered a prefill rank if it is still there.

A manager greets each connection with a `Hello` that has its incarnation (`kvroom.wire.handshake`). Nothing is proven by
it, and nothing is believed but that this run is there. The directory has to reach its ranks as decode workers do.
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
_READ_BYTES = 1 << 12


async def is_alive(rank: RankInfo, timeout_s: float = ASK_S) -> bool | None:
    """Return whether this run of the rank listens at its address. None: it could not be told within the time.

    False is certain: nothing listens there, or another run does. A process that is stopped, or is no manager, does not
    answer.
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
