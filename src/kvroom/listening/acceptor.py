"""Connections for an asyncio protocol, from listening sockets: taken, refused with words, and none of them lost.

`loop.create_server` would do most of it. Two things it does not do, whatever the Python version:

At the descriptor limit its accept loop goes on failing as often as the backlog is long, writes a traceback for each
failure, and starts again a second later: 4,000 tracebacks a second at the HTTP port of a worker. Clients wait without
an answer for as long. Here such a connection is taken with a descriptor that is kept back, gets `refusal` as its
answer, and is closed; the log has one line a second. When descriptors come back, connections are taken as before.

It hands a connection over in three turns of the loop, and `Server.close` forgets those that are in between: a socket
that is never closed, or one that reaches its protocol when the owner has closed all that it knew of. Here `close`
returns when every connection that was accepted has reached its protocol, so the owner knows all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from kvroom.wire.address import HostPort

from .descriptors import ASK_S, RETRY_S, SpareDescriptor, is_exhausted, shortage
from .repeats import Repeats
from .sockets import bind, read_addresses

BACKLOG = 128
_ACCEPTS_A_TURN = 64
_ASK_BYTES = 1 << 16

logger = logging.getLogger(__name__)

Refusal = Callable[[str], bytes]


class Acceptor:
    """Takes connections from `sockets`, which listen, from `start` to `close`. It belongs to the running loop.

    `factory` makes the protocol of each connection. `refusal` makes the last words to a client for which no descriptor
    is left, from a sentence that says so; b"" says nothing.
    """

    def __init__(
        self, factory: Callable[[], asyncio.BaseProtocol], sockets: Iterable[socket.socket], refusal: Refusal
    ) -> None:
        self._factory = factory
        self._sockets = list(sockets)
        self._refusal = refusal
        self._loop = asyncio.get_running_loop()
        self._log = Repeats(logger)
        self._spare = SpareDescriptor()
        self._taking: set[asyncio.Task[None]] = set()
        """Connections that have not reached their protocols yet, and the one that is being refused."""
        self._resume: asyncio.TimerHandle | None = None
        self._accepting = False
        self._short = False
        """The last `accept` failed for want of a descriptor."""
        self.address = HostPort.of_socket(self._sockets[0].getsockname())

    @property
    def port(self) -> int:
        """The port of the first socket; all that `listen` has made have the same."""
        return self.address.port

    def start(self) -> None:
        """Take connections from now on."""
        if self._sockets and not self._accepting:
            self._accepting = True
            for listener in self._sockets:
                self._loop.add_reader(listener, self._on_ready, listener)

    async def close(self) -> None:
        """Stop listening, and return when every connection that was accepted has had its `connection_made`.

        A client that dials from the first moment on is refused. It takes three turns of the loop and waits for no
        client. If it is cancelled the sockets are closed all the same. Idempotent.
        """
        self._pause()
        sockets, self._sockets = self._sockets, []
        for listener in sockets:
            listener.close()
        if self._resume is not None:
            self._resume.cancel()
        self._spare.close()
        await asyncio.gather(*self._taking, return_exceptions=True)

    def _pause(self) -> None:
        self._accepting = False
        for listener in self._sockets:
            self._loop.remove_reader(listener)

    def _on_ready(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Nothing more is accepted until this connection is refused or, where it cannot be, for a second.
                self._short = is_exhausted(error)
                self._pause()
                if self._short and self._spare.lend():
                    self._log.warning("%s refuses new connections: %s", self.address, shortage(error))
                    self._begin(self._refuse(listener, f"no new connection can be taken: {shortage(error)}"))
                else:
                    self._log.warning("%s cannot take connections: %s", self.address, shortage(error))
                    self._resume = self._loop.call_later(RETRY_S, self._go_on)
                return
            if self._short:
                self._short = False
                self._log.info("%s takes connections again", self.address)
            connection.setblocking(False)
            self._begin(self._hand_over(connection))

    def _go_on(self) -> None:
        self._spare.take_back()
        self.start()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _hand_over(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError as error:  # it has gone before it could be tuned
            connection.close()
            self._log.debug("a connection to %s was lost at once: %s", self.address, error)

    async def _refuse(self, listener: socket.socket, why: str) -> None:
        try:
            with contextlib.suppress(OSError):  # it has gone again, or another thread has taken the descriptor
                connection, _ = listener.accept()
                with connection:
                    connection.setblocking(False)
                    # A server that closes with something unread resets the connection: the client may lose the answer.
                    asked = self._loop.create_task(self._loop.sock_recv(connection, _ASK_BYTES))
                    await asyncio.wait({asked}, timeout=ASK_S)
                    asked.cancel()
                    connection.send(self._refusal(why))
                    connection.shutdown(socket.SHUT_WR)
        finally:
            if self._sockets:
                self._go_on()


async def listen(
    factory: Callable[[], asyncio.BaseProtocol],
    where: HostPort | Sequence[socket.socket],
    *,
    refusal: Refusal,
    backlog: int = BACKLOG,
) -> Acceptor:
    """Listen at every address of a host (port 0: any free one) or on bound sockets; `start` takes the connections.

    `OSError` if that cannot be; nothing is open then, except the sockets that were given.
    """
    if not isinstance(where, HostPort):
        return _acceptor(factory, where, refusal, backlog)
    found = await asyncio.get_running_loop().getaddrinfo(
        where.host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    with contextlib.ExitStack() as undo:
        sockets = bind(read_addresses(found), where)
        for sock in sockets:
            undo.enter_context(sock)
        acceptor = _acceptor(factory, sockets, refusal, backlog)
        undo.pop_all()
    return acceptor


def _acceptor(
    factory: Callable[[], asyncio.BaseProtocol], sockets: Sequence[socket.socket], refusal: Refusal, backlog: int
) -> Acceptor:
    for sock in sockets:
        sock.setblocking(False)
        sock.listen(backlog)
    return Acceptor(factory, sockets, refusal)
