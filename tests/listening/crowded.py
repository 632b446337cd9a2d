"""A process with one server and a few descriptors: `crowded.py KIND`, where KIND is one of `SERVERS`.

When it listens, it lowers its descriptor limit to `FREE` more than it has open, and prints one line with the limit and
its address. Its log is on stderr, one line per record. It ends when its stdin is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from aiohttp import web

from kvroom import KVBootstrapServer
from kvroom.bootstrap.site import http_site
from kvroom.core.messages import Message, Peer
from kvroom.runtime.link import Links
from kvroom.transports.tcp.transport import TcpOptions, TcpTransport
from kvroom.wire.address import HostPort
from kvroom.wire.frames import Inquiry

FREE = 8


class Silent:
    """A `LinkHandler` that does nothing."""

    def on_up(self, peer: Peer, identity: bytes) -> None: ...
    def on_lost(self, peer: Peer, detail: str) -> None: ...
    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None: ...


@asynccontextmanager
async def site() -> AsyncIterator[str]:
    async def fails(request: web.Request) -> web.Response:
        raise ValueError(request.path)

    async def health(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/fails", fails)])
    async with http_site(app, HostPort("127.0.0.1", 0), shutdown_s=1) as port:
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def directory() -> AsyncIterator[str]:
    async with KVBootstrapServer() as server:
        yield server.address


@asynccontextmanager
async def links() -> AsyncIterator[str]:
    server = Links(Silent(), identity=b"")
    yield (await server.start()).address
    await server.close()


@asynccontextmanager
async def tcp() -> AsyncIterator[str]:
    with contextlib.closing(TcpTransport(TcpOptions(introduction_s=0.1))) as transport:
        yield transport.describe().hex()


SERVERS: dict[str, Callable[[], AbstractAsyncContextManager[str]]] = {
    one.__name__: one for one in (site, directory, links, tcp)
}


async def main(kind: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    async with SERVERS[kind]() as where:
        # Use the executor before the limit is set: its first use imports a module, which takes a descriptor.
        told_to_end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        limit = len(os.listdir("/proc/self/fd")) - 1 + FREE  # without the descriptor of the listing itself
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        print(limit, where, flush=True)
        await told_to_end


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
