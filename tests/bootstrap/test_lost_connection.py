"""A connection to a directory that is lost during a query is retried, and not reported as another protocol."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from kvroom.bootstrap import client
from kvroom.bootstrap.directory import NotReady

RESET = struct.pack("ii", 1, 0)  # linger for no time: closing sends a reset


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_connection_that_is_lost_before_the_answer_is_no_refusal(reset: bool) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.close()

    async def body() -> None:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(NotReady, match=rf"{address}: connection lost before it answered; is it up\?"):
                await client.query_dp_ranks(address, [7])

    asyncio.run(body())
