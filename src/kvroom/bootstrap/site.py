"""An aiohttp application on a socket, as a block: when it is left, no connection is open and none can come.

aiohttp's own sites close their server as it stands, which loses connections (see `accepting`), and its runner leaves
open whatever still has bytes for a client that does not read. That is why the server is made and closed here.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from kvroom.bootstrap.accepting import stop_accepting
from kvroom.errors import ConfigurationError
from kvroom.wire.address import HostPort, listen_error

BACKLOG = 128


@asynccontextmanager
async def http_site(
    app: web.Application, where: HostPort | socket.socket, *, shutdown_s: float, backlog: int = BACKLOG
) -> AsyncIterator[int]:
    """Serve `app` at an address (port 0: any free one) or on a bound socket, and yield the port.

    `ConfigurationError` if it cannot listen there; nothing is open then, except the socket that was given. On leaving,
    handlers get `shutdown_s` to end, then they are cancelled; what a client has not taken by then is dropped. A socket
    that was given is closed.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=shutdown_s, handler_cancellation=True)
    await runner.setup()
    assert runner.server is not None  # from setup to cleanup
    try:
        server = await _listen(runner.server, where, backlog)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            await stop_accepting(server)
    finally:
        transports = [connection.transport for connection in runner.server.connections]
        await runner.cleanup()
        for transport in transports:
            if transport is not None:
                transport.abort()  # one that is closed already stays so
        await asyncio.sleep(0)  # the turn in which the sockets of aborted transports are closed


async def _listen(protocols: web.Server, where: HostPort | socket.socket, backlog: int) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    try:
        if isinstance(where, socket.socket):
            return await loop.create_server(protocols, sock=where, backlog=backlog)
        return await loop.create_server(protocols, where.host, where.port, backlog=backlog)
    except OSError as error:
        named = where if isinstance(where, HostPort) else HostPort(*where.getsockname()[:2])
        raise ConfigurationError(listen_error(named, error)) from None
