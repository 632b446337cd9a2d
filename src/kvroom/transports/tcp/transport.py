"""`tcp`: scatter/gather over a TCP connection, straight from the source's pages into the sink's pages.

The sink's own thread writes the pages, and it checks every block against the grant before it receives the first byte
of payload. `revoke` and `fence` are therefore proofs: they only have to stop a thread of this process (see `sink`).
A peer can write only while it has a handle here, because the handshake requires its public key, and only under a grant
that is bound to it: a sink connects to a source before it offers pages to it.

One proof is not possible on the source's side. If its connection was lost, or was fenced while the sink did not answer,
bytes of a failed transfer may still be in the kernel's buffers on the sink's host. The sink may write them to its pages
until it revokes the grant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from kvroom.dialling.advertised import advertised_host
from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports.base import Transport
from kvroom.transports.kit.data_keys import InstanceKey
from kvroom.transports.kit.data_socket import DataListener, WriterAdmission
from kvroom.transports.kit.devices import cpu_memory
from kvroom.transports.kit.grants import TOKEN_BYTES, Grants
from kvroom.transports.kit.options import ListeningOptions, Port, Seconds, TransportOptions
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.probing import ProbeResult
from kvroom.transports.kit.ranges import Ranges
from kvroom.transports.kit.transfers import Transfer
from kvroom.wire.address import HostPort

from .frames import TcpDescription, checked
from .sink import Inbound
from .source import Outbound


def probe() -> ProbeResult:
    """Return that this transport is always available."""
    return ProbeResult("kvroom")


class TcpOptions(ListeningOptions, frozen=True, kw_only=True):
    """Options of `tcp`. Times are in seconds."""

    port: Annotated[Port, Meta(description="of the data connections; 0: any free one")] = 0
    max_connections: Annotated[
        int,
        Meta(ge=1, description="limit on accepted connections; a new one replaces the oldest unauthenticated one"),
    ] = 256
    handshake_s: Annotated[
        Seconds, Meta(description="limit on each wait for an accepted connection to prove which peer it is")
    ] = 5.0
    introduction_s: Annotated[
        float,
        Meta(ge=0, description="limit on a handshake's wait for this side's own `connect` to the writer"),
    ] = 2.0
    connect_s: Annotated[Seconds, Meta(description="limit on dialling a peer, and on its handshake")] = 5.0


class TcpTransport(Transport):
    """Move host memory to any host that this one can reach."""

    name: ClassVar[str] = "tcp"
    options: ClassVar[type[TransportOptions]] = TcpOptions
    key: InstanceKey

    def __init__(self, options: TcpOptions | None = None) -> None:
        given = (options or TcpOptions()).checked(self.name)
        reached_by = advertised_host(given.host, given.advertise)
        self.key = InstanceKey(self.name)
        self.endpoint = self.key.public
        self._connect_s = given.connect_s
        self._grants = Grants(self.name)
        self._peers: PeerTable[Outbound] = PeerTable(self.name)
        admission = WriterAdmission(
            self.endpoint, self._peers, self._grants, handshake_s=given.handshake_s, introduction_s=given.introduction_s
        )
        self._listener: DataListener[Inbound] = DataListener(
            given.host,
            given.port,
            name="kvroom-tcp-accept",
            limit=given.max_connections,
            make=lambda found: Inbound(found, admission),
        )
        self._address = HostPort.of(reached_by, self._listener.port)

    @property
    def recent_errors(self) -> Sequence[str]:
        """The reasons for which accepted connections ended, newest last; the last 16 are kept."""
        return self._listener.recent_errors

    def register(self, memory: Sequence[MemoryRange]) -> None:
        self._memory = Ranges.of(cpu_memory(self.name, memory))

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(TcpDescription(*self._address, self.endpoint))

    def connect(self, description: bytes) -> int:
        """Connect as `Transport.connect` does, but without dialling: the first transfer dials."""
        peer = checked(description)
        if self._listener.closing:
            raise TransportError("tcp: this transport is closed")
        return self._peers.add(peer.endpoint, Outbound(self.key.shared_with(peer.endpoint), peer, self._connect_s))

    def explain(self, peer: int) -> str:
        self._peers.get(peer)
        return "tcp: selected by name"

    def grant(self, extents: Extents) -> bytes:
        self._memory.check("granted", extents.address, extents.length, "this side registered")
        return self._grants.issue(extents)

    def bind(self, grant: bytes, peer: int) -> None:
        outbound = self._peers.find(peer)
        if outbound is not None:
            self._grants.bind(grant, outbound.sink.endpoint)

    def revoke(self, grant: bytes) -> bool:
        self._grants.revoke(grant)  # first, so that every frame that begins from now on is refused
        for connection in self._listener.connections():
            connection.revoke(grant)
        return True

    def _peer_memory(self, peer: int) -> None:
        self._peers.get(peer)  # the sink checks: see `kit.data_socket.WriterAdmission`

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        if len(grant) != TOKEN_BYTES:
            raise TransportError(f"tcp: a grant has {TOKEN_BYTES} bytes, not {len(grant)}")
        return self._peers.get(peer).submit(blocks, grant)

    def fence(self, peer: int) -> bool:
        self._peers.find(peer)
        outbound = self._peers.forget(peer)  # first, so that every frame that begins from now on is refused
        if outbound is not None:
            for connection in self._listener.connections():
                if connection.source == outbound.sink.endpoint:
                    connection.close()
            outbound.stop()
        return True

    def close(self) -> None:
        self._listener.stop()
        for handle in self._peers.all():
            self.fence(handle)
        self._listener.close()
        self._grants.revoke_all()
