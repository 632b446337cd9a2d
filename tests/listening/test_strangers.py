"""Strangers and peers cannot fill a log: it gets at most one line a second for each kind of error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable

import pytest

from kvroom import KVBootstrapServer, KVManager
from kvroom.core.messages import Message, Peer
from kvroom.errors import AuthenticationError
from kvroom.runtime.link import Links
from kvroom.wire.address import parse_address
from kvroom.wire.frames import Inquiry
from kvroom.wire.keys import RunKey
from kvroom_lab.pools import TestPool

from .crowded import Silent

SECRET, OTHER = b"a secret for tests, long enough", b"another secret, as long as that"
TIMES = 60
GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x00\x00\x00\x03abc",
    b"\xff" * 64,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


async def told(address: str, garbage: bytes) -> None:
    """Send bytes to a server and read until it closes the connection."""
    reader, writer = await asyncio.open_connection(*parse_address(address))
    writer.write(garbage)
    with contextlib.suppress(ConnectionError):
        writer.write_eof()
        while await reader.read(1 << 16):
            pass
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def check(caplog: pytest.LogCaptureFixture, began_s: float, times: int, kinds: int = 1) -> None:
    """Assert at most one line a second of each kind, no traceback, and a count that is not too high."""
    lines = [
        record.getMessage() for record in caplog.records if record.name.startswith(("kvroom", "aiohttp", "asyncio"))
    ]
    assert len(lines) <= kinds * (time.monotonic() - began_s + 1), lines
    assert not [record for record in caplog.records if record.exc_info]
    counted = sum(int(found[1]) for line in lines if (found := re.search(r"\(and (\d+) more", line)))
    assert len(lines) + counted <= times


def run(body: Callable[[], Awaitable[None]]) -> float:
    began_s = time.monotonic()

    async def main() -> None:
        await body()

    asyncio.run(main())
    return began_s


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_at_the_port_of_a_manager(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        links = Links(Silent(), identity=b"", secret=SECRET)
        me = await links.start()
        for _ in range(TIMES):
            await told(me.address, garbage)
        assert links.refused == TIMES
        await links.close()

    check(caplog, run(body), TIMES)
    assert "no link with 127.0.0.1:" in caplog.text


def test_a_wrong_secret(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        ours, theirs = (Links(Silent(), identity=b"", secret=secret) for secret in (SECRET, OTHER))
        me = await ours.start()
        await theirs.start()
        for _ in range(TIMES):
            with pytest.raises(AuthenticationError):
                await theirs.dial(me.address)
        await ours.close()
        await theirs.close()

    check(caplog, run(body), 2 * TIMES, kinds=2)
    assert "the shared secrets of" in caplog.text


@pytest.mark.parametrize(
    "garbage", [*GARBAGE, b"GET /nowhere HTTP/1.1\r\n\r\n", b"PUT /route HTTP/1.1\r\nHost: a\r\n\r\n{"]
)
def test_garbage_at_a_directory(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with KVBootstrapServer() as server:
            for _ in range(TIMES):
                await told(server.address, garbage)

    check(caplog, run(body), TIMES)


class Announcing(Silent):
    """Handler that reports each link that comes and goes."""

    def __init__(self) -> None:
        self.lost: asyncio.Event = asyncio.Event()

    def on_lost(self, peer: Peer, detail: str) -> None:
        self.lost.set()

    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None: ...


def test_a_peer_that_links_and_leaves_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(TestPool()) as pool, KVManager(pool.layout, transport="memory") as manager:

        async def body() -> None:
            handler = Announcing()
            key = RunKey()
            peer = Links(handler, identity=manager.driver.peers.describe(key.incarnation), key=key)
            await peer.start()
            for _ in range(TIMES):
                peer.drop(await peer.dial(manager.address), "only a visit")
                await handler.lost.wait()
                handler.lost.clear()
            await peer.close()

        check(caplog, run(body), 4 * TIMES, kinds=3)
        assert "only a visit" in caplog.text


def test_a_port_scan_of_connections_that_say_nothing_and_leave(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(TestPool()) as pool, KVManager(pool.layout, transport="tcp") as manager:
        began_s = time.monotonic()
        for _ in range(TIMES):
            socket.create_connection(parse_address(manager.address)).close()
        check(caplog, began_s, TIMES)
