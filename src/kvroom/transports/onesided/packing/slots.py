"""The table of the staging slots that a sink leases. Pure: no clock, no threads; the caller holds a lock.

A slot is free, leased, or quarantined. It becomes free again in two ways only: its writer reports that its write is
over (`end`), or none of its writer's bytes are in flight because the writer has stated so or is dead (`quiet`). A lost
connection (`lost`) and a revoked grant (`revoke`) quarantine it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class SlotLease(NamedTuple):
    """The peer that may write into a slot, the connection that leased it, and the grant that the lease names."""

    owner: bytes
    line: object
    grant: bytes
    quarantined: bool = False


class Slots:
    """`count` slots, numbered from 0; all are free at first."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._leases: dict[int, SlotLease] = {}

    @property
    def free(self) -> int:
        """Number of slots that can be leased."""
        return len(self._free)

    @property
    def leased(self) -> int:
        """Number of slots that are leased and not quarantined."""
        return len(self._leases) - self.quarantined

    @property
    def quarantined(self) -> int:
        """Number of slots that stay unused until their writer is proven to have no write in flight."""
        return sum(lease.quarantined for lease in self._leases.values())

    @property
    def owners(self) -> set[bytes]:
        """The writers that have quarantined slots."""
        return {lease.owner for lease in self._leases.values() if lease.quarantined}

    def lease(self, owner: bytes, line: object, grant: bytes) -> int | None:
        """Lease a free slot and return its number; None if there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._leases[slot] = SlotLease(owner, line, grant)
        return slot

    def held(self, line: object) -> int:
        """Count the slots that this connection leases, quarantined ones included."""
        return sum(lease.line is line for lease in self._leases.values())

    def find(self, slot: int, line: object) -> SlotLease | None:
        """Return the lease of this slot if this connection holds it, else None."""
        lease = self._leases.get(slot)
        return lease if lease is not None and lease.line is line else None

    def end(self, slot: int, line: object) -> bool:
        """Free a slot whose write is over; return False, and change nothing, if this connection does not lease it."""
        if self.find(slot, line) is None:
            return False
        self._drop(slot)
        return True

    def revoke(self, grant: bytes) -> None:
        """Quarantine the slots that were leased under this grant: writes into them may still be in flight."""
        self._quarantine(lambda lease: lease.grant == grant)

    def lost(self, line: object) -> None:
        """Quarantine the slots that this connection leased: its writer may still write into them."""
        self._quarantine(lambda lease: lease.line is line)

    def quiet(self, owner: bytes) -> None:
        """Free all slots of a writer that has no write in flight, by its own statement or because it is proven dead."""
        for slot in [slot for slot, lease in self._leases.items() if lease.owner == owner]:
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        del self._leases[slot]
        self._free.append(slot)

    def _quarantine(self, which: Callable[[SlotLease], bool]) -> None:
        for slot, lease in self._leases.items():
            if which(lease):
                self._leases[slot] = lease._replace(quarantined=True)
