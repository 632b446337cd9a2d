"""How far a source has come with one sink: a frozen value, replaced whenever something changes.

A source serves one sink, or several at once (a prefill rank whose heads two decode ranks share). Each
has its offer, its generation and a delivery of its own; the room is over when every delivery is.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from . import effects as do
from .inputs import SendPages
from .messages import Offer, Peer, RoomUse


class Stage(IntEnum):
    """What a delivery still waits for, in this order."""

    MOVING = 0  # bytes, or the engine's further chunks
    SUMMING = 1  # its own checksum
    CLAIMED = 2  # the sink's word that the checksums agree; `Done` was said
    OVER = 3  # nothing


class Delivery(msgspec.Struct, frozen=True):
    """What one sink has asked for, and what of it was done."""

    peer: Peer
    offer: Offer
    number: int  # among the deliveries of its room
    submitted: int = 0  # so many of the room's chunks were submitted, or had nothing for this sink
    in_flight: frozenset[int] = frozenset()  # chunks under way
    nbytes: int = 0  # landed
    transport: str = ""  # by what they were moved, in words
    stage: Stage = Stage.MOVING
    revoked: bool = False  # a transfer was refused because the sink has given up; its abort is under way

    @property
    def about(self) -> RoomUse:
        """What every message about it states: room and generation."""
        return {"room": self.offer.room, "generation": self.offer.generation}

    def transfer(self, chunk: int) -> int:
        """The number of the transfer of a chunk: no two transfers of a room have the same."""
        return chunk * self.offer.sinks + self.number

    def submit(self, index: int, chunk: SendPages) -> do.Submit | None:
        """Chunk `index`, cut to what this sink offered; None if nothing of it is for this sink."""
        assert chunk.start is not None  # the room has filled it in
        offer, windows = self.offer, chunk.windows if self.offer.windows else ()
        start, stop = max(chunk.start, offer.start), min(chunk.stop, offer.stop)
        if offer.parts == () or (start >= stop and not windows):
            return None
        stop = max(start, stop)
        return do.Submit(
            transfer=self.transfer(index),
            offer=offer,
            peer=self.peer,
            pages=chunk.pages,
            pages_start=chunk.start,
            start=start,
            stop=stop,
            windows=windows,
        )

    def misfit(self, chunk: SendPages) -> str | None:
        """Why this chunk and the offer are not of one request; None if they can be."""
        length = self.offer.length
        if chunk.stop > length or (chunk.last and chunk.stop != length):
            return f"the prefill has {chunk.stop} tokens, the decode side offered pages for {length}"
        return None

    def windows(self, chunks: tuple[SendPages, ...]) -> tuple[str, ...] | None:
        """Of which offered groups the last chunk brought the pages; None if of all. See `Done.windows`."""
        offered = [window.group for window in self.offer.windows]
        given = {window.group for window in chunks[-1].windows}
        return None if given.issuperset(offered) else tuple(group for group in offered if group in given)

    def spans(self, chunks: tuple[SendPages, ...]) -> tuple[tuple[int, int], ...]:
        """Which of the offered tokens these chunks hold; () if all of them. See `Done.spans`."""
        start, stop = self.offer.start, self.offer.stop
        joined: list[tuple[int, int]] = []
        for chunk in chunks:
            assert chunk.start is not None
            low, high = max(chunk.start, start), min(chunk.stop, stop)
            if low >= high:
                continue
            if joined and joined[-1][1] == low:
                low = joined.pop()[0]
            joined.append((low, high))
        return () if joined == [(start, stop)] or start == stop else tuple(joined) or ((start, start),)


def tiles(spans: list[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether these spans fill [start, stop) without a gap and without overlap."""
    reached = start
    for low, high in sorted(span for span in spans if span[0] < span[1]):
        if low != reached:
            return False
        reached = high
    return reached == stop
