"""Sockets that are bound to every address of a host, all with one port.

A name may have several addresses, and `localhost` often has one of each family. Clients choose among them, each in its
own order, so a server that has only the first is not reached by all. A name can have addresses that this machine lacks:
they are left out, unless it lacks all of them.

`::` is every interface in both families, as one socket gives it; nothing (an empty host) is the same, but also on a
machine that has only one family.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterable
from typing import Any

from kvroom.wire.address import HostPort

Address = tuple[int, tuple[Any, ...]]
"""Family and socket address."""
Prepare = Callable[[socket.socket], None]

_MISSING = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
_TRIES = 8
"""A port that is free at the first address may be taken at the next one."""


def bound_sockets(where: HostPort, prepare: Prepare | None = None) -> list[socket.socket]:
    """Return sockets bound to `where`, the first one at the address that the system prefers. Blocks for a name.

    See `bind` for `prepare`, port 0 and the errors.
    """
    found = socket.getaddrinfo(where.host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return bind(read_addresses(found), where, prepare)


def read_addresses(found: Iterable[tuple[Any, ...]]) -> list[Address]:
    """Return the addresses, each once, of what `socket.getaddrinfo` has returned."""
    return list(dict.fromkeys((each[0], each[4]) for each in found))


def bind(addresses: Iterable[Address], where: HostPort, prepare: Prepare | None = None) -> list[socket.socket]:
    """Return a socket for each of these addresses of `where`, bound and not listening yet. Port 0: one that is free.

    `prepare` gets each before it is bound. `OSError` if none of the addresses is of this machine, or if the port is in
    use at one of them; no socket is open then.
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
    # The protocol is named, though there is one only: without it asyncio does not set TCP_NODELAY.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # A port whose last connections are still closing is free; one that a server listens on is not.
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
