"""A thread that accepts connections, for servers that serve each connection in a thread."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Callable, Sequence

from .descriptors import REQUEST_S, RETRY_S, SpareDescriptor, is_exhausted, shortage
from .repeats import Repeats

logger = logging.getLogger(__name__)
_REQUEST_BYTES = 1 << 16


class AcceptThread:
    """A thread that passes each accepted connection to `take`, from its construction until `close`.

    It owns the listening sockets. `name` is the name of the thread, and of the server in the log. If no descriptor is
    left, a connection is accepted with one that was kept in reserve, gets `refusal` as its answer, and is closed; the
    log gets one line a second.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        name: str,
        take: Callable[[socket.socket], None],
        refusal: bytes = b"",
    ) -> None:
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._name = name
        self._take = take
        self._refusal = refusal
        self._log = Repeats(logger)
        self._spare = SpareDescriptor()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def closing(self) -> bool:
        """True once `close` was called: no further connection is accepted."""
        return self._closing.is_set()

    def close(self) -> None:
        """Stop accepting connections, and close the listening sockets. Call it once."""
        self._closing.set()
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):  # already closed
                listener.shutdown(socket.SHUT_RDWR)  # makes the thread's poll return
        self._thread.join()
        for listener in self._listeners.values():
            listener.close()
        self._spare.close()

    def _run(self) -> None:
        poller = select.poll()
        for fd, listener in self._listeners.items():
            listener.setblocking(False)  # a connection that is gone by now must not block the other sockets
            poller.register(fd, select.POLLIN)
        while not self._closing.is_set():
            for fd, _ in poller.poll():
                listener = self._listeners[fd]
                try:
                    connection, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):  # the client is gone
                    continue
                except OSError as error:
                    if not self._closing.is_set():
                        self._failed(listener, error)
                    continue
                self._take(connection)

    def _failed(self, listener: socket.socket, error: OSError) -> None:
        if is_exhausted(error) and self._spare.free():
            self._log.warning("%s refuses new connections: %s", self._name, shortage(error))
            with contextlib.suppress(OSError):  # the client is gone, or another thread took the descriptor
                connection, _ = listener.accept()
                with connection:
                    if self._refusal:
                        # Closing with unread data would reset the connection, and the client might lose the answer.
                        connection.settimeout(REQUEST_S)
                        with contextlib.suppress(TimeoutError):
                            connection.recv(_REQUEST_BYTES)
                        connection.send(self._refusal)
                        connection.shutdown(socket.SHUT_WR)
            if self._spare.reserve():
                return
        else:
            self._log.warning("%s cannot accept connections: %s", self._name, shortage(error))
        self._closing.wait(RETRY_S)
        self._spare.reserve()
