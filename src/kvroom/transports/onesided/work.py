"""The threads of a one-sided transport: they carry out each peer's transfers in order, one at a time per peer.

A stuck peer holds up one thread and no other peer. Threads start when they are needed, and last until `stop`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.batches import cut
from kvroom.transports.kit.devices import Devices, by_device

from . import kernel_tcp
from .engine import EngineTransfer, OneSidedEngine
from .packing.protocol import GRANT_BYTES
from .packing.sender import PackedTransfer, StagingPool
from .peer import OneSidedPeer

S = TypeVar("S")
logger = logging.getLogger(__name__)
_MAX_THREADS = 32
_SETTLE_S = 20.0  # far below 60 s, after which the kernel forgets a connection that the reader never closed
_STEP_S = 0.01
_MAX_FAILURES = 2  # failures in a row after which the waiting transfers fail untried: each could take seconds
_SMALL_BLOCKS, _SMALL_BYTES = 16, 1 << 16


class Workers(Generic[S]):
    """The worker threads of one transport. `lock` is the transport's; `packing` is its option of that name."""

    def __init__(self, name: str, engine: OneSidedEngine[S], lock: threading.Lock, packing: str = "auto") -> None:
        self._name = name
        self._engine = engine
        self._lock = lock
        self._packing = packing
        self._staging_pool: StagingPool | None = None
        self._devices = Devices(())
        self._ready: queue.SimpleQueue[OneSidedPeer[S] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._busy = 0

    def use(self, devices: Devices, staging_pool: StagingPool | None = None) -> None:
        """Set the devices of this side's memory and the slots for packing. Call it before the first transfer."""
        self._devices = devices
        self._staging_pool = staging_pool

    def start(self, peer: OneSidedPeer[S]) -> None:
        """Carry out the peer's running transfer and those that wait behind it, in a worker thread.

        A small transfer that the engine can begin without waiting is begun here, in the calling thread.
        """
        transfer = peer.running
        if transfer is not None and self._lands_immediately(peer, transfer):
            with self._lock:
                more = peer.next() is not None
            transfer.finish()
            if not more:
                return
        with self._lock:
            self._busy += 1
            if len(self._threads) < min(self._busy, _MAX_THREADS):
                thread = threading.Thread(target=self._work, name=f"kvroom-{self._name}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._ready.put(peer)

    def stop(self) -> None:
        """End the threads and wait for them. Call it once no transfer waits any longer."""
        with self._lock:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._ready.put(None)
        for thread in threads:
            thread.join()

    def _lands_immediately(self, peer: OneSidedPeer[S], transfer: EngineTransfer) -> bool:
        """Begin a small transfer in this thread; return True if all of it has landed already."""
        if transfer.blocks.length.size > _SMALL_BLOCKS or transfer.blocks.nbytes > _SMALL_BYTES:
            return False
        session = peer.warm()
        groups = by_device(transfer.blocks, self._devices, peer.devices)
        if session is None or len(groups) > 1 or peer.gone() or peer.unsettled is not None:
            return False

        def begin() -> None:
            transfer.begun = self._engine.begin(session, groups[0])

        transfer.error = self._error_of(begin)
        return transfer.begun is None and transfer.error is None

    def _work(self) -> None:
        while (peer := self._ready.get()) is not None:
            transfer, dropped = peer.running, list[EngineTransfer]()
            if transfer is not None:
                self._carry_out(peer, transfer)
            with self._lock:
                if peer.failures >= _MAX_FAILURES:
                    dropped = peer.drop(f"{self._name}: the transfers before this one failed, too")
                more = peer.next() is not None
                self._busy -= not more
            if more:
                self._ready.put(peer)  # behind the other peers that wait, so that each gets its turn
            if transfer is not None and transfer is not peer.unsettled:
                transfer.finish()
            for each in dropped:
                each.finish()
            # Otherwise this frame would keep them, and all that their callbacks refer to, until the next peer arrives.
            del peer, transfer, dropped

    def _carry_out(self, peer: OneSidedPeer[S], transfer: EngineTransfer) -> None:
        """Begin the batches that were not begun, and wait for all.

        After an error no byte of the transfer is in flight, or the transfer is left as the peer's `unsettled`.
        """
        in_flight: deque[Any] = deque([transfer.begun] if transfer.begun is not None else [])
        transfer.clean = transfer.error is None
        packed = None
        if transfer.begun is None and transfer.clean:
            count, nbytes, engine = transfer.blocks.length.size, transfer.blocks.nbytes, self._engine
            pays = count >= engine.packed_blocks and nbytes < engine.packed_bytes * count
            client, pool = peer.client, self._staging_pool
            wanted = (pays or self._packing == "always") and len(transfer.grant) == GRANT_BYTES
            if wanted and client is not None and pool is not None:
                packed = PackedTransfer(transfer, engine, client, pool, lambda: self._may_write(peer, transfer))
        if transfer.clean and not in_flight:
            transfer.error = self._error_of(lambda: self._write(peer, transfer, in_flight, packed))
        # Also after an error: every batch in flight is waited for, so that no byte lands after the future is done.
        waits = [lambda begun=begun: self._engine.finish(peer.session(), begun, transfer) for begun in in_flight]
        for wait in [*waits, *([packed.drain] if packed is not None else [])]:
            if (error := self._error_of(wait)) is not None:
                transfer.error, transfer.clean = transfer.error or error, False
        peer.failures = 0 if transfer.clean else peer.failures + 1
        if not transfer.clean:
            # An engine that reports a failure may still have bytes in the kernel's buffers. Wait until none is left.
            peer.end_session()
            if not within(_SETTLE_S, lambda: peer.gone() or transfer.abandoned or not kernel_tcp.unsent(peer.ports)):
                peer.unsettled = transfer
        if packed is not None:
            packed.end(over=peer.unsettled is None and not transfer.abandoned)

    def _write(
        self, peer: OneSidedPeer[S], transfer: EngineTransfer, in_flight: deque[Any], packed: PackedTransfer[S] | None
    ) -> None:
        blocks = transfer.blocks if packed is None else packed.run()
        for group in by_device(blocks, self._devices, peer.devices):
            whole, runs = cut(group.blocks, self._engine.most_blocks, self._engine.most_bytes)
            for start, stop in runs:
                batch = group._replace(blocks=Blocks(*(part[start:stop] for part in whole)))
                session = self._may_write(peer, transfer)
                transfer.clean = False
                if len(in_flight) >= self._engine.depth:
                    self._engine.finish(session, in_flight.popleft(), transfer)
                begun = self._engine.begin(session, batch)
                if begun is not None:
                    in_flight.append(begun)
                transfer.clean = True

    def _error_of(self, call: Callable[[], None]) -> TransportError | None:
        """Make the call; return the error that it raised as a `TransportError`, or None."""
        try:
            call()
        except TransportError as error:
            return error
        # A supervisor. A hostile peer chooses numbers and texts for which an engine may raise anything; the transfer
        # has to end nevertheless, and this thread has other peers to serve.
        except Exception as error:
            logger.debug("%s: a batch raised", self._name, exc_info=True)
            return TransportError(f"{self._name}: the engine raised {type(error).__name__}: {error}")
        return None

    def _may_write(self, peer: OneSidedPeer[S], transfer: EngineTransfer) -> S:
        """Return the session for the next batch; raise `TransportError` if none may begin."""
        if transfer.stopped:
            raise TransportError(transfer.stopped)
        if peer.unsettled is not None:
            raise TransportError(f"{self._name}: an earlier transfer to this peer failed and may still be in flight")
        if peer.gone():
            raise TransportError(f"{self._name}: the peer's process has ended")
        return peer.session()


def within(limit_s: float, condition: Callable[[], bool]) -> bool:
    """Poll a condition that no event signals; return False if it did not come true within `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_STEP_S)
    return True
