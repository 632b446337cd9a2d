"""The common part of the doubles of network engines: memory that other processes of this machine may write.

A serving engine listens on a socket. A peer that connects receives the address of the table of registered memory in the
server's address space. It reads the table there before each write, as a network card would: nothing that the serving
process does or omits delays a write. The connection carries nothing else; its end means that a side closed or died.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading

import numpy as np
import numpy.typing as npt

from kvroom.plan.blocks import U64, Blocks
from kvroom.transports.kit import machine
from kvroom.transports.kit.iovec import Segments, copy_from_process, copy_to_process
from kvroom.transports.kit.ranges import u64

MOST_PIECES = 1024
_GREETING = struct.Struct("<qQ")  # pid, address of the table


class Table:
    """Registered pieces of memory as rows (identity, address, bytes) of uint64[n, 3]; unused rows are zero."""

    def __init__(self, rows: npt.NDArray[np.uint64] | None = None) -> None:
        self.rows = np.zeros((MOST_PIECES, 3), np.uint64) if rows is None else rows
        self._lock = threading.Lock()

    def add(self, identity: int, address: int, nbytes: int) -> bool:
        """Add a piece; return whether a row was free."""
        with self._lock:
            free = np.flatnonzero(self.rows[:, 2] == 0)
            if free.size:
                self.rows[free[0]] = identity, address, nbytes
            return bool(free.size)

    def remove(self, identity: int) -> bool:
        """Remove a piece; return whether it was registered."""
        with self._lock:
            mine = (self.rows[:, 0] == np.uint64(identity)) & (self.rows[:, 2] > 0)
            self.rows[mine, 2] = 0
            return bool(mine.any())

    def clear(self) -> None:
        """Remove all pieces."""
        with self._lock:
            self.rows[:] = 0

    def holds(self, address: U64, length: U64, identity: int | None = None) -> bool:
        """Return whether every block lies inside one registered piece, and in the piece `identity` if that is given."""
        with self._lock:
            rows = self.rows[self.rows[:, 2] > 0]
        if identity is not None:
            rows = rows[rows[:, 0] == np.uint64(identity)]
        if not address.size or not rows.size:
            return not address.size
        rows = rows[np.argsort(rows[:, 1])]
        index = np.searchsorted(rows[:, 1], address, side="right") - 1  # -1, before the first: the offset wraps around
        offset, size = address - rows[index, 1], rows[index, 2]
        return bool(((offset <= size) & (length <= size - offset)).all())


class Served:
    """A table, and a socket on which peers find it. Raise `OSError` if the address cannot be bound."""

    def __init__(self, host: str, port: int, table: Table) -> None:
        machine.allow_same_user_writers()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self._stop, stopped = socket.socketpair()
        self._thread = threading.Thread(
            target=_serve, args=(self._listener, stopped, table), name="double-served", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Close the socket and all connections, so that every peer sees the end."""
        self._stop.close()
        self._thread.join()


def _serve(listener: socket.socket, stopped: socket.socket, table: Table) -> None:
    greeting = _GREETING.pack(os.getpid(), table.rows.__array_interface__["data"][0])
    links: dict[int, socket.socket] = {}
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(stopped, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == stopped.fileno():
                for each in (listener, stopped, *links.values()):
                    each.close()
                return
            if fd == listener.fileno():
                link, _ = listener.accept()
                links[link.fileno()] = link
                poller.register(link, select.POLLIN)
                link.send(greeting)
            else:  # a peer sends nothing, so readable means that it has closed or died
                poller.unregister(fd)
                links.pop(fd).close()


class Remote:
    """A connection to a serving peer. Raise `OSError` if it cannot be reached, or ends."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._link = socket.create_connection((host, port), timeout_s)
        try:
            greeting = self._link.recv(_GREETING.size, socket.MSG_WAITALL)
            if len(greeting) < _GREETING.size:
                raise ConnectionResetError("the peer closed the connection")
            self._pid, self._table = _GREETING.unpack(greeting)
        except OSError:
            self._link.close()
            raise

    def fileno(self) -> int:
        return self._link.fileno()

    def ended(self) -> bool:
        """Return whether the peer has closed or died."""
        return bool(select.select([self._link], [], [], 0)[0])

    def table(self) -> Table:
        """Read the table of what the peer has registered now."""
        if self.ended():
            raise ConnectionResetError("the peer has closed the connection")
        table = Table()
        here, size = table.rows.__array_interface__["data"][0], u64([table.rows.nbytes])
        copy_from_process(self._pid, Segments(u64([here]), size), Segments(u64([self._table]), size))
        return table

    def write(self, blocks: Blocks) -> None:
        """Write the blocks. After an error, some of the bytes have been written."""
        if blocks.length.size:
            copy_to_process(self._pid, Segments(blocks.src, blocks.length), Segments(blocks.dst, blocks.length))

    def close(self) -> None:
        self._link.close()
