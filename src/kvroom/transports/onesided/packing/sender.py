"""The source's side of a packed transfer: gather a batch into a staging slot here, write it into one of the sink's.

While a batch is written, the next one is gathered and the one before it is unpacked. If the sink has no free slot, the
slots of this side are all in use, or the pack server does not answer, the rest of the transfer is written block by
block: slower, with the same result.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit import gather
from kvroom.transports.kit.batches import cut
from kvroom.transports.kit.devices import DeviceBatch
from kvroom.transports.kit.ranges import u64
from kvroom.transports.onesided.engine import EngineTransfer, OneSidedEngine

from . import protocol
from .client import PackClient

S = TypeVar("S")
_OWN_WAIT_S = 1.0


class StagingPool:
    """The staging slots in which this side gathers. All transfers share them. Safe to use from any thread."""

    def __init__(self, address: int, slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._changed = threading.Condition()
        self._count = slots
        self._free = [address + i * slot_bytes for i in range(slots)]

    @property
    def used(self) -> int:
        """Number of slots in use."""
        return self._count - len(self._free)

    def take(self, wait_s: float) -> int | None:
        """Return the address of a free slot; None if none becomes free within `wait_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._free, wait_s)
            return self._free.pop() if self._free else None

    def give(self, address: int) -> None:
        """Return a slot that neither the engine nor a gather uses any longer."""
        with self._changed:
            self._free.append(address)
            self._changed.notify()


class _WrittenBatch(NamedTuple):
    """A batch that the engine writes into slot `there` of the sink. `begun`: for `finish`; None if it has landed."""

    session: Any
    begun: Any
    there: int
    blocks: Blocks


class PackedTransfer(Generic[S]):
    """The packed part of one transfer. Call `run`, then `drain`, then `end`, also after a failure.

    `may_write` returns the engine's session, or raises `TransportError` if no further batch may begin.
    """

    def __init__(
        self,
        transfer: EngineTransfer,
        engine: OneSidedEngine[S],
        client: PackClient,
        staging_pool: StagingPool,
        may_write: Callable[[], S],
    ) -> None:
        self._transfer, self._engine, self._client, self._staging_pool = transfer, engine, client, staging_pool
        self._may_write = may_write
        most = min(staging_pool.slot_bytes, client.area.slot_bytes)
        self._blocks, self._runs = cut(transfer.blocks, protocol.MAX_BLOCKS, most)
        self._ours: list[int] = []  # addresses of this side's slots in use, in the order in which they are written
        self._theirs: list[int] = []  # slots of the sink that are leased and for which no UNPACK was sent yet
        self._written: _WrittenBatch | None = None

    def run(self) -> Blocks:
        """Move batches while there are slots, and wait until the sink has unpacked them; return the remaining blocks.

        Raise `TransportError` if a write failed, the sink refused a batch, or the transfer was stopped.
        """
        left = deque(self._runs)
        # Before a dial, which tells the sink that no write of this side is in flight: this raises if one may be.
        self._may_write()
        if self._client.ready():
            while left and self._batch(*left[0]):
                left.popleft()
        self._flush()
        self._client.settle()
        first = left[0][0] if left else self._blocks.length.size
        return Blocks(*(column[first:] for column in self._blocks))

    def _batch(self, start: int, stop: int) -> bool:
        """Lease a slot, gather one batch and begin to write it; return False if there was no slot for it."""
        session, transfer = self._may_write(), self._transfer
        here = self._staging_pool.take(0)
        if here is None:
            # A transfer that waits keeps no slot: two that wait for each other's slots would both time out.
            self._flush()
            here = self._staging_pool.take(_OWN_WAIT_S)
        if here is None:
            return False
        self._ours.append(here)
        asked = self._client.ask(protocol.LEASE, 0, transfer.grant)
        blocks = Blocks(*(column[start:stop] for column in self._blocks))
        gather.pack(blocks.src, blocks.length, here)  # the reply to LEASE arrives while this runs
        answer = self._client.reply(asked)
        if answer.verdict == protocol.BUSY:
            # Hand over the batch that is being written before waiting: its slot may be the one that frees up.
            self._flush()
            self._client.settle()
            answer = self._client.reply(self._client.ask(protocol.WAIT, 0, transfer.grant))
        if answer.verdict == protocol.BUSY:
            return False
        refusal = self._client.refusal(answer)
        if refusal is not None:
            raise refusal
        there = answer.slot
        self._theirs.append(there)
        self._flush()
        area = self._client.area
        whole = Blocks(u64([here]), u64([area.address + there * area.slot_bytes]), u64([blocks.nbytes]))
        transfer.clean = False
        begun = self._engine.begin(session, DeviceBatch("cpu", "cpu", whole))
        transfer.clean = True
        self._written = _WrittenBatch(session, begun, there, blocks)
        return True

    def _flush(self) -> None:
        """Wait until the batch that is being written has landed; then send UNPACK, and do not wait for the reply."""
        written = self._land()
        if written is not None:
            self._staging_pool.give(self._ours.pop(0))
            self._theirs.remove(written.there)
            runs = gather.merged(written.blocks.dst, written.blocks.length)
            self._client.ask(protocol.UNPACK, written.there, self._transfer.grant, runs)

    def _land(self) -> _WrittenBatch | None:
        written, self._written = self._written, None
        if written is not None and written.begun is not None:
            self._transfer.clean = False
            self._engine.finish(written.session, written.begun, self._transfer)
            self._transfer.clean = True
        return written

    def drain(self) -> None:
        """Wait for the write that is still in flight after a failure. Raise `TransportError` if it fails as well."""
        self._land()

    def end(self, over: bool) -> None:
        """Return every slot, here and at the sink. `over`: none of the transfer's writes is in flight.

        Otherwise the connection is closed, so that the sink quarantines its slots, and this side's slots stay in use
        until the transfer is done: the engine may still read them.
        """
        if not over:
            self._client.close()
            if not self._transfer.abandoned:  # an abandoned write may go on reading them: they stay in use for good
                self._transfer.afterwards = self._give_back
            return
        self._give_back()
        lost = not self._client.connected
        with contextlib.suppress(TransportError):
            for there in self._theirs:
                self._client.ask(protocol.RELEASE, there, self._transfer.grant)
            self._client.settle()
        if lost or not self._client.connected:
            # A new connection tells the sink that no write of this side is in flight: the slots it leased are free
            # again.
            self._client.ready()

    def _give_back(self) -> None:
        while self._ours:
            self._staging_pool.give(self._ours.pop())
