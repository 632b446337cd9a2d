"""TCP ports: taken before anything slow starts, so that one in use is an error within the first second."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kvroom.errors import ConfigurationError
from kvroom.network import HostPort, bound_sockets, listen_error

_LOWEST_PORT = 20_000
_TRIES = 50
_GIVEN: set[int] = set()
"""The ports that this process has given away. A program that was told one may not listen there for a minute."""


@contextmanager
def bound(host: str, port: int, option: str) -> Iterator[Sequence[socket.socket]]:
    """TCP sockets bound to every address of `host`, at `port` (0: a free one), but not listening yet.

    Raises `ConfigurationError` naming the port and the `option` that set it when it is in use or the host is not ours.
    """
    where = HostPort(host, port)
    with ExitStack() as stack:
        try:
            found = [stack.enter_context(sock) for sock in bound_sockets(where)]
        except OSError as error:
            raise ConfigurationError(f"{option}: {listen_error(where, error)}") from None
        yield found


def free_port(host: str) -> int:
    """Return a port that was free a moment ago, for a program that cannot be told to take any.

    It lies below the ports that the system gives to outgoing connections: one of those could take it before the
    program listens there. For the same reason this process gives no port twice while there are others.
    """
    ports = [port for port in range(_LOWEST_PORT, _lowest_of_connections()) if port not in _GIVEN]
    for port in random.sample(ports, k=min(_TRIES, len(ports))):
        with suppress(ConfigurationError), bound(host, port, "--port"):
            _GIVEN.add(port)
            return port
    with bound(host, 0, "--port") as found:
        return port_of(found)


def _lowest_of_connections() -> int:
    """Return the lowest port that Linux gives to connections (`ip_local_port_range` in ip(7)), or its default."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32768


def port_of(found: Sequence[socket.socket]) -> int:
    """The port of sockets that `bound` has made."""
    port: int = found[0].getsockname()[1]
    return port
