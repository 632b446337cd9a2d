"""Sockets that are bound to every address of a host, all with the same port.

A name may have several addresses, and `localhost` often has one of each family. Clients try them in different orders,
so a server that listens only on the first address is not reached by every client. Addresses of the name that do not
belong to this machine are left out, unless all of them are foreign.

`::` is every interface in both families, through one socket. An empty host is the same, and also works on a machine
that has only one family.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterable
from typing import Any

from kvroom.wire.address import HostPort

Address = tuple[int, tuple[Any, ...]]
"""A family and a socket address."""
Prepare = Callable[[socket.socket], None]

_MISSING = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
_TRIES = 8
"""The number of tries with port 0: a port that is free at the first address may be in use at the next one."""


def bound_sockets(where: HostPort, prepare: Prepare | None = None) -> list[socket.socket]:
    """Return sockets bound to `where`, in the system's order of preference. Blocks while a name is resolved.

    `prepare`, port 0 and the errors are those of `bind`.
    """
    found = socket.getaddrinfo(where.host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return bind(read_addresses(found), where, prepare)


def read_addresses(found: Iterable[tuple[Any, ...]]) -> list[Address]:
    """Return the distinct addresses in a result of `socket.getaddrinfo`."""
    return list(dict.fromkeys((each[0], each[4]) for each in found))


def bind(addresses: Iterable[Address], where: HostPort, prepare: Prepare | None = None) -> list[socket.socket]:
    """Return a bound socket, not listening yet, for each of these addresses of `where`.

    Args:
        addresses: The addresses. Those that do not belong to this machine are left out.
        where: The host and port; port 0 for any free port, the same for all addresses.
        prepare: Called with each socket before it is bound.

    Raises:
        OSError: None of the addresses belongs to this machine, or the port is in use at one of them. No socket is open
            then.
    """
    listed = list(addresses)
    for left in reversed(range(_TRIES)):
        try:
            return _bind_all(listed, where, prepare)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or where.port or not left:
                raise
    raise AssertionError  # the last try has returned or raised


def _bind_all(addresses: list[Address], where: HostPort, prepare: Prepare | None) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    port, missing = where.port, OSError(errno.EADDRNOTAVAIL, "the host name has no address")
    with contextlib.ExitStack() as undo:
        for family, address in addresses:
            try:
                sock = undo.enter_context(_bind_one(family, (address[0], port, *address[2:]), where, prepare))
            except OSError as error:
                if error.errno not in _MISSING:
                    raise
                missing = error
                continue
            sockets.append(sock)
            port = sock.getsockname()[1]
        if not sockets:
            raise missing
        undo.pop_all()
    return sockets


def _bind_one(family: int, address: tuple[Any, ...], where: HostPort, prepare: Prepare | None) -> socket.socket:
    # Name the protocol explicitly: without it, asyncio does not set TCP_NODELAY.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Allow a port whose last connections are still closing, but not one that a server listens on.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, where.host != "::")
        if prepare is not None:
            prepare(sock)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock
