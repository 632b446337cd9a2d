"""What can be counted of a room table: what happened since the start, what is kept now. No rule reads any of it."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from .causes import Cause
from .phases import Phase, Side


class Ending(NamedTuple):
    """How a room ended: its side, and the cause of its failure (None: it succeeded)."""

    side: Side
    cause: Cause | None


class Counters(msgspec.Struct):
    """What happened since the start. They only grow, and no rule reads them."""

    opened: int = 0
    succeeded: int = 0
    failed: int = 0
    late_messages: int = 0  # for a room, generation or peer that is not open, or said already
    renewals: int = 0  # `Renew` heard for a source that is open
    overtaken_messages: int = 0  # not newer than one that the same peer sent later
    early_arrivals: int = 0
    early_refused: int = 0  # over the limit, or a second offer for the same number
    early_expired: int = 0
    rooms_refused: int = 0  # RoomInUse, or over the limit
    ended: dict[Ending, int] = {}

    @property
    def failed_by_cause(self) -> dict[Cause, int]:
        """The failed rooms of both sides by cause; causes that never came are left out."""
        causes = {ending.cause for ending in self.ended if ending.cause is not None}
        return {
            cause: sum(count for ending, count in self.ended.items() if ending.cause is cause)
            for cause in sorted(causes, key=lambda cause: cause.value)
        }


class Audit(msgspec.Struct, frozen=True):
    """What is kept now, recounted from the rooms themselves. An idle manager whose rooms are cleared has all zeros."""

    sources: int = 0
    sinks: int = 0
    draining: int = 0  # of these rooms, given up and not yet drained
    quarantined: int = 0  # of these rooms, overdue with their drain
    quarantined_pages: int = 0
    early_arrivals: int = 0
    indexed: int = 0  # entries of the peer index: (peer, room) pairs
    timers: int = 0
    inconsistent: int = 0  # entries of the index, the timers or the census that no room accounts for, or missing ones

    @property
    def empty(self) -> bool:
        """Nothing is left of any room."""
        return self == Audit()


class Census(msgspec.Struct, frozen=True):
    """How many rooms are open now, kept as they change: asking for it costs the same whatever their number."""

    rooms: dict[Side, dict[Phase, int]]  # by side and phase
    quarantined: dict[Ending, int]  # pages of rooms that are overdue with their drain, by side and cause
    early_arrivals: int

    @property
    def quarantined_pages(self) -> int:
        """All pages of rooms that are overdue with their drain."""
        return sum(self.quarantined.values())

    @property
    def kept(self) -> int:
        """All of them together."""
        return sum(n for counts in self.rooms.values() for n in counts.values())
