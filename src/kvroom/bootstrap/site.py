"""An aiohttp application on a socket, as a block: when it is left, no connection is open and none can come.

aiohttp's own sites close their server as it stands, which loses connections (see `kvroom.listening.acceptor`), and its
runner leaves open whatever still has bytes for a client that does not read. That is why the server is made and closed
here.
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

from kvroom.bootstrap.guests import Guests
from kvroom.errors import ConfigurationError
from kvroom.listening.acceptor import BACKLOG, listen
from kvroom.listening.repeats import Repeats
from kvroom.wire.address import HostPort, listen_error

logger = logging.getLogger(__name__)

ErrorBody = Callable[[str], object]


def plain_error(sentence: str) -> object:
    """An error in the shape of the directory's answers."""
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

    `ConfigurationError` if it cannot listen there; nothing is open then, except the sockets that were given. On
    leaving, handlers get `shutdown_s` to end, then they are cancelled; what a client has not taken by then is dropped.
    Sockets that were given are closed.

    Silent connections are closed where there are many (see `guests`). A client for which no descriptor is left is
    answered 503; `error_body` makes the JSON body from a sentence. What
    aiohttp logs of the faults of handlers is a traceback for each kind, once a second at most.
    """
    guests = Guests(lambda why: _unavailable(error_body(why)))
    app.middlewares.insert(0, guests.middleware)
    runner = web.AppRunner(
        app, access_log=None, logger=_HttpLog(logger), shutdown_timeout=shutdown_s, handler_cancellation=True
    )
    await runner.setup()
    assert runner.server is not None  # from setup to cleanup
    guests.attach(runner.server)
    sweeping = asyncio.ensure_future(guests.sweep())
    try:
        try:
            acceptor = await listen(guests, where, backlog=backlog, refusal=lambda why: _unavailable(error_body(why)))
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
                transport.abort()  # one that is closed already stays so
        await asyncio.sleep(0)  # the turn in which the sockets of aborted transports are closed


class _HttpLog(Repeats):
    """Logs for aiohttp: faults of handlers with their traceback, bytes that are no request in one line."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        fault = kwargs.get("exc_info")
        if isinstance(fault, HttpProcessingError):  # of a client, and it was answered
            # Only its kind: the message may quote the request, and with it the header that signs it.
            super().log(logging.INFO, "a client sent what is no HTTP request: %s", type(fault).__name__)
        else:
            super().log(level, msg, *args, **kwargs)


def _unavailable(error: object) -> bytes:
    body = msgspec.json.encode(error)
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
