"""The threads of a one-sided transport: each peer's transfers in order, one at a time, however many peers there are.

A peer that is stuck holds one thread and no other peer. Threads start when they are needed, and stay.
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
from kvroom.transports.onesided import kernel_tcp
from kvroom.transports.onesided.engine import EngineTransfer, OneSidedEngine
from kvroom.transports.onesided.packing.protocol import GRANT_BYTES
from kvroom.transports.onesided.packing.sender import PackedTransfer, StagingPool
from kvroom.transports.onesided.peer import OneSidedPeer

S = TypeVar("S")
logger = logging.getLogger(__name__)
_MOST_THREADS = 32
_SETTLE_S = 20.0  # far below the kernel's 60 s, after which it forgets a connection that the reader never closed
_STEP_S = 0.01
_HOPELESS = 2  # failures in a row after which what waits is not tried: each may take seconds
_SMALL_BLOCKS, _SMALL_BYTES = 16, 1 << 16


class Workers(Generic[S]):
    """Carries out the transfers of every peer of one transport. `lock` is the transport's."""

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
        """Say on which devices our own memory is, and where small blocks are packed; before the first transfer."""
        self._devices = devices
        self._staging_pool = staging_pool

    def see_to(self, peer: OneSidedPeer[S]) -> None:
        """Carry out the running transfer of this peer, and then those that wait; at once if it is small and can be."""
        transfer = peer.running
        if transfer is not None and self._landed_at_once(peer, transfer):
            with self._lock:
                more = peer.next() is not None
            transfer.finish()
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
        """Wait for the threads to end. No transfer waits any more."""
        with self._lock:
            threads, self._threads = self._threads, []
        for _ in threads:
            self._ready.put(None)
        for thread in threads:
            thread.join()

    def _landed_at_once(self, peer: OneSidedPeer[S], transfer: EngineTransfer) -> bool:
        if transfer.blocks.length.size > _SMALL_BLOCKS or transfer.blocks.nbytes > _SMALL_BYTES:
            return False
        session = peer.warm()
        groups = by_device(transfer.blocks, self._devices, peer.devices)
        if session is None or len(groups) > 1 or peer.gone() or peer.unsettled is not None:
            return False

        def begin() -> None:
            transfer.begun = self._engine.begin(session, groups[0])

        transfer.error = self._tried(begin)
        return transfer.begun is None and transfer.error is None

    def _work(self) -> None:
        while (peer := self._ready.get()) is not None:
            transfer, dropped = peer.running, list[EngineTransfer]()
            if transfer is not None:
                self._carry_out(peer, transfer)
            with self._lock:
                if peer.failures >= _HOPELESS:
                    dropped = peer.drop(f"{self._name}: the transfers before this one failed, too")
                more = peer.next() is not None
                self._busy -= not more
            if more:
                self._ready.put(peer)  # behind the other peers that wait
            if transfer is not None and transfer is not peer.unsettled:
                transfer.finish()
            for each in dropped:
                each.finish()
            del (
                peer,
                transfer,
                dropped,
            )  # or they would live, and all that their callbacks know, until the next ones come

    def _carry_out(self, peer: OneSidedPeer[S], transfer: EngineTransfer) -> None:
        """Write what was not begun, wait for all. After an error no byte is on its way, or it is unsettled."""
        under_way: deque[Any] = deque([transfer.begun] if transfer.begun is not None else [])
        transfer.clean = transfer.error is None
        packed = None
        if transfer.begun is None and transfer.clean:
            count, nbytes, engine = transfer.blocks.length.size, transfer.blocks.nbytes, self._engine
            pays = count >= engine.packed_blocks and nbytes < engine.packed_bytes * count
            client, pool = peer.client, self._staging_pool
            wanted = (pays or self._packing == "always") and len(transfer.grant) == GRANT_BYTES
            if wanted and client is not None and pool is not None:
                packed = PackedTransfer(transfer, engine, client, pool, lambda: self._may_write(peer, transfer))
        if transfer.clean and not under_way:
            transfer.error = self._tried(lambda: self._write(peer, transfer, under_way, packed))
        # Well or badly, every write that is under way is waited for.
        waits = [lambda begun=begun: self._engine.finish(peer.session(), begun, transfer) for begun in under_way]
        for wait in [*waits, *([packed.drain] if packed is not None else [])]:
            if (error := self._tried(wait)) is not None:
                transfer.error, transfer.clean = transfer.error or error, False
        peer.failures = 0 if transfer.clean else peer.failures + 1
        if not transfer.clean:  # then until no byte of it can land; else it is left as the peer's `unsettled`
            peer.end_session()
            if not within(_SETTLE_S, lambda: peer.gone() or transfer.abandoned or not kernel_tcp.unsent(peer.ports)):
                peer.unsettled = transfer
        if packed is not None:
            packed.end(over=peer.unsettled is None and not transfer.abandoned)

    def _write(
        self, peer: OneSidedPeer[S], transfer: EngineTransfer, under_way: deque[Any], packed: PackedTransfer[S] | None
    ) -> None:
        blocks = transfer.blocks if packed is None else packed.run()
        for group in by_device(blocks, self._devices, peer.devices):
            whole, runs = cut(group.blocks, self._engine.most_blocks, self._engine.most_bytes)
            for start, stop in runs:
                batch = group._replace(blocks=Blocks(*(part[start:stop] for part in whole)))
                session = self._may_write(peer, transfer)
                transfer.clean = False
                if len(under_way) >= self._engine.depth:
                    self._engine.finish(session, under_way.popleft(), transfer)
                begun = self._engine.begin(session, batch)
                if begun is not None:
                    under_way.append(begun)
                transfer.clean = True

    def _tried(self, call: Callable[[], None]) -> TransportError | None:
        """Return what the call raised, as the error of a transfer."""
        try:
            call()
        except TransportError as error:
            return error
        # A supervisor: what an engine raises for the numbers and texts of a hostile peer is not ours to know, the
        # transfer waits for its end, and this thread has other peers to serve.
        except Exception as error:
            logger.debug("%s: a batch raised", self._name, exc_info=True)
            return TransportError(f"{self._name}: the engine raised {type(error).__name__}: {error}")
        return None

    def _may_write(self, peer: OneSidedPeer[S], transfer: EngineTransfer) -> S:
        if transfer.stopped:
            raise TransportError(transfer.stopped)
        if peer.unsettled is not None:
            raise TransportError(f"{self._name}: an earlier transfer to this peer failed and may still be on its way")
        if peer.gone():
            raise TransportError(f"{self._name}: the peer's process has ended")
        return peer.session()


def within(limit_s: float, condition: Callable[[], bool]) -> bool:
    """Look again and again, for what nobody signals; return whether it came true in time."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_STEP_S)
    return True
