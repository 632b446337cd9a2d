"""The socket on which a sink of `tcp` waits for writers."""

from __future__ import annotations

import socket

from kvroom.errors import ConfigurationError
from kvroom.transports.tcp.frames import widen


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket with wide windows; raise `ConfigurationError` if there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigurationError(f"tcp cannot listen on {host!r}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        widen(listener)  # before listen: accepted sockets inherit it, and the window scale is fixed at the handshake
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"tcp cannot listen on {host} port {port}: {error.strerror}; choose another"
        ) from error
    return listener
