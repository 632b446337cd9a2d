"""A thread that takes connections from listening sockets, for servers that serve each of them in a thread."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Callable, Sequence

from .descriptors import ASK_S, RETRY_S, SpareDescriptor, is_exhausted, shortage
from .repeats import Repeats

logger = logging.getLogger(__name__)
_ASK_BYTES = 1 << 16


class AcceptThread:
    """Gives each connection to `take`, in its own thread, from now until `close`, which closes the sockets, too.

    `name` is the thread's, and what the log calls the server. Where no descriptor is left, a connection is taken with
    one that is kept back, gets `refusal` as its answer, and is closed; the log has one line a second.
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
        """`close` was called: no further connection is taken."""
        return self._closing.is_set()

    def close(self) -> None:
        """Take no further connection. Call it once."""
        self._closing.set()
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):  # closed already
                listener.shutdown(socket.SHUT_RDWR)  # ends a poll that waits
        self._thread.join()
        for listener in self._listeners.values():
            listener.close()
        self._spare.close()

    def _run(self) -> None:
        poller = select.poll()
        for fd, listener in self._listeners.items():
            listener.setblocking(False)  # a connection that has gone again must not hold up the other sockets
            poller.register(fd, select.POLLIN)
        while not self._closing.is_set():
            for fd, _ in poller.poll():
                listener = self._listeners[fd]
                try:
                    connection, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):  # it has gone again
                    continue
                except OSError as error:
                    if not self._closing.is_set():
                        self._failed(listener, error)
                    continue
                self._take(connection)

    def _failed(self, listener: socket.socket, error: OSError) -> None:
        if is_exhausted(error) and self._spare.lend():
            self._log.warning("%s refuses new connections: %s", self._name, shortage(error))
            with contextlib.suppress(OSError):  # it has gone again, or another thread has taken the descriptor
                connection, _ = listener.accept()
                with connection:
                    if self._refusal:
                        # A server that closes with something unread resets the connection: the client may lose the
                        # answer.
                        connection.settimeout(ASK_S)
                        with contextlib.suppress(TimeoutError):
                            connection.recv(_ASK_BYTES)
                        connection.send(self._refusal)
                        connection.shutdown(socket.SHUT_WR)
            if self._spare.take_back():
                return
        else:
            self._log.warning("%s cannot take connections: %s", self._name, shortage(error))
        self._closing.wait(RETRY_S)
        self._spare.take_back()
