"""Whether bytes of a TCP connection may still arrive after one end has let it go, as the kernel's own table tells.

A closed or dead writer's kernel goes on sending what is in its buffers, and the reader's process goes on reading. That
has ended when no socket of either end is left, or only one in TIME_WAIT: the reader has read to the end and closed.
See proc_net_tcp in the kernel's documentation; addresses stay the hexadecimal text of that table.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import NamedTuple

_TIME_WAIT, _LISTEN = "06", "0A"
_CLOSE_WAIT = "08"  # the other end has sent its last byte and closed
_UNCONNECTED = "07"  # a UDP socket without a peer; it is named TCP_CLOSE
_MAPPED = "0000000000000000FFFF0000"  # an IPv4 address within an IPv6 one, as the table writes it
_LOOPBACK = "7F"


class TcpRow(NamedTuple):
    """One row of the table. Ends are (address, port); `inode` is 0 where no process holds the socket any more."""

    here: tuple[str, int]
    there: tuple[str, int]
    state: str
    inode: int

    @property
    def within_machine(self) -> bool:
        """Whether the other end, too, is an address of this machine."""
        return self.here[0] == self.there[0] or self.there[0].endswith(_LOOPBACK)

    @property
    def host(self) -> str:
        """The address of the other end, as `plain` writes it."""
        return _text(self.there[0])


def table() -> list[TcpRow]:
    """Return every TCP socket of this network namespace."""
    rows: list[TcpRow] = []
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/self/net", name).read_text().splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for line in lines:
            fields = line.split()
            rows.append(TcpRow(_end(fields[1]), _end(fields[2]), fields[3], int(fields[9])))
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


class ListeningSocket(NamedTuple):
    """A socket that takes what any caller sends: a TCP one that listens, or a UDP one that is bound to no peer."""

    address: str
    port: int
    protocol: str

    def __str__(self) -> str:
        where = f"[{self.address}]" if ":" in self.address else self.address
        return f"{where}:{self.port} ({self.protocol})"


def listeners() -> set[ListeningSocket]:
    """Return what this process listens on, TCP and UDP."""
    texts = {}
    for name in ("tcp", "tcp6", "udp", "udp6"):
        try:
            texts[name] = Path("/proc/self/net", name).read_text()
        except FileNotFoundError:  # a kernel without IPv6
            continue
    return read_listeners(texts, held())


def read_listeners(texts: Mapping[str, str], inodes: Set[int]) -> set[ListeningSocket]:
    """Return the listeners among the sockets of these inodes. `texts`: the tables by name, "tcp6" for one."""
    found = set()
    for name, text in texts.items():
        protocol = name.removesuffix("6")
        state = _LISTEN if protocol == "tcp" else _UNCONNECTED
        for line in text.splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == state and int(port, 16) and int(fields[9]) in inodes:
                found.add(ListeningSocket(_text(address), int(port, 16), protocol))
    return found


def _text(address: str) -> str:
    """Return an address as people write it. The table has words of 32 bits, in the order of this machine's bytes."""
    words = [int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def plain(host: str) -> str:
    """Return a numeric address as this module writes them: without a scope, IPv4 also where it is mapped into IPv6."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def open_at(ports: frozenset[int]) -> list[TcpRow]:
    """Return the connections that this process holds with other networks, to or from one of `ports`.

    One whose other end is in this network's table, too, is left out: engines connect to themselves.
    """
    rows, mine = table(), held()
    ends = {(row.here, row.there) for row in rows if row.inode}
    return [
        row
        for row in rows
        if row.inode in mine
        and row.state not in (_LISTEN, _TIME_WAIT)
        and (row.here[1] in ports or row.there[1] in ports)
        and (row.there, row.here) not in ends
    ]


def unread_from(host: str, known: Set[int], ports: frozenset[int]) -> bool:
    """Return True while this process may still take bytes from a dead peer on another machine.

    That is while it holds one of the `known` sockets (by inode), whatever their state: an engine that has read bytes
    copies them before it closes. Or one to that `host` which the other end has closed, although nobody knew of it.
    """
    return any(row.inode in known or (row.state == _CLOSE_WAIT and row.host == host) for row in open_at(ports))


def hang_up(inodes: Set[int]) -> None:
    """End these sockets of this process both ways, as if their other end had: it is dead, and may never say so.

    What had arrived can still be read, then comes the end; whatever arrives later is refused. The descriptors are the
    engine's, so each is copied first, and the copy looked at: by then the number may name something else.
    """
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, no socket, or ended already
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith("socket:[") and int(target[8:-1]) in inodes:
                with socket.socket(fileno=os.dup(int(fd))) as copy:
                    if os.fstat(copy.fileno()).st_ino in inodes:
                        copy.shutdown(socket.SHUT_RDWR)


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
