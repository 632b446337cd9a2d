"""Accepting of connections for an asyncio protocol: each one is served or refused with a reason, and none is lost.

`loop.create_server` would do most of this. In every version of Python it lacks two things:

At the descriptor limit, its accept loop fails once for each connection in the backlog, logs a traceback for each
failure, and starts again a second later: 4,000 tracebacks a second at a worker's HTTP port, while the clients wait for
an answer. Here such a connection is accepted with a descriptor that was kept in reserve, gets `refusal` as its answer,
and is closed; the log gets one line a second. Once descriptors are free again, connections are accepted as before.

`loop.create_server` needs three turns of the loop to pass a connection to its protocol, and `Server.close` ignores the
connections that are in between. Such a socket is never closed, or it reaches its protocol after the owner of the server
has closed its protocols. Here `close` returns when every accepted connection has reached its protocol, so the owner has
a complete list.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from kvroom.wire.address import HostPort

from .descriptors import REQUEST_S, RETRY_S, SpareDescriptor, is_exhausted, shortage
from .repeats import Repeats
from .sockets import bind, read_addresses

BACKLOG = 128
_ACCEPTS_A_TURN = 64
_REQUEST_BYTES = 1 << 16

logger = logging.getLogger(__name__)

Refusal = Callable[[str], bytes]


class Acceptor:
    """Accept connections from listening sockets, between `start` and `close`. Belongs to the running loop."""

    def __init__(
        self, factory: Callable[[], asyncio.BaseProtocol], sockets: Iterable[socket.socket], refusal: Refusal
    ) -> None:
        """Create the acceptor; `start` starts it.

        Args:
            factory: Returns the protocol of a connection.
            sockets: The listening sockets. The acceptor owns them from now on.
            refusal: Returns the answer to a client for which no descriptor is left, from a sentence with the reason;
                b"" for no answer.
        """
        self._factory = factory
        self._sockets = list(sockets)
        self._refusal = refusal
        self._loop = asyncio.get_running_loop()
        self._log = Repeats(logger)
        self._spare = SpareDescriptor()
        self._taking: set[asyncio.Task[None]] = set()
        """The tasks of connections that have not reached their protocols yet, and of the one being refused."""
        self._resume: asyncio.TimerHandle | None = None
        self._accepting = False
        self._short = False
        """True if the last `accept` failed because no descriptor was left."""
        self.address = HostPort.of_socket(self._sockets[0].getsockname())

    @property
    def port(self) -> int:
        """The port of the first socket. All sockets that `listen` creates have the same port."""
        return self.address.port

    def start(self) -> None:
        """Start accepting connections."""
        if self._sockets and not self._accepting:
            self._accepting = True
            for listener in self._sockets:
                self._loop.add_reader(listener, self._on_ready, listener)

    async def close(self) -> None:
        """Stop listening, and return when `connection_made` has been called for every accepted connection.

        From the start of this call, the system refuses clients that dial. The call takes three turns of the loop and
        waits for no client. If it is cancelled, the sockets are closed nevertheless. Idempotent.
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
                # Accept nothing until this connection has been refused or, if that is impossible, for a second.
                self._short = is_exhausted(error)
                self._pause()
                if self._short and self._spare.free():
                    self._log.warning("%s refuses new connections: %s", self.address, shortage(error))
                    self._begin(self._refuse(listener, f"no new connection can be accepted: {shortage(error)}"))
                else:
                    self._log.warning("%s cannot accept connections: %s", self.address, shortage(error))
                    self._resume = self._loop.call_later(RETRY_S, self._go_on)
                return
            if self._short:
                self._short = False
                self._log.info("%s accepts connections again", self.address)
            connection.setblocking(False)
            self._begin(self._hand_over(connection))

    def _go_on(self) -> None:
        self._spare.reserve()
        self.start()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _hand_over(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._factory, connection)
        except OSError as error:  # the client closed the connection before the loop had set its options
            connection.close()
            self._log.debug("a connection to %s was lost immediately: %s", self.address, error)

    async def _refuse(self, listener: socket.socket, why: str) -> None:
        try:
            with contextlib.suppress(OSError):  # the client is gone, or another thread took the descriptor
                connection, _ = listener.accept()
                with connection:
                    connection.setblocking(False)
                    # Closing with unread data would reset the connection, and the client might lose the answer.
                    request = self._loop.create_task(self._loop.sock_recv(connection, _REQUEST_BYTES))
                    await asyncio.wait({request}, timeout=REQUEST_S)
                    request.cancel()
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
    """Listen on every address of a host, or on bound sockets. Connections are accepted from `start` on.

    Args:
        factory: Returns the protocol of a connection.
        where: A host and port (port 0 for any free one), or sockets that are bound already.
        refusal: As for `Acceptor`.
        backlog: The maximum number of connections that the kernel queues.

    Raises:
        OSError: The host cannot be resolved, or the port cannot be listened on. Only the given sockets are open then.
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
