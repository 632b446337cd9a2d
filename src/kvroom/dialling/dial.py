"""Connecting to a server from a thread: all addresses of its name are tried, and the first that answers is used.

RFC 8305 ("happy eyeballs") describes the method: addresses are tried in the system's order of preference, alternating
between the families. The next one is tried after 250 ms, or as soon as one has failed, and the earlier attempts go on.
A dead address therefore costs a quarter of a second, and no address can use up the time of the others. On an event
loop, `create_connection` does the same.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest

from kvroom.errors import KVRoomError
from kvroom.wire.address import HostPort, os_reason

from .names import NAMES, FoundAddress

STAGGER_S = 0.25
"""The delay between two tries, the recommended "Connection Attempt Delay" of RFC 8305, section 8."""

Use = Callable[[socket.socket], None]


class Dial:
    """One attempt to connect to a host."""

    def __init__(
        self,
        where: HostPort,
        timeout_s: float,
        prepare: Use | None = None,
        greet: Use | None = None,
        *,
        family: int = socket.AF_UNSPEC,
    ) -> None:
        """Prepare the attempt; `connect` makes it.

        Args:
            where: The host and port.
            timeout_s: The limit on resolving and connecting together, in seconds.
            prepare: Called with each socket before it connects, to set its options.
            greet: Called with each connected socket, in blocking mode, until it returns; it must limit its own time. It
                raises `OSError` or `KVRoomError` if this address leads to the wrong process or to one that cannot
                serve; then the other addresses are tried.
            family: Restrict the attempt to addresses of this family.
        """
        self._where, self._family = where, family
        self._timeout_s = timeout_s
        self._prepare, self._greet = prepare, greet
        self._lock = threading.Lock()  # guards the two below, which must not be used after they are closed
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._greeted: socket.socket | None = None
        self._hung_up = False

    def connect(self) -> socket.socket:
        """Return a connected socket in blocking mode. Call it once.

        Raises:
            TimeoutError: The name was not resolved, or no address answered, within the limit.
            OSError: No address could be connected to, or `hang_up` was called.
            KVRoomError: `greet` raised it at every address, with the same text.
        """
        try:
            deadline_s = time.monotonic() + self._timeout_s
            host, port = self._where
            if is_numeric(host):
                kind = {"family": self._family, "type": socket.SOCK_STREAM}
                known = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **kind)
                found = [FoundAddress(*each) for each in known]
            else:
                answer = NAMES.look_up(host, port, family=self._family)
                answer.add_done_callback(lambda _: self._signal())
                poller = select.poll()
                poller.register(self._event, select.POLLIN)
                while not answer.done():
                    self._wait(poller, deadline_s, "the host name was not resolved")
                found = answer.result()
            return self._race(in_turn(found), deadline_s)
        finally:
            with self._lock:
                os.close(self._event)
                self._event = -1

    def hang_up(self) -> None:
        """Make `connect` raise `OSError`. May be called from any thread, at any time. Idempotent."""
        self._hung_up = True
        self._signal()
        with self._lock:
            if self._greeted is not None:
                with contextlib.suppress(OSError):  # the peer has already closed the connection
                    self._greeted.shutdown(socket.SHUT_RDWR)

    def _signal(self) -> None:
        with self._lock:
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def _race(self, addresses: Iterable[FoundAddress], deadline_s: float) -> socket.socket:
        """Try the addresses as the module describes, and close all sockets but the one that is returned."""
        left = deque(addresses)
        racing: dict[int, tuple[socket.socket, FoundAddress]] = {}
        errors: list[tuple[FoundAddress, OSError | KVRoomError]] = []
        poller = select.poll()
        poller.register(self._event, select.POLLIN)
        with contextlib.ExitStack() as losers:
            next_s = time.monotonic()
            while left or racing:
                if left and (not racing or time.monotonic() >= next_s):
                    address = left.popleft()
                    try:
                        connection = losers.enter_context(self._start(address))
                    except OSError as error:
                        errors.append((address, error))
                        continue
                    racing[connection.fileno()] = connection, address
                    poller.register(connection, select.POLLOUT)
                    next_s = time.monotonic() + STAGGER_S
                for fd in self._wait(poller, deadline_s, "no address answered", next_s if left else deadline_s):
                    connection, address = racing.pop(fd)
                    poller.unregister(fd)
                    try:
                        self._begin(connection)
                    except (OSError, KVRoomError) as error:
                        connection.close()
                        errors.append((address, error))
                        next_s = 0.0
                    else:
                        return socket.socket(fileno=connection.detach())
        # One error for all addresses; if their reasons differ, it lists each.
        if not errors:
            raise OSError("the host name has no address")
        reasons = {os_reason(error) if isinstance(error, OSError) else str(error): found for found, error in errors}
        if len(reasons) == 1:
            raise errors[0][1]
        raise OSError(", ".join(f"{why} at {HostPort.of_socket(found.address)}" for why, found in reasons.items()))

    def _start(self, found: FoundAddress) -> socket.socket:
        connection = socket.socket(found.family, found.kind, found.protocol)
        try:
            if self._prepare is not None:
                self._prepare(connection)
            connection.setblocking(False)
            code = connection.connect_ex(found.address)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except OSError:
            connection.close()
            raise
        return connection

    def _begin(self, connection: socket.socket) -> None:
        """Raise the error if this socket is not connected, or is connected to the wrong process."""
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        connection.setblocking(True)
        if self._greet is None:
            return
        with self._lock:
            self._greeted = connection
        try:
            self._greet(connection)
        finally:
            with self._lock:
                self._greeted = None

    def _wait(self, poller: select.poll, deadline_s: float, late: str, next_s: float | None = None) -> list[int]:
        """Wait for a socket, `next_s` or the deadline, and return the descriptors of the sockets that are ready.

        Raise `TimeoutError` at the deadline, with the text `late`, and `OSError` after `hang_up`.
        """
        now_s = time.monotonic()
        if self._hung_up:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        if now_s >= deadline_s:
            raise TimeoutError(errno.ETIMEDOUT, f"timed out after {self._timeout_s:g} s: {late}")
        until_s = deadline_s if next_s is None else min(deadline_s, next_s)
        ready = [fd for fd, _ in poller.poll(max(until_s - now_s, 0) * 1000)]
        if self._event in ready:
            os.eventfd_read(self._event)
            ready.remove(self._event)
        if self._hung_up:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        return ready


def dial(where: HostPort, timeout_s: float) -> socket.socket:
    """Return a connected socket in blocking mode, or raise `OSError`. See `Dial`."""
    return Dial(where, timeout_s).connect()


def is_numeric(host: str) -> bool:
    """Return True if a host is an address, which needs no lookup."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def in_turn(found: Sequence[FoundAddress]) -> list[FoundAddress]:
    """Return the addresses with alternating families, starting with the preferred one (RFC 8305, section 4)."""
    families = list(dict.fromkeys(each.family for each in found))
    columns = [[each for each in found if each.family == family] for family in families]
    return [each for each in chain.from_iterable(zip_longest(*columns)) if each is not None]
