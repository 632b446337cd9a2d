"""TCP ports: taken before anything slow starts, so that one in use is an error within the first second."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from kvroom.errors import ConfigurationError
from kvroom.listening import sockets
from kvroom.wire.address import HostPort, listen_error


@contextmanager
def bound(host: str, port: int, option: str) -> Iterator[Sequence[socket.socket]]:
    """TCP sockets bound to every address of `host`, at `port` (0: a free one), but not listening yet.

    Raises `ConfigurationError` naming the port and the `option` that set it when it is in use or the host is not ours.
    """
    where = HostPort(host, port)
    with ExitStack() as stack:
        try:
            found = [stack.enter_context(sock) for sock in sockets.bound(where)]
        except OSError as fault:
            raise ConfigurationError(f"{option}: {listen_error(where, fault)}") from None
        yield found


def free_port(host: str) -> int:
    """A port that was free a moment ago, for a program that cannot be told to take any."""
    with bound(host, 0, "--port") as found:
        return port_of(found)


def port_of(found: Sequence[socket.socket]) -> int:
    """The port of sockets that `bound` has made."""
    port: int = found[0].getsockname()[1]
    return port
