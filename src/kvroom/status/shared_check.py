"""Blocking checks that many HTTP requests wait for, each in one thread however many requests there are.

A request that waits for a state would otherwise block a thread of the small pool that all requests share. A few dozen
of them would keep `/metrics` and `/rooms` from being answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedCheck(Generic[T]):
    """Runs `check()`, which may block, in a thread for all waiting callers. It belongs to the first caller's loop.

    Args:
        check: returns what it has seen. One that is still running when the server ends, or when its last caller has
            timed out, is left to end by itself.
    """

    def __init__(self, check: Callable[[], T]) -> None:
        self._check = check
        self._running: asyncio.Future[T] | None = None

    async def until(self, enough: Callable[[T], bool], within_s: float, every_s: float = 0.0) -> T | None:
        """Return the result of the first check that is `enough`; None if there is none within `within_s` seconds.

        Only checks that began after this call count: an earlier one may have seen a state that is over. `every_s` is
        the pause between two checks, in seconds. Exceptions of `check` are raised here.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        earlier = self._running
        while True:
            running = self._running
            if running is None or running.done():
                running = self._running = asyncio.ensure_future(asyncio.to_thread(self._check))
                # Retrieve the exception: asyncio would log one that no request is left to raise.
                running.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait([running], timeout=max(0.0, end - loop.time()))
            if running.done() and running is not earlier and enough(seen := running.result()):
                return seen
            if loop.time() >= end:
                return None
            if running is not earlier:
                await asyncio.sleep(every_s)
