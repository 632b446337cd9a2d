"""The listening end of data connections: the admission of peers, the sockets, and the thread of each connection.

The sink itself receives the bytes and writes them to its memory. It does so in short steps under the lock of the
connection, and each step first checks that writing is still allowed. `InboundConnection.close`, and a subclass that
revokes a grant, therefore only have to withdraw that permission under the lock: after that, no further byte lands.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from kvroom.errors import ConfigurationError, KVRoomError, TransportError
from kvroom.listening.sockets import bound_sockets
from kvroom.listening.threads import AcceptThread
from kvroom.plan.blocks import U64
from kvroom.wire.address import HostPort, listen_error, read_listen_host

from .data_handshake import BUSY, answer, tune, widen
from .data_keys import DataKey
from .grants import ForeignGrant, Grants

BACKLOG = 128
STRANGERS = 64
"""The maximum number of accepted connections that have not proven yet which peer they are."""
_JOIN_S = 5.0


class Keyed(Protocol):
    """The part of a transport's peer record that data connections need."""

    @property
    def key(self) -> DataKey:
        """The key that this side shares with the peer."""


class KnownPeers(Protocol):
    """The peers of a transport: a `PeerTable` whose peers are `Keyed`."""

    def of(self, endpoint: bytes) -> int | None:
        """Return the attached handle of this endpoint, or None."""

    def wait_for(self, endpoint: bytes, timeout_s: float) -> Keyed | None:
        """Wait until this endpoint is attached, and return its record, or None after `timeout_s`."""


