"""One transfer, packed: batches are gathered into slots of our own, written into slots of the sink, and unpacked there.

While a batch is written the next one is gathered, and the one before it is unpacked. Where the sink has no slot, our
own area is full, or the door does not answer, the rest of the transfer goes block by block: slower, and as good.
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
from kvroom.transports.kit.devices import Group
from kvroom.transports.kit.ranges import u64
from kvroom.transports.onesided.engine import Engine, EngineTransfer
from kvroom.transports.onesided.packing import protocol
from kvroom.transports.onesided.packing.caller import Caller

S = TypeVar("S")
_OWN_WAIT_S = 1.0


class Desk:
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


class _Written(NamedTuple):
    """A batch that is being written into slot `there`; `begun` is what the engine needs to finish it."""

    session: Any
    begun: Any
    there: int
    blocks: Blocks


class PackedTransfer(Generic[S]):
    """The packed part of one job: `run`, then `drain`, then `end`, whatever happened.

    `may_write` returns the engine's session, or raises `TransportError` if no further batch may begin.
    """

    def __init__(
        self, job: EngineTransfer, engine: Engine[S], caller: Caller, desk: Desk, may_write: Callable[[], S]
    ) -> None:
        self._job, self._engine, self._caller, self._desk = job, engine, caller, desk
        self._may_write = may_write
        most = min(desk.slot_bytes, caller.area.slot_bytes)
        self._blocks, self._runs = cut(job.blocks, protocol.MOST_BLOCKS, most)
        self._ours: list[int] = []  # slots of our own that are in use, by address
        self._theirs: list[int] = []  # slots of the sink that were leased and not yet sent to be unpacked
        self._written: _Written | None = None

    def run(self) -> Blocks:
        """Move batches while there are slots, and hear that all were unpacked; return the blocks that are left.

        Raise `TransportError` where something failed, was refused or shall stop.
        """
        left = deque(self._runs)
        self._may_write()  # first: dialling says that nothing is on its way
        if self._caller.ready():
            while left and self._batch(*left[0]):
                left.popleft()
        self._flush()
        self._caller.settle()
        first = left[0][0] if left else self._blocks.length.size
        return Blocks(*(column[first:] for column in self._blocks))

    def _batch(self, start: int, stop: int) -> bool:
        """Lease, gather, and begin to write one batch; return whether there were slots for it."""
        session = self._may_write()
        here = self._slot_of_ours()
        if here is None:
            return False
        asked = self._caller.ask(protocol.LEASE, 0, self._job.grant)
        blocks = Blocks(*(column[start:stop] for column in self._blocks))
        gather.pack(blocks.src, blocks.length, here)  # the answer comes meanwhile
        there = self._leased(asked)
        if there is None:
            return False
        self._flush()
        area, job = self._caller.area, self._job
        whole = Blocks(u64([here]), u64([area.address + there * area.slot_bytes]), u64([blocks.nbytes]))
        job.clean = False
        begun = self._engine.begin(session, Group("cpu", "cpu", whole))
        job.clean = True
        self._written = _Written(session, begun, there, blocks)
        return True

    def _slot_of_ours(self) -> int | None:
        here = self._desk.take(0)
        if here is None:
            self._flush()  # who waits holds nothing, or two would wait for each other
            here = self._desk.take(_OWN_WAIT_S)
        if here is not None:
            self._ours.append(here)
        return here

    def _leased(self, asked: int) -> int | None:
        """Return the slot that the sink leased to us; None if it has none, also after a while."""
        answer = self._caller.reply(asked)
        if answer.verdict == protocol.BUSY:
            self._flush()
            self._caller.settle()
            answer = self._caller.reply(self._caller.ask(protocol.WAIT, 0, self._job.grant))
        if answer.verdict == protocol.BUSY:
            return None
        refusal = self._caller.refusal(answer)
        if refusal is not None:
            raise refusal
        self._theirs.append(answer.slot)
        return answer.slot

    def _flush(self) -> None:
        """Wait until the batch that is being written has landed; have it unpacked, without waiting for that."""
        written = self._land()
        if written is not None:
            self._desk.give(self._ours.pop(0))
            self._theirs.remove(written.there)
            runs = gather.merged(written.blocks.dst, written.blocks.length)
            self._caller.ask(protocol.UNPACK, written.there, self._job.grant, *runs)

    def _land(self) -> _Written | None:
        written, self._written = self._written, None
        if written is not None and written.begun is not None:
            self._job.clean = False
            self._engine.finish(written.session, written.begun, self._job)
            self._job.clean = True
        return written

    def drain(self) -> None:
        """Wait for the write that is under way after something else failed. Raise `TransportError` if it fails, too."""
        self._land()

    def end(self, over: bool) -> None:
        """Give every slot back. `over`: no write of this job is on its way; else the sink must not reuse its slots."""
        if not over:
            self._caller.close()
            if not self._job.abandoned:  # else the engine may still read them: they stay in use for good
                self._job.afterwards = self._give_back
            return
        self._give_back()
        lost = not self._caller.connected
        with contextlib.suppress(TransportError):
            for there in self._theirs:
                self._caller.ask(protocol.RELEASE, there, self._job.grant)
            self._caller.settle()
        if lost or not self._caller.connected:
            self._caller.ready()  # dialling says that nothing of ours is on its way: what was leased is free again

    def _give_back(self) -> None:
        while self._ours:
            self._desk.give(self._ours.pop())
