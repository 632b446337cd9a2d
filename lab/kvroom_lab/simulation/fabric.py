"""The transport of the simulation: real copies between the pools of processes, one block at a time.

The seed chooses one of two kinds. An *enforcing* transport is like `tcp`: the sink checks every block, so a revoked
grant and a fence are proof. A *one-sided* one is like `local` and RDMA: a block lands even if the sink has revoked its
grant, and only the death of the writer is proof. Before a block is copied, it is checked against the page allocators of
both sides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import msgspec

from kvroom.errors import GrantRevoked, TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports import Transfer, Transport
from kvroom.transports.kit.descriptions import read_description
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.ranges import Ranges
from kvroom.transports.kit.transfers import started
from kvroom.wire.keys import SigningKey

from .network import Network
from .pages import Allocation, Pages
from .world import Process, World

STEPS = 4
"""The largest number of steps in which a transfer lands."""


class _Description(msgspec.Struct, frozen=True, tag="simulated"):
    endpoint: bytes
    name: str


class GrantRecord(NamedTuple):
    """The extent of a grant: its bytes, the owners of the pages when it was issued, and the endpoints bound to it."""

    ranges: Ranges
    owners: dict[int, Allocation | None]
    writers: set[str]


class Fabric:
    """All endpoints, and the faults that transfers meet at present."""

    def __init__(self, world: World, network: Network) -> None:
        self.world, self.network = world, network
        self.enforcing = False
        self.by_cpu = False
        """True if a stopped process also stops writing; otherwise a device goes on writing for it."""
        self.sees_deaths = True
        """True if a sink detects by itself that a writer has died; otherwise the writers are on other machines."""
        self.step_s = 0.005
        self.failing = 0.0
        """The probability that a transfer fails half-way."""
        self.spoiling = 0.0
        """The probability that a transfer lands a wrong byte. Only in rooms with a checksum, which must detect it."""
        self.refusing = 0.0
        """The probability that `connect` fails."""
        self.endpoints: dict[str, SimulatedTransport] = {}


class SimulatedTransport(Transport):
    """The endpoint of one process."""

    name: ClassVar[str] = "simulated"

    def __init__(self, fabric: Fabric, process: Process, pages: Pages) -> None:
        self.fabric, self.process, self.pages = fabric, process, pages
        self.world = fabric.world
        self.key = SigningKey()
        self.endpoint = process.name
        self.peers: PeerTable[str] = PeerTable(self.name)
        self.grants: dict[bytes, GrantRecord] = {}
        self.past_grants: dict[bytes, GrantRecord] = {}
        self.fenced: set[str] = set()
        self.flights: list[_Flight] = []
        self._granted = 0
        fabric.endpoints[self.endpoint] = self

    def register(self, memory: Sequence[MemoryRange]) -> None:
        self._memory = Ranges.of(memory)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Description(self.key.public, self.endpoint))

    def connect(self, description: bytes) -> int:
        described = read_description(description, _Description)
        endpoint = described.name
        if not self.fabric.endpoints[endpoint].process.alive:
            raise TransportError("simulated: the peer is gone")
        if self.world.chance(self.fabric.refusing):
            self.world.count("fault: connecting the transport fails")
            raise TransportError("simulated: no queue pair could be made")
        self.fenced.discard(endpoint)
        return self.peers.add(described.endpoint, endpoint)

    def grant(self, extents: Extents) -> bytes:
        self._memory.check("granted", *extents, "this side registered")
        self._granted += 1
        token = f"{self.endpoint} {self._granted}".encode()
        pages = {p for a, n in zip(*(e.tolist() for e in extents), strict=True) for p in self.pages.pages_at(a, n)}
        # A room that ended while its offer was being made has no pages: its grant is revoked immediately after this.
        self.grants[token] = GrantRecord(Ranges(*extents), {page: self.pages.owner.get(page) for page in pages}, set())
        return token

    def bind(self, grant: bytes, peer: int) -> None:
        endpoint, record = self.peers.find(peer), self.grants.get(grant)
        if endpoint is not None and record is not None:
            record.writers.add(endpoint)

    def revoke(self, grant: bytes) -> bool:
        record = self.grants.pop(grant, None)
        if record is not None:
            self.past_grants[grant] = record
        return self.fabric.enforcing

    def _peer_memory(self, peer: int) -> None:
        self.peers.get(peer)  # the sink checks the blocks: see `check_allowed`

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        flight = _Flight(self, self.fabric.endpoints[self.peers.get(peer)], blocks, grant)
        self.flights.append(flight)
        if self.world.chance(0.1):
            flight.run_through()
        else:
            flight.wait()
        return flight.future

    def fence(self, peer: int) -> bool:
        endpoint = self.peers.find(peer)
        if endpoint is None:
            return True
        other = self.fabric.endpoints[endpoint].process
        seen = self.fabric.sees_deaths and self.fabric.network.passes(other, self.process)
        return self._fence(peer, endpoint, proven=self.fabric.enforcing or (seen and not other.alive))

    def fence_dead(self, peer: int) -> bool:
        """Take the caller's word that the process is dead. If it lives after all, its next write breaks law 6."""
        endpoint = self.peers.find(peer)
        return endpoint is None or self._fence(peer, endpoint, proven=True)

    def _fence(self, peer: int, endpoint: str, *, proven: bool) -> bool:
        self.fenced.add(endpoint)
        self.peers.detach(peer)
        if proven:
            self.peers.forget(peer)
        for flight in [flight for flight in self.flights if flight.sink.endpoint == endpoint]:
            flight.end(TransportError("simulated: the peer was fenced"))
        self.world.say(self.process, "fences {}: {}", endpoint, "proven" if proven else "no proof")
        return proven

    def close(self) -> None:
        for flight in list(self.flights):
            flight.end(TransportError("simulated: this transport was closed"))

    # -- called by transfers --------------------------------------------------------------------------------------

    def check_allowed(self, source: SimulatedTransport, grant: bytes, blocks: Blocks) -> GrantRecord:
        """Return the record of the grant, or raise `TransportError` if these blocks may not land now."""
        if not self.process.alive:
            raise TransportError("simulated: the peer is gone")
        self._memory.check("destination", blocks.dst, blocks.length, "the peer registered")
        record = self.grants.get(grant)
        if self.fabric.enforcing:
            if source.endpoint in self.fenced:
                raise TransportError("simulated: the peer has fenced us")
            if record is None:
                raise GrantRevoked("simulated: the peer revoked the grant, or never issued it")
        record = record or self.past_grants[grant]
        if source.endpoint not in record.writers:
            self.world.violate(f"law 10: {source.process} writes under {grant.decode()}, which was not bound to it")
        record.ranges.check("destination", blocks.dst, blocks.length, "the peer granted")
        return record


