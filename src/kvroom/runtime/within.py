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
    except asyncio.CancelledError:
        await _end(task)
        raise
    if task.done():
        return task.result()
    await _end(task)
    raise asyncio.TimeoutError


async def _end(task: asyncio.Future[T]) -> None:
    """Not in a `finally`: a coroutine that is thrown away with its loop must not wait for anything any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # nobody else asks for it
