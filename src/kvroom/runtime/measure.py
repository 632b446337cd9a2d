"""Durations and bytes of hand-offs, counted as they end, and `Metrics`, the copy that other threads get.

The counts have fixed buckets and sums, so no list grows, and counting a hand-off takes less than 1 us. They belong to
the loop thread, like the rooms. `Metrics` holds only what can be counted without visiting a room, so that taking it
costs the same with one room open as with a million.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import msgspec

from kvroom.core.counts import Census, Counters

LATENCY_BOUNDS_S = tuple(1e-4 * 2**step for step in range(18))
"""Upper bounds of the buckets in seconds, 0.1 ms to 13.1 s. One more bucket counts what is above the last."""


class HandOff(NamedTuple):
    """The result of a hand-off that succeeded."""

    tokens: int
    """Tokens of the request's prompt, including those that the decode side had already."""
    nbytes: int
    """Bytes moved to or from this rank."""
    aux: bytes
    """The metadata of the last chunk, as the prefill engine sent it."""
    transport: str
    """The transport that moved the bytes and why the source chose it; empty if there were no bytes to move."""
    latency_s: float
    """Seconds from both sides being ready to the last byte, on the source's clock."""
    compared: tuple[str, ...]
    """Names of the identity fields that both sides stated, and that are equal."""


class HandOffs(msgspec.Struct):
    """Counts of the successful hand-offs of one side."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    """Hand-offs in each bucket of `LATENCY_BOUNDS_S`."""
    total_s: float = 0.0
    """Sum of their latencies in seconds."""
    nbytes: int = 0
    """Sum of their bytes."""

    def note(self, latency_s: float, nbytes: int) -> None:
        """Count a hand-off: `latency_s` and `nbytes` as in `HandOff`."""
        self.counts[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
        self.total_s += latency_s
        self.nbytes += nbytes

    def copy(self) -> HandOffs:
        """Return an independent copy."""
        return HandOffs(list(self.counts), self.total_s, self.nbytes)


class LinkView(msgspec.Struct, frozen=True):
    """One peer that is linked, or that was lost and may still write."""

    peer: str
    """Its address."""
    transport: str
    """The name of the transport that reaches it; empty if it is not connected."""
    up: bool
    """True while it is linked. False: its link is lost, and a room waits for proof that it writes no longer."""


class Metrics(msgspec.Struct, frozen=True):
    """All counts and gauges of a manager at one moment."""

    census: Census
    """Rooms and pages kept now."""
    counters: Counters
    """Events of rooms since the start."""
    hand_offs: dict[str, HandOffs]
    """Successful hand-offs since the start, by side: `prefill` or `decode`."""
    links: tuple[LinkView, ...]
    """Linked peers, and lost ones that a room still waits for."""
    links_lost: int
    """Links that were up and ended, since the start."""
    connections_refused: int
    """Connections that ended before they became links, since the start."""
    staging_slots: dict[str, int]
    """Staging slots in use by transfers in flight, by state; see `Transport.staging_slots`."""
    fenced: dict[str, int]
    """Lost peers that were proven to write no longer, since the start, by the source of the proof."""
