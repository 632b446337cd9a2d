"""The threads of a one-sided transport: each peer's jobs in order, one at a time, however many peers there are.

A peer that is stuck holds one thread and no other peer. Threads start when they are needed, and stay.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.batches import cut
from kvroom.transports.kit.devices import Devices, Group, by_device
from kvroom.transports.onesided import kernel_tcp
from kvroom.transports.onesided.engine import Engine, EngineTransfer
from kvroom.transports.onesided.packing.protocol import GRANT_BYTES
from kvroom.transports.onesided.packing.sender import Desk, PackedTransfer
from kvroom.transports.onesided.peer import Peer

S = TypeVar("S")
logger = logging.getLogger(__name__)
_MOST_THREADS = 32
_SETTLE_S = 20.0  # far below the kernel's 60 s, after which it forgets a connection that the reader never closed
_STEP_S = 0.01
_HOPELESS = 2  # failures in a row after which what waits is not tried: each may take seconds
_SMALL_BLOCKS, _SMALL_BYTES = 16, 1 << 16


class Workers(Generic[S]):
    """Carries out the jobs of every peer of one transport. `lock` is the transport's."""

    def __init__(self, name: str, engine: Engine[S], lock: threading.Lock, packing: str = "auto") -> None:
        self._name = name
        self._engine = engine
        self._lock = lock
        self._packing = packing
        self._desk: Desk | None = None
        self._devices = Devices(())
        self._ready: queue.SimpleQueue[Peer[S] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._busy = 0

    def use(self, devices: Devices, desk: Desk | None = None) -> None:
        """Say on which devices our own memory is, and where small blocks are packed; before the first job."""
        self._devices = devices
        self._desk = desk

    def see_to(self, peer: Peer[S]) -> None:
        """Carry out the running job of this peer, and then those that wait; at once if it is small and can be."""
        job = peer.running
        if job is not None and self._landed_at_once(peer, job):
            with self._lock:
                more = peer.next() is not None
            job.finish()
            if not more:
                return
        with self._lock:
            self._busy += 1
            if len(self._threads) < min(self._busy, _MOST_THREADS):
                thread = threading.Thread(target=self._work, name=f"kvroom-{self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._ready.put(peer)

    def stop(self) -> None:
        """Wait for the threads to end. No job waits any more."""
        with self._lock:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._ready.put(None)
        for thread in threads:
            thread.join()

    def _landed_at_once(self, peer: Peer[S], job: EngineTransfer) -> bool:
        if job.blocks.length.size > _SMALL_BLOCKS or job.blocks.nbytes > _SMALL_BYTES:
            return False
        session = peer.warm()
        groups = by_device(job.blocks, self._devices, peer.devices)
        if session is None or len(groups) > 1 or peer.gone() or peer.unsettled is not None:
            return False

        def begin() -> None:
            job.begun = self._engine.begin(session, groups[0])

        job.error = self._tried(begin)
        return job.begun is None and job.error is None

    def _work(self) -> None:
        while (peer := self._ready.get()) is not None:
            job, dropped = peer.running, list[EngineTransfer]()
            if job is not None:
                self._carry_out(peer, job)
            with self._lock:
                if peer.failures >= _HOPELESS:
                    dropped = peer.drop(f"{self._name}: the transfers before this one failed, too")
                more = peer.next() is not None
                self._busy -= not more
            if more:
                self._ready.put(peer)  # behind the other peers that wait
            if job is not None and job is not peer.unsettled:
                job.finish()
            for each in dropped:
                each.finish()
            del peer, job, dropped  # or they would live, and all that their callbacks know, until the next ones come

    def _carry_out(self, peer: Peer[S], job: EngineTransfer) -> None:
        """Write what was not begun yet, wait for all. After an error no byte is on its way, or the job is unsettled."""
        under_way: deque[Any] = deque([job.begun] if job.begun is not None else [])
        job.clean = job.error is None
        packed = None if job.begun is not None or not job.clean else self._packed(peer, job)
        if job.clean and not under_way:
            job.error = self._tried(lambda: self._write(peer, job, under_way, packed))
        self._drain(peer, job, under_way, packed)
        peer.failures = 0 if job.clean else peer.failures + 1
        if not job.clean:
            self._settle(peer, job)
        if packed is not None:
            packed.end(over=peer.unsettled is None and not job.abandoned)

    def _write(
        self, peer: Peer[S], job: EngineTransfer, under_way: deque[Any], packed: PackedTransfer[S] | None
    ) -> None:
        for batch in self._batches(peer, job.blocks if packed is None else packed.run()):
            session = self._may_write(peer, job)
            job.clean = False
            self._begin(session, batch, job, under_way)
            job.clean = True

    def _tried(self, call: Callable[[], None]) -> TransportError | None:
        """Return what the call raised, as the error of a job."""
        try:
            call()
        except TransportError as error:
            return error
        # A supervisor: what an engine raises for the numbers and texts of a hostile peer is not ours to know, the job
        # waits for its end, and this thread has other peers to serve.
        except Exception as error:
            logger.debug("%s: a batch raised", self._name, exc_info=True)
            return TransportError(f"{self._name}: the engine raised {type(error).__name__}: {error}")
        return None

    def _drain(
        self, peer: Peer[S], job: EngineTransfer, under_way: deque[Any], packed: PackedTransfer[S] | None
    ) -> None:
        """Wait for every write that is under way, well or badly."""
        waits = [lambda begun=begun: self._engine.finish(peer.session(), begun, job) for begun in under_way]
        for wait in [*waits, *([packed.drain] if packed is not None else [])]:
            if (error := self._tried(wait)) is not None:
                job.error, job.clean = job.error or error, False

    def _packed(self, peer: Peer[S], job: EngineTransfer) -> PackedTransfer[S] | None:
        """Return what moves the job in packed batches, if that can be and pays."""
        count, nbytes, engine = job.blocks.length.size, job.blocks.nbytes, self._engine
        small = self._packing == "always" or (count >= engine.packed_blocks and nbytes < engine.packed_bytes * count)
        if not small or self._desk is None or peer.caller is None or len(job.grant) != GRANT_BYTES:
            return None
        return PackedTransfer(job, engine, peer.caller, self._desk, lambda: self._may_write(peer, job))

    def _begin(self, session: S, batch: Group, job: EngineTransfer, under_way: deque[Any]) -> None:
        if len(under_way) >= self._engine.depth:
            self._engine.finish(session, under_way.popleft(), job)
        begun = self._engine.begin(session, batch)
        if begun is not None:
            under_way.append(begun)

    def _batches(self, peer: Peer[S], blocks: Blocks) -> Iterator[Group]:
        for group in by_device(blocks, self._devices, peer.devices):
            whole, runs = cut(group.blocks, self._engine.most_blocks, self._engine.most_bytes)
            for start, stop in runs:
                yield group._replace(blocks=Blocks(*(part[start:stop] for part in whole)))

    def _may_write(self, peer: Peer[S], job: EngineTransfer) -> S:
        if job.stopped:
            raise TransportError(job.stopped)
        if peer.unsettled is not None:
            raise TransportError(f"{self._name}: an earlier transfer to this peer failed and may still be on its way")
        if peer.gone():
            raise TransportError(f"{self._name}: the peer's process has ended")
        return peer.session()

    def _settle(self, peer: Peer[S], job: EngineTransfer) -> None:
        """Wait until no byte of a failed write can land any more; else the job is left as the peer's `unsettled`."""
        peer.end_session()
        if not within(_SETTLE_S, lambda: peer.gone() or job.abandoned or not kernel_tcp.unsent(peer.ports)):
            peer.unsettled = job


def within(limit_s: float, condition: Callable[[], bool]) -> bool:
    """Look again and again, for what nobody signals; return whether it came true in time."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_STEP_S)
    return True
