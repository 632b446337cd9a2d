"""The connections of an HTTP port: how many may be open, and which of them makes room for another.

A client that connects and says nothing, or sends half a request, costs a descriptor of this process for as long as it
likes, and links and hand-offs need descriptors, too. So each of such connections is closed when its time is over, and
the oldest of them as soon as half of the descriptors are taken.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

LEAST = 64
"""Connections that may be open whatever the descriptor limit is; at the limit itself the acceptor refuses them."""
REQUEST_S = 10.0
"""Seconds for the first request of a connection, and for the body of each, to come in whole."""
_SWEEP_S = 1.0


class Guests:
    """Makes the protocols of an HTTP server, and closes the connections that keep others out.

    `unavailable` makes the whole answer to a client for which there is no room, from a sentence.
    """

    def __init__(self, unavailable: Callable[[str], bytes]) -> None:
        self._unavailable = unavailable
        self._server: web.Server | None = None
        self._requests: dict[web.RequestHandler, web.BaseRequest] = {}
        self._known: set[web.RequestHandler] = set()
        self._came_s: dict[web.RequestHandler, float] = {}

    def attach(self, server: web.Server) -> None:
        """Serve the connections of this server from now on."""
        self._server = server

    def __call__(self) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection, and close another one if there are too many."""
        assert self._server is not None  # attached before anything listens
        open_now = [guest for guest in self._server.connections if guest.transport is not None]  # None: being closed
        if len(open_now) >= max(LEAST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2):
            # Busy is one with a request that has come in whole and is being answered.
            busy = {guest for guest, request in self._requests.items() if request.content.is_eof()}
            silent = next((guest for guest in open_now if guest not in busy), None)
            if silent is None:
                return _TurnedAway(self._unavailable(f"{len(open_now)} requests are being answered: try again later"))
            silent.force_close()
        return self._server()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note that a connection has a request, and close it if the body does not come in time. The outermost one."""
        guest = request.protocol
        self._known.add(guest)
        self._requests[guest] = request

        def cut_unfinished() -> None:
            if not request.content.is_eof():
                guest.force_close()

        cut = asyncio.get_running_loop().call_later(REQUEST_S, cut_unfinished)
        try:
            return await handler(request)
        finally:
            cut.cancel()
            self._requests.pop(guest, None)

    async def sweep(self) -> None:
        """Close, again and again, the connections whose first request has not come in time. Runs until cancelled."""
        assert self._server is not None
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            open_now = self._server.connections
            self._known.intersection_update(open_now)
            new = [guest for guest in open_now if guest not in self._known]
            self._came_s = {guest: self._came_s.get(guest, loop.time()) for guest in new}
            for guest, came_s in self._came_s.items():
                if loop.time() - came_s > REQUEST_S:
                    guest.force_close()


class _TurnedAway(asyncio.Protocol):
    """A connection for which there is no room: it gets one answer and is closed."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._answer)
        transport.close()
