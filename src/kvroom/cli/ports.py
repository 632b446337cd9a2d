"""Bind TCP ports before anything slow starts, so that a port in use is reported within the first second."""

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
"""The ports that `free_port` has returned. The program that gets one may start to listen only a minute later."""


@contextmanager
def bound(host: str, port: int, option: str) -> Iterator[Sequence[socket.socket]]:
    """Yield TCP sockets that are bound to every address of `host` at `port` (0 for a free one) and do not listen yet.

    The sockets are closed when the block ends. Raises `ConfigurationError` if the port is in use or `host` is not an
    address of this machine; the message names the port and the `option` that set it.
    """
    where = HostPort(host, port)
    with ExitStack() as stack:
        try:
            found = [stack.enter_context(sock) for sock in bound_sockets(where)]
        except OSError as error:
            raise ConfigurationError(f"{option}: {listen_error(where, error)}") from None
        yield found


def free_port(host: str) -> int:
    """Return a free port for a program that cannot choose one itself.

    Between this call and the program's own `bind` the port is not reserved. Therefore it lies below the range from
    which the system takes ports for outgoing connections, and is not returned again while other ports are free.
    """
    ports = [port for port in range(_LOWEST_PORT, _lowest_of_connections()) if port not in _GIVEN]
    for port in random.sample(ports, k=min(_TRIES, len(ports))):
        with suppress(ConfigurationError), bound(host, port, "--port"):
            _GIVEN.add(port)
            return port
    with bound(host, 0, "--port") as found:
        return port_of(found)


def _lowest_of_connections() -> int:
    """Return the lowest port that Linux uses for outgoing connections (`ip_local_port_range` in ip(7))."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 32768


def port_of(found: Sequence[socket.socket]) -> int:
    """Return the port of the sockets that `bound` yields, which is the same for all of them."""
    port: int = found[0].getsockname()[1]
    return port
