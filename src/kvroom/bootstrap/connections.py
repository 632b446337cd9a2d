"""A limit on the open connections of an HTTP port.

A client that connects and sends nothing, or only half a request, occupies a descriptor of this process for as long as
it wants, and links and hand-offs need descriptors too. Such a connection is therefore closed after `REQUEST_S`. When
connections take half of the descriptors, a new one closes the oldest connection whose request is not being answered.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

MIN_CONNECTIONS = 64
"""Connections that are allowed under any descriptor limit. At that limit itself the acceptor refuses connections."""
REQUEST_S = 10.0
"""Seconds in which the first request of a connection, and the body of each request, must arrive completely."""
_SWEEP_S = 1.0


class ConnectionLimit:
    """A protocol factory for an HTTP server that closes incomplete connections when there are too many.

    `unavailable` turns a sentence into the complete HTTP answer for a client that is refused.
    """

    def __init__(self, unavailable: Callable[[str], bytes]) -> None:
        self._unavailable = unavailable
        self._server: web.Server | None = None
        self._requests: dict[web.RequestHandler, web.BaseRequest] = {}
        self._had_request: set[web.RequestHandler] = set()
        self._opened_s: dict[web.RequestHandler, float] = {}  # of connections that have had no request yet

    def attach(self, server: web.Server) -> None:
        """Limit the connections of this server from now on. Call it before the server listens."""
        self._server = server

    def __call__(self) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection; close an incomplete one, or refuse, if there are too many."""
        assert self._server is not None  # attached before the server listens
        # A connection without transport is being closed.
        open_now = [connection for connection in self._server.connections if connection.transport is not None]
        if len(open_now) >= max(MIN_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2):
            # A connection is busy while a request that has arrived completely is being answered.
            busy = {connection for connection, request in self._requests.items() if request.content.is_eof()}
            idle = next((connection for connection in open_now if connection not in busy), None)
            if idle is None:
                return _RefusedConnection(self._unavailable(f"too many open requests ({len(open_now)}): retry later"))
            idle.force_close()
        return self._server()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Record that a connection has a request, and close the connection if the body does not arrive in time.

        Must be the outermost middleware, because the others may read the body.
        """
        connection = request.protocol
        self._had_request.add(connection)
        self._requests[connection] = request

        def close_incomplete() -> None:
            if not request.content.is_eof():
                connection.force_close()

        timer = asyncio.get_running_loop().call_later(REQUEST_S, close_incomplete)
        try:
            return await handler(request)
        finally:
            timer.cancel()
            self._requests.pop(connection, None)

    async def sweep(self) -> None:
        """Close connections whose first request does not arrive in time. Runs until it is cancelled."""
        assert self._server is not None
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            open_now = self._server.connections
            self._had_request.intersection_update(open_now)
            new = [connection for connection in open_now if connection not in self._had_request]
            self._opened_s = {connection: self._opened_s.get(connection, loop.time()) for connection in new}
            for connection, opened_s in self._opened_s.items():
                if loop.time() - opened_s > REQUEST_S:
                    connection.force_close()


class _RefusedConnection(asyncio.Protocol):
    """The protocol of a connection over the limit: it sends one answer and closes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._answer)
        transport.close()