class _Flight:
    """One transfer in flight."""

    def __init__(self, source: SimulatedTransport, sink: SimulatedTransport, blocks: Blocks, grant: bytes) -> None:
        self.source, self.sink, self.blocks, self.grant = source, sink, blocks, grant
        self.world = source.world
        self.future: Transfer = started()
        self.readers = {page: source.pages.owner.get(page) for page in self._source_pages(0, blocks.length.size)}
        self.done = 0
        self.stride = -(-blocks.length.size // STEPS)
        fails = self.world.chance(source.fabric.failing)
        self.fails_at = self.world.random.randrange(blocks.length.size) if fails else None
        self.spoils = self.world.chance(source.fabric.spoiling)

    def wait(self) -> None:
        fabric = self.source.fabric
        delay_s = fabric.step_s * self.world.random.uniform(0.1, 2.0)
        if fabric.by_cpu:
            self.source.process.call_later(delay_s, self.step)
        else:
            self.world.at(self.world.now + delay_s, self.step)

    def run_through(self) -> None:
        while not self.future.done():
            self.step(again=False)

    def step(self, *, again: bool = True) -> None:
        if self.future.done() or not self.source.process.alive:
            return
        stop = min(self.done + self.stride, self.blocks.length.size)
        try:
            self._copy(stop)
        except TransportError as error:
            self.end(error)
            return
        self.done = stop
        if stop == self.blocks.length.size:
            self.end(None)
        elif again:
            self.wait()

    def end(self, error: TransportError | None) -> None:
        """End the transfer: no further byte lands, and its future has the result."""
        self.source.flights.remove(self)
        if error is None:
            self.future.set_result(self.blocks.nbytes)
        else:
            self.world.say(self.source.process, "transfer under {} ends: {}", self.grant.decode(), error)
            self.future.set_exception(error)

    def _copy(self, stop: int) -> None:
        if self.fails_at is not None and self.done <= self.fails_at < stop:
            self.world.count("fault: transfer breaks")
            raise TransportError("simulated: completion with error")
        part = Blocks(*(numbers[self.done : stop] for numbers in self.blocks))
        record = self.sink.check_allowed(self.source, self.grant, part)
        self._check_source(stop)
        for src, dst, length in zip(*(numbers.tolist() for numbers in part), strict=True):
            self._check_sink(record, dst, length)
            ctypes.memmove(dst, src, length)
            if self.spoils:
                self._spoil(dst)
        self.world.say(
            self.source.process, "writes blocks {} to {} of {} under {}", self.done, stop, self.blocks.length.size,
            self.grant.decode(),
        )  # fmt: skip

    def _spoil(self, address: int) -> None:
        (page,) = self.sink.pages.pages_at(address, 1)
        if self.sink.pages.owner[page].checked:
            self.spoils = False
            self.world.count("fault: a wrong byte lands")
            self.world.say(self.source.process, "lands a WRONG byte in page {} of {}", page, self.sink.process)
            byte = ctypes.c_ubyte.from_address(address)
            byte.value ^= 0x5A

    def _source_pages(self, start: int, stop: int) -> set[int]:
        pairs = zip(self.blocks.src[start:stop].tolist(), self.blocks.length[start:stop].tolist(), strict=True)
        return {page for src, length in pairs for page in self.source.pages.pages_at(src, length)}

    def _check_source(self, stop: int) -> None:
        for page in self._source_pages(self.done, stop):
            now = self.source.pages.owner.get(page)
            if now is None or now is not self.readers[page] or now.returned:
                whose = now.name if now else "no request"
                self.world.violate(f"law 6: a transfer of {self.source.process} reads its page {page} for "
                                   f"{self.grant.decode()} when it belongs to {whose}")  # fmt: skip

    def _check_sink(self, record: GrantRecord, dst: int, length: int) -> None:
        for page in self.sink.pages.pages_at(dst, length):
            now, then = self.sink.pages.owner.get(page), record.owners[page]
            if now is None or now is not then or not now.writable:
                whose = "no request" if now is None else f"{now.name}, whose pages may no longer be written"
                self.world.violate(f"law 6: {self.source.process} writes page {page} of {self.sink.process} under "
                                   f"{self.grant.decode()}, when it belongs to {whose}")  # fmt: skip