class WriterAdmission:
    """The rules by which a sink admits writers and their writes, shared by all of its data connections."""

    def __init__(
        self, endpoint: bytes, peers: KnownPeers, grants: Grants, *, handshake_s: float = 5.0, introduction_s: float
    ) -> None:
        """Create the rules.

        Args:
            endpoint: This side's public key.
            peers: The peers that this side has connected to.
            grants: The grants of this side.
            handshake_s: The time that a new connection has to prove which peer it is.
            introduction_s: The time that its handshake waits for this side's own `connect` to that peer, because the
                peer may be the faster one.
        """
        self.endpoint = endpoint
        self.handshake_s = handshake_s
        self._introduction_s = introduction_s
        self._peers = peers
        self._grants = grants

    def key_with(self, source: bytes) -> DataKey | None:
        """Return the key shared with `source` once this side has connected to it, or None if the wait timed out."""
        peer = self._peers.wait_for(source, self._introduction_s)
        return None if peer is None else peer.key

    def check(self, source: bytes, grant: bytes, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless `source` may write these blocks under this grant now."""
        if self._peers.of(source) is None:
            raise TransportError("this side has not connected to the writer, or has fenced it")
        self._grants.check(source, grant, dst, length)

    def is_open(self, grant: bytes) -> bool:
        """Return True until the grant is revoked."""
        return grant in self._grants

    def log_foreign(self, host: str, error: ForeignGrant) -> None:
        """Log a warning that a peer at this address tried to write under another peer's grant."""
        self._grants.log_foreign(host, error)


class InboundConnection(ABC):
    """One accepted connection and the thread that serves it.

    `source` is the endpoint of the peer that the connection has proven to be, and b"" until then. A subclass implements
    `serve`, and writes into memory only under `_lock` and while `_open`.
    """

    def __init__(self, connection: socket.socket, admission: WriterAdmission, thread_name: str) -> None:
        self.source = b""
        self._socket = connection
        self._admission = admission
        self._thread_name = thread_name
        self._host = ""
        self._lock = threading.Lock()
        self._open = True
        # Set before `close` acquires the lock. A serving thread that takes the lock for one step after the other could
        # otherwise keep `close` waiting.
        self._ending = False
        self._thread: threading.Thread | None = None

    def start(self, ended: Callable[[str | None], None]) -> None:
        """Start the thread. As its last act it calls `ended` with the text of the error, or None if there was none."""
        self._thread = threading.Thread(target=self._run, args=(ended,), name=self._thread_name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the connection. When this returns, no further byte lands from it."""
        self._ending = True
        with self._lock:
            if self._open:
                self._open = False
                # The thread may be blocked in recv. Shutdown wakes it, and the thread closes the descriptor itself, so
                # that the number cannot be reused while it is still in recv.
                with contextlib.suppress(OSError):  # the peer has already closed the connection
                    self._socket.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end after `close`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def greeted(self, source: bytes) -> None:
        """Record the peer that this connection has proven to be."""
        self.source = source

    @abstractmethod
    def serve(self) -> None:
        """Process incoming data until the peer ends the stream between messages. Raise `OSError` or `KVRoomError`."""

    def _run(self, ended: Callable[[str | None], None]) -> None:
        detail = None
        try:
            tune(self._socket)
            admission = self._admission
            source = answer(self._socket, admission.endpoint, admission.key_with, admission.handshake_s)
            self._socket.settimeout(None)
            self._host = str(self._socket.getpeername()[0])
            self.greeted(source)
            self.serve()
        except (OSError, KVRoomError) as error:
            detail = str(error)
        with self._lock:
            detail = detail if self._open else None  # an error after `close` is only its consequence
            self._open = False
            self._socket.close()
        ended(detail)


ConnectionT = TypeVar("ConnectionT", bound=InboundConnection)


class DataListener(Generic[ConnectionT]):
    """Listening sockets and the connections that they have accepted."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        name: str,
        limit: int,
        make: Callable[[socket.socket], ConnectionT],
        gone: Callable[[ConnectionT], None] | None = None,
    ) -> None:
        """Listen, and accept connections in a thread of this listener.

        Args:
            host: The host to listen on; all its addresses are used.
            port: The port; 0 for any free one.
            name: The name of the accepting thread.
            limit: The maximum number of connections.
            make: Returns the connection object for an accepted socket.
            gone: Called with each connection that has ended. It may be called twice for a connection.

        Raises:
            ConfigurationError: The host and port cannot be listened on.
        """
        self.recent_errors: deque[str] = deque(maxlen=16)  # why connections ended, newest last
        self._limit = limit
        self._make = make
        self._gone = gone
        self._lock = threading.Lock()  # no other lock is acquired while this one is held
        self._connections: dict[ConnectionT, None] = {}  # oldest first
        listeners = listen(host, port)
        self.port: int = listeners[0].getsockname()[1]
        self._accepting = AcceptThread(listeners, name, self._take, refusal=BUSY)

    @property
    def closing(self) -> bool:
        """True once no further connection is accepted."""
        return self._accepting.closing

    def __contains__(self, connection: ConnectionT) -> bool:
        with self._lock:
            return connection in self._connections

    def connections(self) -> list[ConnectionT]:
        """Return the connections that have not ended, oldest first."""
        with self._lock:
            return list(self._connections)

    def drop(self, connection: ConnectionT, error: str | None = None) -> None:
        """Close a connection. When this returns, no further byte lands from it."""
        connection.close()
        self._forget(connection, error)

    def stop(self) -> None:
        """Stop accepting connections. Call it once."""
        self._accepting.close()

    def close(self) -> None:
        """Close all connections, after `stop`. When this returns, no further byte lands."""
        for connection in self.connections():
            connection.close()
            connection.join(_JOIN_S)
            self._forget(connection)

    def _take(self, accepted: socket.socket) -> None:
        with self._lock:
            try:
                stranger = to_close(list(self._connections), self._limit)
            except TransportError as full:
                self.recent_errors.append(str(full))
                accepted.close()
                return
            connection = self._make(accepted)
            self._connections[connection] = None
        if stranger is not None:
            self.drop(stranger, "too many connections in their handshake; closed the oldest")
        connection.start(partial(self._forget, connection))

    def _forget(self, connection: ConnectionT, error: str | None = None) -> None:
        with self._lock:
            self._connections.pop(connection, None)
            if error is not None:
                self.recent_errors.append(error)
        if self._gone is not None:
            self._gone(connection)


def to_close(connections: Sequence[ConnectionT], most: int) -> ConnectionT | None:
    """Return the connection to close so that a new one can be accepted, or None if there is room.

    There is room for `most` connections, of which `STRANGERS` may not have proven yet which peer they are. The oldest
    of these makes room, so that silent connections cannot keep a peer out.

    Raises:
        TransportError: All `most` connections belong to proven peers. The new connection must be closed.
    """
    strangers = [connection for connection in connections if not connection.source]
    if len(strangers) < STRANGERS and len(connections) < most:
        return None
    if not strangers:
        raise TransportError(f"more than {most} connections; closed the newest")
    return strangers[0]


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets with large buffers that listen on every address of a host.

    Args:
        host: The host.
        port: The port; 0 for any free one, the same for all addresses.

    Raises:
        ConfigurationError: The host and port cannot be listened on.
    """
    where = HostPort(read_listen_host(host), port)
    with contextlib.ExitStack() as undo:
        try:
            # The buffers are set before listening: accepted sockets inherit them, and TCP fixes the window scale
            # during the handshake.
            listeners = [undo.enter_context(listener) for listener in bound_sockets(where, widen)]
            for listener in listeners:
                listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigurationError(f"tcp: {listen_error(where, error)}") from error
        undo.pop_all()
    return listeners
