"""The slots of a staging area and whose they are. Pure: no clock, no threads, no memory; one lock around all calls.

A slot is free, leased, or quarantined. Only three things make it free again: its writer says that its write is over
(`end`), or is known to be quiet or dead (`quiet`). A connection that ends and a grant that is revoked quarantine it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class SlotLease(NamedTuple):
    """Who may write into a slot, over which connection it was asked for, and under which grant."""

    owner: bytes
    line: object
    grant: bytes
    quarantined: bool = False


class Slots:
    """`count` slots, all free."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))[::-1]
        self._leases: dict[int, SlotLease] = {}

    @property
    def free(self) -> int:
        """How many slots can be leased."""
        return len(self._free)

    @property
    def leased(self) -> int:
        """How many are leased and not quarantined."""
        return len(self._leases) - self.quarantined

    @property
    def quarantined(self) -> int:
        """How many nobody may have until their writer is known to write no more."""
        return sum(lease.quarantined for lease in self._leases.values())

    @property
    def owners(self) -> set[bytes]:
        """Whose slots are quarantined."""
        return {lease.owner for lease in self._leases.values() if lease.quarantined}

    def lease(self, owner: bytes, line: object, grant: bytes) -> int | None:
        """Lease a free slot; None if there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._leases[slot] = SlotLease(owner, line, grant)
        return slot

    def held(self, line: object) -> int:
        """How many slots this connection has, quarantined ones included."""
        return sum(lease.line is line for lease in self._leases.values())

    def find(self, slot: int, line: object) -> SlotLease | None:
        """Return the lease of this slot if it is this connection's."""
        lease = self._leases.get(slot)
        return lease if lease is not None and lease.line is line else None

    def end(self, slot: int, line: object) -> bool:
        """The writer says on its connection that its write is over; return whether the slot was its own."""
        if self.find(slot, line) is None:
            return False
        self._drop(slot)
        return True

    def revoke(self, grant: bytes) -> None:
        """Nothing is unpacked under this grant any more; what is written under it may still be on its way."""
        self._quarantine(lambda lease: lease.grant == grant)

    def lost(self, line: object) -> None:
        """A connection has ended; its writer may still write."""
        self._quarantine(lambda lease: lease.line is line)

    def quiet(self, owner: bytes) -> None:
        """Nothing of this writer is on its way: it says so itself, or is dead and its last bytes were taken in."""
        for slot in [slot for slot, lease in self._leases.items() if lease.owner == owner]:
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        del self._leases[slot]
        self._free.append(slot)

    def _quarantine(self, which: Callable[[SlotLease], bool]) -> None:
        for slot, lease in self._leases.items():
            if which(lease):
                self._leases[slot] = lease._replace(quarantined=True)
