"""Transports that write through somebody else's engine: NIXL, Mooncake, Ascend, Mori. What they have in common is here.

The engine moves bytes; this part keeps peers, checks ranges, cuts batches, and is careful about the one thing that
engines are not: when a write that failed has really ended (`work`).

The sink takes no part in a write, so `revoke` proves nothing. `fence` is proof once the writer's process has ended,
which can be told on one machine, and the kernel holds no connection on which its last bytes may still come.
"""

from __future__ import annotations

import concurrent.futures
import os
import secrets
import threading
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

import msgspec

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports import machine
from kvroom.transports.base import Transfer, Transport
from kvroom.transports.handles import Handles
from kvroom.transports.onesided import kernel_tcp
from kvroom.transports.onesided.engine import Description, Engine, Job
from kvroom.transports.onesided.peer import Peer
from kvroom.transports.onesided.work import Workers, within
from kvroom.transports.transfers import Devices, Ranges, failed, finished, joined, normal, read_description

S = TypeVar("S")
_WAIT_S = 1.0


class OneSidedTransport(Transport, Generic[S]):
    """A transport around an engine; a subclass gives it a name, a tagged `description` and the engine."""

    description: ClassVar[type[Description]]

    def __init__(self, engine: Engine[S]) -> None:
        self.endpoint = secrets.token_bytes(16)
        self._engine = engine
        self._memory = Ranges.of(())
        self._described: Description | None = None
        self._handles: Handles[Peer[S]] = Handles(self.name)
        self._lock = threading.Lock()
        self._workers = Workers(self.name, engine, self._lock)
        self._open = True

    def register(self, memory: Sequence[MemoryRange]) -> None:
        listed, before = joined(memory), kernel_tcp.listening()
        card = self._engine.start(listed)
        ports = tuple(sorted(kernel_tcp.listening() - before))
        ranges = tuple((piece.address, piece.nbytes, piece.device) for piece in listed)
        network, process = os.stat("/proc/self/ns/net").st_ino, machine.Process.current()
        self._memory = Ranges.of(listed)
        self._workers.use(Devices(listed))
        self._described = self.description(self.endpoint, process, network, ranges, ports, card)

    def describe(self) -> bytes:
        if self._described is None:
            raise TransportError(f"{self.name}: register memory before you describe this side")
        return msgspec.msgpack.encode(self._described)

    def connect(self, description: bytes) -> int:
        handle = self.watch(description)
        self._handles.get(handle).session()
        return handle

    def watch(self, description: bytes) -> int:
        described = read_description(description, self.description)
        return self._handles.attach(described.endpoint) or self._meet(described)

    def _meet(self, described: Description) -> int:
        peer = Peer(described, self._engine)
        with self._lock:
            handle = self._handles.add(described.endpoint, peer) if self._open else 0
        if not handle or self._handles.find(handle) is not peer:  # another thread met the same peer meanwhile
            peer.close()
        if not handle:
            raise TransportError(f"{self.name}: this transport is closed")
        return handle

    def why(self, peer: int) -> str:
        where = "on this machine" if self._handles.get(peer).here else "on another machine"
        return f"{self.name}: {self._engine.way()}; the peer is {where}"

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:  # noqa: ARG002 - see the module's law
        try:
            blocks, target = normal(blocks), self._handles.get(peer)
            self._memory.check("source", blocks.src, blocks.length, "this side registered")
            target.memory.check("destination", blocks.dst, blocks.length, "the peer registered")
            if not blocks.length.size:
                return finished(0)
            job = Job(blocks)
            with self._lock:
                if not self._open:
                    raise TransportError(f"{self.name}: this transport is closed")
                self._handles.get(peer)  # asked for again: `fence` detaches under this lock
                first = target.add(job)
        except TransportError as error:
            return failed(error)
        if first:
            self._workers.see_to(target)
        return job.future

    def fence(self, peer: int) -> bool:
        target = self._handles.find(peer)
        if target is None:
            return True
        with self._lock:
            self._handles.detach(peer)
            running, dropped = target.running, target.drop(f"{self.name}: the peer was fenced")
        for job in dropped:
            job.finish()
        if running is not None and concurrent.futures.wait([running.future], _WAIT_S).not_done:
            return False
        # Not for a living peer that we can watch: joining it again takes long, and engines keep something each time.
        if target.gone() or not target.here:
            target.end_session()
        if not self._proven(target):
            return False
        with self._lock:  # two threads may fence the same peer: one of them drops it
            forgotten = self._handles.forget(peer)
        if forgotten is not None:
            forgotten.close()
        return True

    def _proven(self, peer: Peer[S]) -> bool:
        """Whether the peer is dead, and the last that it sent has been taken in."""
        ours = self._described
        if not peer.gone() or ours is None or ours.network != peer.network:
            return False
        ports = peer.ports | frozenset(ours.ports)
        return within(_WAIT_S, lambda: not kernel_tcp.unread(ports))

    def close(self) -> None:
        with self._lock:
            first, self._open = self._open, False
            peers = [peer for peer in map(self._handles.forget, self._handles.all()) if peer is not None]
            dropped = [job for peer in peers for job in peer.drop(f"{self.name}: this transport was closed")]
            running = [peer.running for peer in peers if peer.running is not None]
        for job in dropped:
            job.finish()
        concurrent.futures.wait([job.future for job in running], _WAIT_S)
        for job in running:
            job.abandoned = True
        self._workers.stop()
        for peer in peers:
            peer.close()
        if first:
            self._engine.stop()
