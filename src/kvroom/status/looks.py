"""Looks that many HTTP requests wait for: one thread at a time, however many requests there are.

A request that waits until something is so would otherwise block a thread of the small pool that all requests share. A
few dozen of them would keep `/metrics` and `/rooms` from being answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedLook(Generic[T]):
    """Runs `look()`, which may block, in a thread, for all that wait. It belongs to the loop that first asks.

    A look that goes on past the end of the server, or of all that waited for it, is not waited for.
    """

    def __init__(self, look: Callable[[], T]) -> None:
        self._look = look
        self._running: asyncio.Future[T] | None = None

    async def until(self, enough: Callable[[T], bool], within_s: float, every_s: float = 0.0) -> T | None:
        """Return what the first look that is `enough` has seen; None if there was none within `within_s` seconds.

        Only looks count that began after this was called: an earlier one may have seen what is no longer so. Looks
        follow each other by `every_s` seconds. Whatever `look` raises is raised here.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        earlier = self._running
        while True:
            running = self._running
            if running is None or running.done():
                running = self._running = asyncio.ensure_future(asyncio.to_thread(self._look))
                # Takes note of an exception: asyncio would report one where no request is left to raise it.
                running.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait([running], timeout=max(0.0, end - loop.time()))
            if running.done() and running is not earlier and enough(seen := running.result()):
                return seen
            if loop.time() >= end:
                return None
            if running is not earlier:
                await asyncio.sleep(every_s)
