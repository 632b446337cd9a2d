"""An aiohttp application on a socket, as a context manager: after it, no connection is open and none can be made.

aiohttp's own sites use asyncio's `Server.close`, which loses connections that were accepted but have not reached their
protocol yet (see `kvroom.listening.acceptor`). Its runner also leaves a connection open that still has bytes for a
client that does not read. This module therefore creates and closes the server itself.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from kvroom.errors import ConfigurationError
from kvroom.listening.acceptor import BACKLOG, listen
from kvroom.listening.repeats import Repeats
from kvroom.wire.address import HostPort, listen_error

from .connections import ConnectionLimit

logger = logging.getLogger(__name__)

ErrorBody = Callable[[str], object]


def plain_error(sentence: str) -> object:
    """Return an error in the form of the directory's answers."""
    return {"error": sentence}


@asynccontextmanager
async def http_site(
    app: web.Application,
    where: HostPort | Sequence[socket.socket],
    *,
    shutdown_s: float,
    backlog: int = BACKLOG,
    error_body: ErrorBody = plain_error,
) -> AsyncIterator[int]:
    """Serve `app` at an address (port 0: any free one) or on bound sockets, and yield the port.

    On exit, handlers get `shutdown_s` to end and are then cancelled. Bytes that a client has not read by then are
    dropped, and sockets that were passed in are closed.

    Connections without a complete request are closed when there are too many (see `connections`). A client for which no
    descriptor is left gets a 503; `error_body` makes its JSON body from a sentence. Tracebacks of failing handlers are
    logged at most once a second for each kind.

    Raises:
        ConfigurationError: The server cannot listen there. Nothing is open then, except sockets that were passed in.
    """
    limit = ConnectionLimit(lambda why: _unavailable(error_body(why)))
    app.middlewares.insert(0, limit.middleware)
    runner = web.AppRunner(
        app, access_log=None, logger=_HttpLog(logger), shutdown_timeout=shutdown_s, handler_cancellation=True
    )
    await runner.setup()
    assert runner.server is not None  # from setup to cleanup
    limit.attach(runner.server)
    sweeping = asyncio.ensure_future(limit.sweep())
    try:
        try:
            acceptor = await listen(limit, where, backlog=backlog, refusal=lambda why: _unavailable(error_body(why)))
        except OSError as error:
            named = where if isinstance(where, HostPort) else HostPort.of_socket(where[0].getsockname())
            raise ConfigurationError(listen_error(named, error)) from None
        acceptor.start()
        try:
            yield acceptor.port
        finally:
            await acceptor.close()
    finally:
        sweeping.cancel()
        transports = [connection.transport for connection in runner.server.connections]
        await runner.cleanup()
        for transport in transports:
            if transport is not None:
                transport.abort()  # no effect on a transport that is closed already
        # asyncio closes the sockets of aborted transports in the next iteration of the loop.
        await asyncio.sleep(0)


class _HttpLog(Repeats):
    """The logger for aiohttp: errors of handlers with a traceback, invalid requests in one line."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        error = kwargs.get("exc_info")
        if isinstance(error, HttpProcessingError):  # a client's mistake, which aiohttp has answered
            # Log only the type: the message may quote the request, including the header with its signature.
            super().log(logging.INFO, "a client sent an invalid HTTP request: %s", type(error).__name__)
        else:
            super().log(level, msg, *args, **kwargs)


def _unavailable(error: object) -> bytes:
    body = msgspec.json.encode(error)
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
