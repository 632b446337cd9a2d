"""The end of data connections that listens: who is admitted, the sockets, and the thread of each connection.

The sink itself takes in what arrives here. Whatever lands in its memory lands under the lock of its connection, in
steps that look first if they still may. So `InboundConnection.close`, and a subclass that takes a grant back, only have
to take that lock: once they hold it, not one more byte lands.
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
"""Accepted connections that have not proven anything yet."""
_JOIN_S = 5.0


class Keyed(Protocol):
    """What a transport keeps for a peer, as far as its data connections ask."""

    @property
    def key(self) -> DataKey:
        """The key that this side and the peer have in common."""


class KnownPeers(Protocol):
    """The peers of a transport: a `PeerTable` whose peers are `Keyed`."""

    def of(self, endpoint: bytes) -> int | None:
        """Return the attached handle of this endpoint, or None."""

    def met(self, endpoint: bytes, timeout_s: float) -> Keyed | None:
        """Wait until this endpoint is attached, and return what is kept for it; None if it is not within the time."""


class WriterAdmission:
    """The rule by which a sink lets a writer in and a write through, for all of its data connections.

    `endpoint` is this side's public key. `handshake_s`: how long a new connection may take to prove which peer it is.
    `introduction_s`: how long its handshake waits for this side's own `connect` to that peer, which may be slower.
    """

    def __init__(
        self, endpoint: bytes, peers: KnownPeers, grants: Grants, *, handshake_s: float = 5.0, introduction_s: float
    ) -> None:
        self.endpoint = endpoint
        self.handshake_s = handshake_s
        self._introduction_s = introduction_s
        self._peers = peers
        self._grants = grants

    def key_with(self, source: bytes) -> DataKey | None:
        """Return the key in common with `source` once this side is connected to it; None if it still is not."""
        peer = self._peers.met(source, self._introduction_s)
        return None if peer is None else peer.key

    def check(self, source: bytes, grant: bytes, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless `source` may write these blocks under this grant now."""
        if self._peers.of(source) is None:
            raise TransportError("this side has not connected to the writer, or has fenced it")
        self._grants.check(source, grant, dst, length)

    def stands(self, grant: bytes) -> bool:
        """Return True until the grant is taken back."""
        return grant in self._grants

    def warn_of(self, host: str, error: ForeignGrant) -> None:
        """Log that a peer which connects from there wanted to write under a grant of another."""
        self._grants.warn_of(host, error)


class InboundConnection(ABC):
    """One accepted connection and the thread that serves it. `source` is the peer that it has proven to be; b"" before.

    A subclass fills in `serve`, and writes into memory only under `_lock` and while `_open`.
    """

    def __init__(self, connection: socket.socket, admission: WriterAdmission, thread_name: str) -> None:
        self.source = b""
        self._socket = connection
        self._admission = admission
        self._thread_name = thread_name
        self._host = ""
        self._lock = threading.Lock()
        self._open = True
        self._ending = False  # set before `close` takes the lock, so that its holder does not take it again first
        self._thread: threading.Thread | None = None

    def start(self, ended: Callable[[str | None], None]) -> None:
        """Start the thread. Its last act is `ended(fault)`; the fault is None if nothing was wrong."""
        self._thread = threading.Thread(target=self._run, args=(ended,), name=self._thread_name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """When this returns, no byte lands from this connection any more."""
        self._ending = True
        with self._lock:
            if self._open:
                self._open = False
                # The thread may be asleep in recv: shutdown wakes it, and it closes its own descriptor.
                with contextlib.suppress(OSError):  # the peer was faster
                    self._socket.shutdown(socket.SHUT_RDWR)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end after `close`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def greeted(self, source: bytes) -> None:
        """Take note of the peer that this connection has proven to be."""
        self.source = source

    @abstractmethod
    def serve(self) -> None:
        """Take in what comes, until the peer ends the stream at a border. `OSError` and `KVRoomError` are faults."""

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
            detail = detail if self._open else None  # closed by this side: the error is only its echo
            self._open = False
            self._socket.close()
        ended(detail)


ConnectionT = TypeVar("ConnectionT", bound=InboundConnection)


class DataListener(Generic[ConnectionT]):
    """Sockets that listen at a host, and the connections that they have accepted: at most `limit`.

    `make` returns the connection around an accepted socket, `gone` hears of each that has ended, perhaps twice.
    """

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
        self.recent_errors: deque[str] = deque(maxlen=16)  # why connections ended, newest last
        self._limit = limit
        self._make = make
        self._gone = gone
        self._lock = threading.Lock()  # never held while another one is taken
        self._connections: dict[ConnectionT, None] = {}  # oldest first
        listeners = listen(host, port)
        self.port: int = listeners[0].getsockname()[1]
        self._accepting = AcceptThread(listeners, name, self._take, refusal=BUSY)

    @property
    def closing(self) -> bool:
        """True once no further connection is taken."""
        return self._accepting.closing

    def __contains__(self, connection: ConnectionT) -> bool:
        with self._lock:
            return connection in self._connections

    def connections(self) -> list[ConnectionT]:
        """Return the connections that have not ended, oldest first."""
        with self._lock:
            return list(self._connections)

    def drop(self, connection: ConnectionT, error: str | None = None) -> None:
        """End a connection; when this returns, no byte lands from it any more."""
        connection.close()
        self._forget(connection, error)

    def stop(self) -> None:
        """Take no further connection. Call it once."""
        self._accepting.close()

    def close(self) -> None:
        """End all connections, after `stop`; no byte lands any more."""
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
    """Return the connection that must end so that a new one can stay; None if there is room.

    It is the oldest one that has proven nothing, so that silent connections keep no peer out. There is room for `most`
    connections, and for `STRANGERS` that have proven nothing. Raises `TransportError` if all `most` have proven
    themselves: the new one must end.
    """
    strangers = [connection for connection in connections if not connection.source]
    if len(strangers) < STRANGERS and len(connections) < most:
        return None
    if not strangers:
        raise TransportError(f"more than {most} connections; closed the newest")
    return strangers[0]


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets with wide windows that listen at every address of a host; port 0: any free one, the same for all.

    Raise `ConfigurationError` if there can be none.
    """
    where = HostPort(read_listen_host(host), port)
    with contextlib.ExitStack() as undo:
        try:
            # Widened before they listen: accepted sockets inherit it, and the window scale is fixed at the handshake.
            listeners = [undo.enter_context(listener) for listener in bound_sockets(where, widen)]
            for listener in listeners:
                listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigurationError(f"tcp: {listen_error(where, error)}") from error
        undo.pop_all()
    return listeners
