"""The sockets on which a sink of `tcp` waits for writers, and which of their connections make room for others."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from typing import Protocol, TypeVar

from kvroom.errors import ConfigurationError, TransportError
from kvroom.listening.sockets import bound
from kvroom.transports.kit.data_handshake import widen
from kvroom.wire.address import HostPort, listen_error, read_listen_host

BACKLOG = 128
STRANGERS = 64
"""Accepted connections that have not proven anything yet."""


class Guest(Protocol):
    """An accepted connection."""

    @property
    def source(self) -> bytes | None:
        """The peer that it has proven to be; None or empty before."""


GuestT = TypeVar("GuestT", bound=Guest)


def to_close(guests: Sequence[GuestT], most: int) -> GuestT | None:
    """Return the connection that must end so that a new one can stay; None if there is room.

    It is the oldest one that has proven nothing, so that silent connections keep no peer out. There is room for `most`
    connections, and for `STRANGERS` that have proven nothing. Raises `TransportError` if all `most` have proven
    themselves: the new one must end.
    """
    strangers = [guest for guest in guests if not guest.source]
    if len(strangers) < STRANGERS and len(guests) < most:
        return None
    if not strangers:
        raise TransportError(f"more than {most} connections; closed the newest")
    return strangers[0]


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
