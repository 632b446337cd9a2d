"""What hand-offs took, counted as they end. Fixed buckets and sums: no list grows, and one hand-off costs under 1 us.

It belongs to the loop thread, like the rooms. `Metrics` is what other threads get: one frozen copy of everything that
can be counted without looking at a room, so that taking it costs the same with one room open as with a million.
"""

from __future__ import annotations

from bisect import bisect_left

import msgspec

from kvroom.core.counts import Census, Counters

LATENCY_BOUNDS_S = tuple(1e-4 * 2**step for step in range(18))
"""Upper ends of the buckets, 0.1 ms to 13.1 s. One more bucket takes what is above the last."""


class HandOffs(msgspec.Struct):
    """The hand-offs of one side that succeeded."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))  # per bucket
    total_s: float = 0.0
    nbytes: int = 0

    def note(self, latency_s: float, nbytes: int) -> None:
        """Count one in: `latency_s` as `handles.HandOff` tells it."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
        self.total_s += latency_s
        self.nbytes += nbytes

    def copy(self) -> HandOffs:
        """An independent one with the same numbers."""
        return HandOffs(list(self.counts), self.total_s, self.nbytes)


class LinkView(msgspec.Struct, frozen=True):
    """One peer. `up` False: its link is lost, and what it may still write is not proven to be over."""

    peer: str
    transport: str
    up: bool


class Metrics(msgspec.Struct, frozen=True):
    """A manager's numbers at one moment."""

    census: Census
    counters: Counters
    hand_offs: dict[str, HandOffs]  # by side
    links: tuple[LinkView, ...]
    links_lost: int  # since the start
    connections_refused: int  # since the start
    staging_slots: dict[str, int]  # by state, for transfers in flight; see `Transport.staging_slots`
    fenced: dict[str, int]  # lost peers that were proven to write no more, since the start, by whose word
