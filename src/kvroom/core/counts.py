"""Counts of a room table: events since its start, and the state kept now. They never influence a room."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from .causes import Cause
from .phases import Phase, Side


class Ending(NamedTuple):
    """The end of a room, as a key of counters."""

    side: Side
    """The side of the room that ended: each side counts its own rooms."""
    cause: Cause | None
    """The cause of its failure, None for a success."""


class Counters(msgspec.Struct):
    """Numbers of events since the start. They only grow, and never influence a room."""

    opened: int = 0
    """Rooms that got a number."""
    succeeded: int = 0
    """Rooms that entered LANDED or SENT."""
    failed: int = 0
    """Rooms that gave up: DRAINING, or RELEASED without a drain."""
    late_messages: int = 0
    """Messages for a room, generation or link that is not open, and messages without effect."""
    renewals: int = 0
    """`Renew` messages that reached an open source."""
    overtaken_messages: int = 0
    """Messages whose number was not above the last one of the same peer: repeated or late."""
    early_arrivals: int = 0
    """Offers and declines that were kept for a room not open yet."""
    early_refused: int = 0
    """Early offers over a limit, or of a second decode worker for the same number."""
    early_expired: int = 0
    """Early arrivals whose room was not opened in time."""
    rooms_refused: int = 0
    """Rooms that were not opened: the number was in use, or the table full."""
    ended: dict[Ending, int] = {}
    """Rooms that succeeded or gave up, by side and cause."""

    @property
    def failed_by_cause(self) -> dict[Cause, int]:
        """Return the number of failed rooms by cause, both sides together; causes without a room are left out."""
        causes = {ending.cause for ending in self.ended if ending.cause is not None}
        return {
            cause: sum(count for ending, count in self.ended.items() if ending.cause is cause)
            for cause in sorted(causes, key=lambda cause: cause.value)
        }


class Audit(msgspec.Struct, frozen=True):
    """The state kept now, recounted from the rooms themselves. All zero when every room is cleared and drained."""

    sources: int = 0
    """Rooms of the prefill side in the table."""
    sinks: int = 0
    """Rooms of the decode side in the table."""
    draining: int = 0
    """Of these rooms: given up and not yet drained."""
    quarantined: int = 0
    """Of these rooms: the drain is overdue."""
    quarantined_pages: int = 0
    """Pages of the quarantined rooms."""
    early_arrivals: int = 0
    """Offers and declines that wait for their room."""
    indexed: int = 0
    """Entries of the peer index: (peer, room) pairs."""
    timers: int = 0
    """Deadlines and renewals of rooms."""
    inconsistent: int = 0
    """Surplus and missing entries of the index, the timers and the census; always 0."""

    @property
    def empty(self) -> bool:
        """Return True if no trace of any room is left."""
        return self == Audit()


class Census(msgspec.Struct, frozen=True):
    """The number of rooms now, counted on each change, so that reading it takes constant time."""

    rooms: dict[Side, dict[Phase, int]]
    """By side and phase."""
    quarantined: dict[Ending, int]
    """Pages of rooms in QUARANTINED, by side and cause."""
    early_arrivals: int

    @property
    def quarantined_pages(self) -> int:
        """Return the number of pages of all rooms in QUARANTINED."""
        return sum(self.quarantined.values())

    @property
    def kept(self) -> int:
        """Return the number of all rooms."""
        return sum(n for counts in self.rooms.values() for n in counts.values())
