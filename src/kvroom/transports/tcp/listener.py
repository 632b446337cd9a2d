"""The sockets on which a sink of `tcp` waits for writers."""

from __future__ import annotations

import contextlib
import socket

from kvroom.errors import ConfigurationError
from kvroom.listening.sockets import bound
from kvroom.transports.tcp.frames import widen
from kvroom.wire.address import HostPort, listen_error, read_listen_host

BACKLOG = 128


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets with wide windows that listen at every address of a host; port 0: any free one, the same for all.

    Raise `ConfigurationError` if there can be none.
    """
    where = HostPort(read_listen_host(host), port)
    with contextlib.ExitStack() as undo:
        try:
            # Widened before they listen: accepted sockets inherit it, and the window scale is fixed at the handshake.
            listeners = [undo.enter_context(listener) for listener in bound(where, widen)]
            for listener in listeners:
                listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigurationError(f"tcp: {listen_error(where, error)}") from error
        undo.pop_all()
    return listeners
