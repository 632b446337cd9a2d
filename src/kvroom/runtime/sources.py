"""The search for a receiver's sources: finds the prefill ranks of a room, and notifies them if it cannot be opened.

All methods belong to the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from kvroom.core import inputs as asked
from kvroom.core.messages import Decline, Failure, Peer
from kvroom.core.sink import Sink
from kvroom.errors import KVRoomError

from .driver import Driver
from .loop import Loop
from .resolver import Resolver, Unresolved
from .surroundings import Messenger, Tokens
from .within import within

_TELL_S = 5.0
"""Time limit for linking with prefill ranks only to tell them that a room has failed."""


class Sources:
    """Find and link the sources of this manager's sinks. `generations` supplies 8 random bytes for each."""

    def __init__(
        self, loop: Loop, driver: Driver, links: Messenger, *, resolver: Resolver, generations: Tokens
    ) -> None:
        self._loop, self._driver, self._links = loop, driver, links
        self._resolver, self._generations = resolver, generations

    def new_generation(self) -> int:
        """Return a generation that no other sink has."""
        return int.from_bytes(self._generations.next(), "big")

    def find(self, sink: Sink, bootstrap_addr: str) -> None:
        """Find and link the sources of a sink that was admitted."""
        assert sink.number is not None
        found = self._resolver.known(bootstrap_addr, sink.number)
        if found is not None:
            self._driver.resolved(sink, *found)
        else:
            self._loop.spawn(
                self._find(sink, bootstrap_addr, sink.number), f"finding the sources of room {sink.number}"
            )

    def note_failure(self, bootstrap_addr: str, failure: Failure) -> None:
        """Record that a room with sources from this directory has failed, see `Resolver.note_failure`."""
        self._resolver.note_failure(bootstrap_addr, failure)

    def decline(self, bootstrap_addr: str, room: int, failure: Failure) -> None:
        """Notify the sources of a room that could not be opened here. They are found in the background."""
        message = Decline(room=room, generation=self.new_generation(), failure=failure)
        self._loop.spawn(self._decline(bootstrap_addr, message), f"declining room {room}")

    async def _find(self, sink: Sink, bootstrap_addr: str, room: int) -> None:
        try:
            found = await self._resolver.find(bootstrap_addr, room)
        except Unresolved as error:
            self._driver.feed(sink, asked.GiveUp(cause=error.cause, detail=str(error)))
            await self._tell(error.waiting, lambda peer: self._driver.feed(sink, asked.Resolved(sources=(peer,))))
        else:
            self._driver.resolved(sink, *found)

    async def _decline(self, bootstrap_addr: str, message: Decline) -> None:
        try:
            peers = (await self._resolver.find(bootstrap_addr, message.room)).peers
        except Unresolved as error:
            await self._tell(error.waiting, lambda peer: self._links.send(peer, message))
        else:
            for peer in peers:
                self._links.send(peer, message)

    async def _tell(self, addresses: Sequence[str], tell: Callable[[Peer], object]) -> None:
        """Link with prefill ranks that may wait for a room that has failed here, in order to send them the reason."""

        async def link(address: str) -> None:
            with contextlib.suppress(KVRoomError):  # a rank that cannot be linked ends its room by its own deadline
                tell(await self._links.dial(address))

        with contextlib.suppress(asyncio.TimeoutError):
            await within(asyncio.gather(*map(link, addresses)), _TELL_S)
