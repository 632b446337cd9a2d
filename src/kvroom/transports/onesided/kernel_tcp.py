"""The kernel's table of TCP sockets: it shows if bytes may still arrive over a connection that one end has closed.

After a writer has closed or died, its kernel goes on sending what is in its buffers, and the reader's process goes on
reading. Both have ended when no socket of either end is left, or only one in TIME_WAIT: then the reader has read to the
end and closed. See proc_net_tcp in the kernel's documentation; addresses stay the hexadecimal text of that table.
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
    """One row of the table. Ends are (address, port); `inode` is 0 if no process holds the socket any longer."""

    here: tuple[str, int]
    there: tuple[str, int]
    state: str
    inode: int

    @property
    def within_machine(self) -> bool:
        """True if the other end is an address of this machine as well."""
        return self.here[0] == self.there[0] or self.there[0].endswith(_LOOPBACK)

    @property
    def host(self) -> str:
        """The address of the other end, as `plain` writes it."""
        return _text(self.there[0])


def table() -> list[TcpRow]:
    """Read every TCP socket of this network namespace."""
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
        except OSError:  # closed since it was listed
            continue
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes


def listening() -> set[int]:
    """Return the TCP ports on which this process listens, on any address."""
    mine = held()
    return {row.here[1] for row in table() if row.state == _LISTEN and row.inode in mine}


class ListeningSocket(NamedTuple):
    """A socket that any caller can reach: a TCP socket that listens, or a UDP socket that is connected to no peer."""

    address: str
    port: int
    protocol: str

    def __str__(self) -> str:
        where = f"[{self.address}]" if ":" in self.address else self.address
        return f"{where}:{self.port} ({self.protocol})"


def listeners() -> set[ListeningSocket]:
    """Return the sockets on which this process listens, TCP and UDP."""
    texts = {}
    for name in ("tcp", "tcp6", "udp", "udp6"):
        try:
            texts[name] = Path("/proc/self/net", name).read_text()
        except FileNotFoundError:  # a kernel without IPv6
            continue
    return read_listeners(texts, held())


def read_listeners(texts: Mapping[str, str], inodes: Set[int]) -> set[ListeningSocket]:
    """Return the listeners among the sockets of these inodes. `texts`: the tables by their names, such as "tcp6"."""
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
    """Return an address in its usual notation. The table has words of 32 bits, in this machine's byte order."""
    words = [int(address[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def plain(host: str) -> str:
    """Return a numeric address without its scope, and as IPv4 if it is mapped into IPv6; any other host unchanged."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def open_at(ports: frozenset[int]) -> list[TcpRow]:
    """Return the connections that this process holds with other network namespaces, to or from one of `ports`.

    A connection whose other end is in this table as well is left out: engines connect to themselves.
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

    It may while it holds one of the `known` sockets (inodes) in any state, because an engine that has read bytes copies
    them to memory before it closes the socket. It also may while it holds a socket to `host` that the other end has
    closed: one that was opened too late to be in `known`.
    """
    return any(row.inode in known or (row.state == _CLOSE_WAIT and row.host == host) for row in open_at(ports))


def hang_up(inodes: Set[int]) -> None:
    """Shut down these sockets of this process, in both directions. Their other end is dead and may never close them.

    Bytes that have arrived can still be read, then the stream ends; bytes that arrive later are refused. The
    descriptors belong to the engine, which may close one and reuse its number at any time. So each is duplicated first,
    and the duplicate is checked before it is shut down.
    """
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since it was listed, no socket, or shut down already
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith("socket:[") and int(target[8:-1]) in inodes:
                with socket.socket(fileno=os.dup(int(fd))) as copy:
                    if os.fstat(copy.fileno()).st_ino in inodes:
                        copy.shutdown(socket.SHUT_RDWR)


def unsent(ports: frozenset[int]) -> bool:
    """Return True while bytes may still reach a peer that listens on `ports` over connections that were closed here.

    Such a socket has no inode, because no process holds it; the kernel goes on sending what is in its buffers.
    """
    return any(
        row.inode == 0 and row.state != _TIME_WAIT and row.there[1] in ports and row.state != _LISTEN for row in table()
    )


def unread(ports: frozenset[int]) -> bool:
    """Return True while this process holds a connection to or from one of `ports` with a dead process of this machine.

    Connections with other machines do not count, because their other ends are not in this table.
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
