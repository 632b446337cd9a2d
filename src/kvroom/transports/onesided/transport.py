"""The base class of the transports that write through an engine of another project: NIXL, Mooncake, Ascend, Mori.

The engine moves bytes. This part keeps the peers, checks ranges, cuts batches, and finds out the one thing that engines
do not report reliably: when a write that failed has really ended (`work.py`).

The sink takes no part in a write, so `revoke` proves nothing. `fence` is proof under two conditions: the writer's
process has ended (this side sees that on its own machine, and learns it by `fence_dead` for others), and this process
holds no connection over which the writer's last bytes may still arrive.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

import msgspec

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports.base import MalformedDescription, Transport
from kvroom.transports.kit import machine
from kvroom.transports.kit.data_keys import InstanceKey
from kvroom.transports.kit.data_socket import WriterAdmission
from kvroom.transports.kit.descriptions import read_description
from kvroom.transports.kit.devices import Devices, joined
from kvroom.transports.kit.grants import Grants
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.pool import Pool, allocate
from kvroom.transports.kit.ranges import Ranges
from kvroom.transports.kit.transfers import Transfer

from . import kernel_tcp
from .engine import EngineTransfer, OneSidedDescription, OneSidedEngine
from .exposure import Exposed, Guard
from .options import SLOTS, OneSidedOptions
from .packing.client import PackClient
from .packing.protocol import Area
from .packing.sender import StagingPool
from .packing.server import PackServer
from .peer import OneSidedPeer
from .work import Workers, within

S = TypeVar("S")
_WAIT_S = 1.0
_INTRODUCTION_S = 0.5  # sinks connect before they offer, so a source comes too early only by a switch of threads
# Staging memory of closed transports into which a peer may still write. Unmapped, its addresses could be used again,
# and the late write would land in the memory of another owner. It is kept until the process ends.
_kept: list[Pool] = []


class OneSidedTransport(Transport, Generic[S]):
    """A transport around an engine. A subclass defines its name, its tagged `description` type and the engine."""

    description: ClassVar[type[OneSidedDescription]]
    key: InstanceKey

    def __init__(
        self, engine: OneSidedEngine[S], options: OneSidedOptions | None = None, key: InstanceKey | None = None
    ) -> None:
        self.key = InstanceKey(self.name) if key is None else key
        self.endpoint = self.key.public
        self._engine = engine
        self._options = (options or OneSidedOptions()).checked(self.name)
        engine.guard = Guard(self.name, self._options.host, self._options.trusted_fabric)
        self._staging: Pool | None = None
        self._pack_server: PackServer | None = None
        self._staging_pool: StagingPool | None = None
        self._grants = Grants(self.name)
        self._described: OneSidedDescription | None = None
        self._peers: PeerTable[OneSidedPeer[S]] = PeerTable(self.name)
        self._lock = threading.Lock()
        self._workers = Workers(self.name, engine, self._lock, self._options.packing)
        self._open = True

    def register(self, memory: Sequence[MemoryRange]) -> None:
        """See `Transport`. If the engine listens on more than the host, this transport closes and raises `Exposed`."""
        listed, before = joined(memory), kernel_tcp.listening()
        self._engine.guard.refuse(self._engine.fabric())
        staging: list[MemoryRange] = []
        if self._options.packs and all(piece.device == "cpu" for piece in listed):
            self._staging = allocate(self._options.slot_bytes * 2 * SLOTS)
            staging = [MemoryRange(self._staging.address, self._staging.nbytes)]
        try:
            card = self._engine.guard.call(lambda: self._engine.start([*listed, *staging]))
        except Exposed:
            self.close()
            raise
        ports = tuple(sorted(kernel_tcp.listening() - before))
        network, process = os.stat("/proc/self/ns/net").st_ino, machine.Process.current()
        self._memory = Ranges.of(listed)
        area: Area | None = None
        if self._staging is not None:  # peers write into its first half; this side gathers in the second
            base, slot_bytes = self._staging.address, self._options.slot_bytes
            self._staging_pool = StagingPool(base + SLOTS * slot_bytes, SLOTS, slot_bytes)
            admission = WriterAdmission(self.endpoint, self._peers, self._grants, introduction_s=_INTRODUCTION_S)
            self._pack_server = PackServer(
                admission,
                self._quiet,
                host=self._options.host,
                advertise=self._options.advertise,
                address=base,
                slots=SLOTS,
                slot_bytes=slot_bytes,
            )
            area = self._pack_server.area
        self._workers.use(Devices(listed), self._staging_pool)
        self._described = self.description(
            endpoint=self.endpoint,
            process=process,
            network=network,
            memory=tuple((m.address, m.nbytes, m.device) for m in listed),
            ports=ports,
            engine=card,
            staging=tuple((m.address, m.nbytes, m.device) for m in staging),
            area=area,
        )

    def describe(self) -> bytes:
        if self._described is None:
            raise TransportError(f"{self.name}: no memory is registered; call register before describe")
        return msgspec.msgpack.encode(self._described)

    def connect(self, description: bytes) -> int:
        handle = self.watch(description)
        peer = self._peers.get(handle)
        try:
            peer.session()
        except MalformedDescription:
            # The caller gets no handle, so it could never fence this peer: nothing of it may be kept.
            if self._peers.forget(handle) is peer:
                peer.close()
            raise
        return handle

    def watch(self, description: bytes) -> int:
        described = read_description(description, self.description)
        handle = self._peers.attach(described.endpoint) or self._meet(described)
        self._peers.get(handle).mark_linked()
        return handle

    def _meet(self, described: OneSidedDescription) -> int:
        client, key = None, self.key.shared_with(described.endpoint)
        if self._pack_server is not None and described.area is not None:
            try:
                client = PackClient(self.name, key, described.area)
            except ConfigurationError as error:
                raise MalformedDescription(
                    f"{self.name}: the peer's description names an invalid address of its pack server: {error}"
                ) from None
        peer = OneSidedPeer(described, self._engine, key, client)
        with self._lock:
            handle = self._peers.add(described.endpoint, peer) if self._open else 0
        if not handle or self._peers.find(handle) is not peer:  # another thread has added the same peer since
            peer.close()
        if not handle:
            raise TransportError(f"{self.name}: this transport is closed")
        return handle

    def explain(self, peer: int) -> str:
        target = self._peers.get(peer)
        where = "on this machine" if target.here else "on another machine"
        error = "" if target.client is None else target.client.error
        small = f"; small blocks are written one by one, because {error}" if error else ""
        return f"{self.name}: {self._engine.way()}; the peer is {where}{small}"

    def grant(self, extents: Extents) -> bytes:
        """See `Transport`. Enforced for packed blocks only. b"" if this side has no staging memory."""
        if self._pack_server is None:
            return b""
        self._memory.check("granted", extents.address, extents.length, "this side registered")
        return self._grants.issue(extents)

    def bind(self, grant: bytes, peer: int) -> None:
        """See `Transport`. Enforced for packed blocks only."""
        target = self._peers.find(peer)
        if target is not None:
            self._grants.bind(grant, target.endpoint)

    def revoke(self, grant: bytes) -> bool:
        """Return False once nothing is unpacked under the grant any longer.

        It is no proof: the peer may still write the same pages directly.
        """
        # The token first: a chunk that starts after the pack server has waited must find the grant gone.
        if self._grants.revoke(grant) and self._pack_server is not None:
            self._pack_server.revoke(grant)
        return False

    def staging_slots(self) -> dict[str, int]:
        if self._pack_server is None or self._staging_pool is None:
            return {}
        return {**self._pack_server.audit(), "packing": self._staging_pool.used}

    def _quiet(self, source: bytes) -> bool:
        """Return True if this source is proven to be dead and its last bytes have arrived. For the pack server."""
        peers = [self._peers.find(handle) for handle in self._peers.all()]
        return any(peer is not None and peer.endpoint == source and self._proven(peer) for peer in peers)

    def _peer_memory(self, peer: int) -> Ranges:
        return self._peers.get(peer).memory

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        transfer = EngineTransfer(blocks, grant)
        with self._lock:
            if not self._open:
                raise TransportError(f"{self.name}: this transport is closed")
            target = self._peers.get(peer)  # again under the lock: `fence` may have detached it
            first = target.add(transfer)
        if first:
            self._workers.start(target)
        return transfer.future

    def note_lost(self, peer: int, host: str, others: frozenset[str]) -> None:
        target, ours = self._peers.find(peer), self._described
        # For a peer in this network namespace the table shows both ends at any time, so `_proven` needs no note.
        if target is not None and ours is not None and target.network != ours.network:
            target.note_lost(kernel_tcp.open_at(target.ports | frozenset(ours.ports)), host, others)

    def fence_dead(self, peer: int) -> bool:
        target = self._peers.find(peer)
        if target is not None and not target.here:  # for a process on this machine, what this side sees decides
            target.dead = True
        return self.fence(peer)

    def fence(self, peer: int) -> bool:
        target = self._peers.find(peer)
        if target is None:
            return True
        with self._lock:
            self._peers.detach(peer)
            running, dropped = target.running, target.drop(f"{self.name}: the peer was fenced")
        for transfer in dropped:
            transfer.finish()
        if self._pack_server is not None:
            self._pack_server.expel(target.endpoint)
        if running is not None and concurrent.futures.wait([running.future], _WAIT_S).not_done:
            return False
        # A peer that is alive on this machine keeps its session: engines join it again slowly, and leak each time.
        if target.gone() or not target.here:
            target.end_session()
        if not self._proven(target):
            return False
        with self._lock:  # of two threads that fence the same peer, one closes it
            forgotten = self._peers.forget(peer)
        if forgotten is not None:
            if self._pack_server is not None:
                self._pack_server.quiet(forgotten.endpoint)
            forgotten.close()
        return True

    def _proven(self, peer: OneSidedPeer[S]) -> bool:
        """Return True if the peer is dead and the last bytes that it sent have been read. May block for a second."""
        ours = self._described
        if ours is None or not (peer.gone() or peer.dead):
            return False
        ports = peer.ports | frozenset(ours.ports)
        if ours.network == peer.network:
            return within(_WAIT_S, lambda: not kernel_tcp.unread(ports))
        if peer.last_sockets is None:  # the table lacks the peer's ends, so `note_lost` has to come first
            return False
        host, known = peer.host, frozenset(peer.last_sockets)
        kernel_tcp.hang_up({inode for inode, its_own in peer.last_sockets.items() if its_own})
        return within(_WAIT_S, lambda: not kernel_tcp.unread_from(host, known, ports))

    def close(self) -> None:
        with self._lock:
            first, self._open = self._open, False
            peers = [peer for peer in map(self._peers.forget, self._peers.all()) if peer is not None]
            dropped = [transfer for peer in peers for transfer in peer.drop(f"{self.name}: this transport was closed")]
            running = [peer.running for peer in peers if peer.running is not None]
        for transfer in dropped:
            transfer.finish()
        concurrent.futures.wait([transfer.future for transfer in running], _WAIT_S)
        for transfer in running:
            transfer.abandoned = True
        if self._pack_server is not None:
            self._pack_server.close()
        for peer in peers:
            peer.hang_up()
        self._workers.stop()
        for peer in peers:
            peer.close()
        self._grants.revoke_all()
        if first:
            self._engine.stop()
            staging, self._staging = self._staging, None
            if staging is not None and self._pack_server is not None:
                if any(self.staging_slots().values()):  # a peer may still write into a slot
                    _kept.append(staging)
                else:
                    staging.close()
