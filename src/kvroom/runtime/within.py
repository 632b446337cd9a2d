"""A wait with a time limit that is over when it is cancelled, always.

`asyncio.wait_for` of Python 3.10 and 3.11 forgets a cancellation that comes in the turn in which the work ends
(https://github.com/python/cpython/issues/86296): a task that tries again in a loop would go on, and whoever closes it
would wait until it gives up by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], limit_s: float) -> T:
    """What `work` returns or raises. `asyncio.TimeoutError` after `limit_s` seconds.

    When this has raised, for whatever reason, the work has ended: it was cancelled unless it had ended by itself.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=limit_s)
        if task.done():
            return task.result()
        raise asyncio.TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody else asks for it where the wait was cancelled
