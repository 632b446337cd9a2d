"""The progress of a source with one sink: a frozen value, replaced on each change.

A source serves one sink or several at the same time (a prefill rank whose heads two decode ranks share). Each sink has
an offer, a generation and a delivery of its own. The room is over when every delivery is.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from . import effects as do
from .inputs import SendPages
from .messages import Offer, Peer, RoomUse


class Stage(IntEnum):
    """The next event that a delivery waits for. Stages only go forward."""

    MOVING = 0  # the end of its transfers, or the engine's further chunks
    SUMMING = 1  # the source's own checksum
    CLAIMED = 2  # `ChecksumsAgree` from the sink; `Done` was sent
    OVER = 3  # nothing


class Delivery(msgspec.Struct, frozen=True):
    """The offer of one sink, and the part of it that is done."""

    peer: Peer
    offer: Offer
    number: int  # position among the deliveries of its room, from 0
    submitted: int = 0  # chunks [0, submitted) are done with: submitted, or nothing in them for this sink
    in_flight: frozenset[int] = frozenset()  # chunks whose transfers have not ended
    nbytes: int = 0  # of the transfers that have landed
    transport: str = ""  # name of the transport that moved them
    stage: Stage = Stage.MOVING
    revoked: bool = False  # the sink gave up and refused a transfer; its abort will follow

    @property
    def about(self) -> RoomUse:
        """Return the fields that every message to this sink has: room and generation."""
        return {"room": self.offer.room, "generation": self.offer.generation}

    def transfer(self, chunk: int) -> int:
        """Return the number of the transfer of a chunk, which is unique in the room."""
        return chunk * self.offer.sinks + self.number

    def submit(self, index: int, chunk: SendPages) -> do.Submit | None:
        """Return the transfer of chunk `index`, cut to the offered window, or None if the sink needs nothing of it."""
        assert chunk.start is not None  # set by Source._send_pages
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
        """Return a sentence if this chunk contradicts the length that was offered, else None."""
        length = self.offer.length
        if chunk.stop > length or (chunk.last and chunk.stop != length):
            return f"the prefill side has {chunk.stop} tokens, the decode side offered pages for {length}"
        return None

    def windows(self, chunks: tuple[SendPages, ...]) -> tuple[str, ...] | None:
        """Return the offered groups whose pages the last chunk has, or None if it has all. See `Done.windows`."""
        offered = [window.group for window in self.offer.windows]
        given = {window.group for window in chunks[-1].windows}
        return None if given.issuperset(offered) else tuple(group for group in offered if group in given)

    def spans(self, chunks: tuple[SendPages, ...]) -> tuple[tuple[int, int], ...]:
        """Return the stretches of offered tokens that these chunks hold, or () if they hold all. See `Done.spans`."""
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
    """Return True if these spans fill [start, stop) without a gap or an overlap. Their order does not matter."""
    reached = start
    for low, high in sorted(span for span in spans if span[0] < span[1]):
        if low != reached:
            return False
        reached = high
    return reached == stop
