"""Whether bytes of a TCP connection may still arrive after one end has let it go, as the kernel's own table tells.

A closed or dead writer's kernel goes on sending what is in its buffers, and the reader's process goes on reading. That
has ended when no socket of either end is left, or only one in TIME_WAIT: the reader has read to the end and closed.
See proc_net_tcp in the kernel's documentation; addresses stay the hexadecimal text of that table.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_TIME_WAIT, _LISTEN = "06", "0A"
_MAPPED = "0000000000000000FFFF0000"  # an IPv4 address within an IPv6 one, as the table writes it
_LOOPBACK = "7F"


class Connection(NamedTuple):
    """One row of the table. Ends are (address, port); `inode` is 0 where no process holds the socket any more."""

    here: tuple[str, int]
    there: tuple[str, int]
    state: str
    inode: int

    @property
    def within_machine(self) -> bool:
        """Whether the other end, too, is an address of this machine."""
        return self.here[0] == self.there[0] or self.there[0].endswith(_LOOPBACK)


def table() -> list[Connection]:
    """Return every TCP socket of this network namespace."""
    rows: list[Connection] = []
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/self/net", name).read_text().splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for line in lines:
            fields = line.split()
            rows.append(Connection(_end(fields[1]), _end(fields[2]), fields[3], int(fields[9])))
    return rows


def _end(text: str) -> tuple[str, int]:
    address, _, port = text.partition(":")
    return address.removeprefix(_MAPPED), int(port, 16)


def held() -> set[int]:
    """Return the inodes of the sockets that this process holds."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes


def listening() -> set[int]:
    """Return the TCP ports on which this process listens."""
    mine = held()
    return {row.here[1] for row in table() if row.state == _LISTEN and row.inode in mine}


def unsent(ports: frozenset[int]) -> bool:
    """Whether bytes of connections that nobody here holds any more may still reach a peer that listens on `ports`."""
    return any(
        row.inode == 0 and row.state != _TIME_WAIT and row.there[1] in ports and row.state != _LISTEN for row in table()
    )


def unread(ports: frozenset[int]) -> bool:
    """Whether this process holds a connection, to or from one of `ports`, whose other end is a dead one here.

    Ends on other machines are not judged: their sockets are not in this table.
    """
    rows, mine = table(), held()
    alive = {(row.here, row.there) for row in rows if row.inode}
    return any(
        row.inode in mine
        and row.state not in (_LISTEN, _TIME_WAIT)
        and (row.here[1] in ports or row.there[1] in ports)
        and row.within_machine
        and (row.there, row.here) not in alive
        for row in rows
    )
