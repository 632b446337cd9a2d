"""`tcp`: scatter/gather over a TCP connection, straight from the source's pages into the sink's pages.

The sink's own thread does the writing and checks every block against the grant before it takes one byte of payload.
That is why here `revoke` and `fence` are proofs: both only have to stop our own thread (see `sink`).
A peer may write only while it has a handle here, for the handshake needs its public key, and only under a grant that is
bound to it: a sink connects to a source before it offers it pages.

What a source cannot prove: after its connection broke, or was fenced while the sink did not answer, bytes of a failed
transfer may still come out of the kernel's buffers on the sink's side, until the sink revokes the grant.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from kvroom.dialling.advertised import advertised_host
from kvroom.errors import TransportError
from kvroom.listening.threads import AcceptThread
from kvroom.plan.blocks import U64, Blocks, Extents, MemoryRange
from kvroom.transports.base import Transport
from kvroom.transports.kit.data_handshake import BUSY
from kvroom.transports.kit.data_keys import DataKey, InstanceKey
from kvroom.transports.kit.data_socket import listen, to_close
from kvroom.transports.kit.devices import cpu_memory
from kvroom.transports.kit.finding import Finding
from kvroom.transports.kit.futures import Transfer
from kvroom.transports.kit.grants import TOKEN_BYTES, ForeignGrant, Grants
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.ranges import Ranges
from kvroom.transports.tcp.frames import Description, checked
from kvroom.transports.tcp.sink import Inbound
from kvroom.transports.tcp.source import Outbound
from kvroom.wire.address import HostPort

_JOIN_S = 5.0


def probe() -> Finding:
    """It runs wherever Python does."""
    return Finding("kvroom")


class TcpTransport(Transport):
    """Moves host memory to any host that this one can reach.

    `host`, `port`: where the sink listens for data (port 0: any free one). `advertise`: the host that peers dial, if it
    is not `host`. `max_connections`: accepted at a time; `to_close` says which of them makes room for a new one.
    `handshake_s`: after that an accepted connection must have proven which peer it is. `introduction_s`: how long its
    handshake waits for our own `connect` to that peer before it is refused. `connect_s`: how long dialing a peer may
    take.
    """

    name: ClassVar[str] = "tcp"

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        max_connections: int = 256,
        handshake_s: float = 5.0,
        introduction_s: float = 2.0,
        connect_s: float = 5.0,
    ) -> None:
        reached_by = advertised_host(host, advertise)
        self._key = InstanceKey(self.name)
        self.endpoint = self._key.public
        self.handshake_s = handshake_s
        self.recent_faults: deque[str] = deque(maxlen=16)  # why accepted connections ended, newest last
        self._introduction_s = introduction_s
        self._connect_s = connect_s
        self._max_connections = max_connections
        self._grants = Grants(self.name)
        self._peers: PeerTable[Outbound] = PeerTable(self.name)
        self._lock = threading.Lock()
        self._inbound: dict[Inbound, None] = {}
        """Accepted connections, oldest first."""
        listeners = listen(host, port)
        self._address = HostPort.of(reached_by, listeners[0].getsockname()[1])
        self._accepting = AcceptThread(listeners, "kvroom-tcp-accept", self._take, refusal=BUSY)

    def register(self, memory: Sequence[MemoryRange]) -> None:
        self._memory = Ranges.of(cpu_memory(self.name, memory))

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(Description(*self._address, self.endpoint))

    def connect(self, description: bytes) -> int:
        """As in `Transport`; does not dial, the first transfer does."""
        peer = checked(description)
        if self._accepting.closing:
            raise TransportError("tcp: this transport is closed")
        return self._peers.add(peer.endpoint, Outbound(self._key.shared_with(peer.endpoint), peer, self._connect_s))

    def why(self, peer: int) -> str:
        self._peers.get(peer)
        return "tcp: asked for by name"

    def grant(self, extents: Extents) -> bytes:
        self._memory.check("granted", *extents, "this side registered")
        return self._grants.give(extents)

    def bind(self, grant: bytes, peer: int) -> None:
        outbound = self._peers.find(peer)
        if outbound is not None:
            self._grants.bind(grant, outbound.sink.endpoint)

    def revoke(self, grant: bytes) -> bool:
        self._grants.take_back(grant)  # first: a frame that begins after this is refused
        for connection in self._connections():
            connection.revoke(grant)
        return True

    def key_with(self, source: bytes) -> DataKey | None:
        """Return the key in common with `source` once this side is connected to it; it may have been faster.

        None if it still is not after `introduction_s`. Called by the connections.
        """
        outbound = self._peers.met(source, self._introduction_s)
        return None if outbound is None else outbound.key

    def admit(self, source: bytes, grant: bytes, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless `source` may write these blocks now. Called by the connections."""
        if self._peers.of(source) is None:
            raise TransportError("this side has not connected to the writer, or has fenced it")
        self._grants.check(source, grant, dst, length)

    def warn_of(self, host: str, error: ForeignGrant) -> None:
        """Log that a peer which connects from there wanted to write under a grant of another."""
        self._grants.warn_of(host, error)

    def _peer_memory(self, peer: int) -> None:
        self._peers.get(peer)  # the sink checks: see `admit`

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        if len(grant) != TOKEN_BYTES:
            raise TransportError(f"tcp: a grant has {TOKEN_BYTES} bytes, not {len(grant)}")
        return self._peers.get(peer).submit(blocks, grant)

    def fence(self, peer: int) -> bool:
        self._peers.find(peer)
        outbound = self._peers.forget(peer)  # first: a frame that begins after this is refused
        if outbound is not None:
            for connection in self._connections():
                if connection.source == outbound.sink.endpoint:
                    connection.close()
            outbound.stop()
        return True

    def close(self) -> None:
        self._accepting.close()
        for handle in self._peers.all():
            self.fence(handle)
        for connection in self._connections():
            connection.close()
            connection.join(_JOIN_S)
        self._grants.take_back_all()

    def _connections(self) -> list[Inbound]:
        with self._lock:
            return list(self._inbound)

    def _take(self, connection: socket.socket) -> None:
        with self._lock:
            try:
                stranger = to_close(list(self._inbound), self._max_connections)
            except TransportError as full:
                self.recent_faults.append(str(full))
                connection.close()
                return
            if stranger is not None:
                self.recent_faults.append("too many connections in their handshake; closed the oldest")
                del self._inbound[stranger]
                stranger.close()
            inbound = Inbound(connection, self, self._forget)
            self._inbound[inbound] = None
            inbound.start()

    def _forget(self, connection: Inbound, fault: str | None) -> None:
        if fault is not None:
            self.recent_faults.append(fault)
        with self._lock:
            self._inbound.pop(connection, None)
