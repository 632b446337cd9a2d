"""One transfer, packed: batches are gathered into slots of our own, written into slots of the sink, and unpacked there.

While a batch is written the next one is gathered, and the one before it is unpacked. Where the sink has no slot, our
own area is full, or the pack server does not answer, the rest of the transfer goes block by block: slower, and as good.
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
    """Our own slots, in which sources gather. Several transfers, each to another peer, share them."""

    def __init__(self, address: int, slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._changed = threading.Condition()
        self._count = slots
        self._free = [address + i * slot_bytes for i in range(slots)]

    @property
    def used(self) -> int:
        """How many slots are in use."""
        return self._count - len(self._free)

    def take(self, wait_s: float) -> int | None:
        """Return the address of a free slot; None if there is none within the time."""
        with self._changed:
            self._changed.wait_for(lambda: self._free, wait_s)
            return self._free.pop() if self._free else None

    def give(self, address: int) -> None:
        """Nothing reads this slot any more."""
        with self._changed:
            self._free.append(address)
            self._changed.notify()


class _WrittenBatch(NamedTuple):
    """A batch that is being written into slot `there`; `begun` is what the engine needs to finish it."""

    session: Any
    begun: Any
    there: int
    blocks: Blocks


class PackedTransfer(Generic[S]):
    """The packed part of one transfer: `run`, then `drain`, then `end`, whatever happened.

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
        self._ours: list[int] = []  # slots of our own that are in use, by address
        self._theirs: list[int] = []  # slots of the sink that were leased and not yet sent to be unpacked
        self._written: _WrittenBatch | None = None

    def run(self) -> Blocks:
        """Move batches while there are slots, and hear that all were unpacked; return the blocks that are left.

        Raise `TransportError` where something failed, was refused or shall stop.
        """
        left = deque(self._runs)
        self._may_write()  # first: dialling says that nothing is on its way
        if self._client.ready():
            while left and self._batch(*left[0]):
                left.popleft()
        self._flush()
        self._client.settle()
        first = left[0][0] if left else self._blocks.length.size
        return Blocks(*(column[first:] for column in self._blocks))

    def _batch(self, start: int, stop: int) -> bool:
        """Lease, gather, and begin to write one batch; return whether there were slots for it."""
        session, transfer = self._may_write(), self._transfer
        here = self._staging_pool.take(0)
        if here is None:
            self._flush()  # a transfer that waits holds nothing, or two would wait for each other
            here = self._staging_pool.take(_OWN_WAIT_S)
        if here is None:
            return False
        self._ours.append(here)
        asked = self._client.ask(protocol.LEASE, 0, transfer.grant)
        blocks = Blocks(*(column[start:stop] for column in self._blocks))
        gather.pack(blocks.src, blocks.length, here)  # the answer comes meanwhile
        answer = self._client.reply(asked)
        if answer.verdict == protocol.BUSY:  # the sink has no slot: wait there for one
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
        """Wait until the batch that is being written has landed; have it unpacked, without waiting for that."""
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
        """Wait for the write that is under way after something else failed. Raise `TransportError` if it fails, too."""
        self._land()

    def end(self, over: bool) -> None:
        """Give every slot back. `over`: no write of it is on its way; else the sink must not reuse its slots."""
        if not over:
            self._client.close()
            if not self._transfer.abandoned:  # else the engine may still read them: they stay in use for good
                self._transfer.afterwards = self._give_back
            return
        self._give_back()
        lost = not self._client.connected
        with contextlib.suppress(TransportError):
            for there in self._theirs:
                self._client.ask(protocol.RELEASE, there, self._transfer.grant)
            self._client.settle()
        if lost or not self._client.connected:
            self._client.ready()  # dialling says that nothing of ours is on its way: what was leased is free again

    def _give_back(self) -> None:
        while self._ours:
            self._staging_pool.give(self._ours.pop())
