"""TCP ports: taken before anything slow starts, so that one in use is an error within the first second."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from kvroom.errors import ConfigurationError
from kvroom.wire.address import HostPort, listen_error


@contextmanager
def bound(host: str, port: int, option: str) -> Iterator[socket.socket]:
    """A TCP socket bound to `host:port` (0: a free one) but not listening yet. `option` set the port.

    Raises `ConfigurationError` naming the port and the option when it is in use or the host is not ours.
    """
    with _bind(HostPort(host, port), option) as sock:
        yield sock


def free_port(host: str) -> int:
    """A port that was free a moment ago, for a program that cannot be told to take any."""
    with bound(host, 0, "--port") as sock:
        port: int = sock.getsockname()[1]
        return port


def _bind(where: HostPort, option: str) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as fault:
        raise ConfigurationError(f"{option}: {listen_error(where, fault)}") from None
    # A port whose last connections are still closing is free; one that somebody listens on is not.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as fault:
        sock.close()
        raise ConfigurationError(f"{option}: {listen_error(where, fault)}") from None
    return sock
